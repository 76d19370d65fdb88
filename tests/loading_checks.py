# SPDX-License-Identifier: Apache-2.0
"""Loading without the checks of our own, for tests of what transformers does below them."""

from hf_var.loading import CheckedModelMixin


def incomplete(model_class):
    """The methods of `model_class` that lie below its checks: they initialise what a file lacks."""
    return super(CheckedModelMixin, model_class)
