# SPDX-License-Identifier: Apache-2.0
"""The same random numbers in every run and any order of the tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
