# SPDX-License-Identifier: Apache-2.0
"""Context manager for the evaluation mode of models."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(*models: nn.Module | None) -> Iterator[None]:
    """
    Run models without dropout, and give every module the mode back that it had. Models that are in evaluation mode
    already are not written to, so several threads may share them.
    """
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
