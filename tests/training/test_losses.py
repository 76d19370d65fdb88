# SPDX-License-Identifier: Apache-2.0
"""Losses of pixels."""

import pytest
import torch

from hf_var.training.losses import reconstruction_loss


def test_reconstruction_loss_by_hand() -> None:
    sample = torch.tensor([0.5, -1.0], dtype=torch.bfloat16, requires_grad=True)
    loss = reconstruction_loss(sample, torch.tensor([1.0, 1.0]), l1_weight=2.0, l2_weight=3.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * (0.5 + 2) / 2 + 3 * (0.25 + 4) / 2)
    loss.backward()
    assert sample.grad is not None
    assert sample.grad.tolist() == pytest.approx([-1 - 1.5, -1 - 6])
