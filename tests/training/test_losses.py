# SPDX-License-Identifier: Apache-2.0
"""Losses of pixels."""

import pytest
import torch

from hf_var import VQVAEOutput
from hf_var.training.losses import (
    PixelLossConfig,
    ReconstructionConfig,
    class_map_loss,
    reconstruction_loss,
    reconstruction_objective,
)


def test_reconstruction_loss_by_hand() -> None:
    sample = torch.tensor([0.5, -1.0], dtype=torch.bfloat16, requires_grad=True)
    loss = reconstruction_loss(sample, torch.tensor([1.0, 1.0]), l1_weight=2.0, l2_weight=3.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * (0.5 + 2) / 2 + 3 * (0.25 + 4) / 2)
    loss.backward()
    assert sample.grad is not None
    assert sample.grad.tolist() == pytest.approx([-1 - 1.5, -1 - 6])


def test_loss_of_class_maps_by_hand() -> None:
    ids = torch.tensor([[[0, 2]]], dtype=torch.int16)
    logits = torch.tensor([1.0, -2.0, 3.0, 0.0, 4.0, -1.0]).view(1, 3, 1, 2).requires_grad_()
    is_right = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0]).view(1, 3, 1, 2)
    probabilities = logits.detach().sigmoid()
    expected = -(is_right * probabilities.log() + (1 - is_right) * (1 - probabilities).log()).mean()
    assert class_map_loss(logits, ids).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(class_map_loss(logits, is_right), class_map_loss(logits, ids))
    half = class_map_loss(logits.bfloat16(), ids)
    assert half.dtype == torch.float32
    half.backward()
    assert logits.grad is not None


def test_the_objective_of_class_maps_is_their_loss_and_the_quantizers() -> None:
    config = ReconstructionConfig(l2_weight=0.0, bce_weight=2.0, quantizer_weight=3.0)
    ids = torch.randint(4, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    output = VQVAEOutput(loss=torch.tensor(0.5), sample=logits)
    reconstruction, quantizer_loss, metrics = reconstruction_objective(config, output, ids, None)
    assert reconstruction.item() == pytest.approx(2 * class_map_loss(logits, ids).item())
    assert quantizer_loss.item() == 1.5
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"reconstruction_loss": reconstruction.item(), "quantizer_loss": 0.5}
    )


def test_one_term_must_compare_pixels() -> None:
    for make in (PixelLossConfig, ReconstructionConfig):
        with pytest.raises(ValueError, match="One of `l1_weight` and `l2_weight` must be positive"):
            make(l2_weight=0.0)
    assert ReconstructionConfig(l2_weight=0.0, bce_weight=1.0).has_pixel_term
