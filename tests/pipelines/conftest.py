# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the pipelines' tests."""

import pytest

from hf_var import VARPipeline
from pipelines.tiny import make_pipeline


@pytest.fixture
def pipe() -> VARPipeline:
    """A pipeline of its own for every test, so that none inherits another's hooks, dtype or settings."""
    return make_pipeline()
