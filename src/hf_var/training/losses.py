# SPDX-License-Identifier: Apache-2.0
"""Reconstruction losses: distances of pixels, and LPIPS."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from ..autoencoders import VQVAEOutput
from ..ranges import CheckedFields, NonNegativeFloat, argument


@dataclass(kw_only=True)
class ReconstructionConfig(CheckedFields):
    """Weights of a tokenizer's objective, without the adversary."""

    l1_weight: NonNegativeFloat = argument(0.0, help="weight of the mean absolute error of the pixels")
    l2_weight: NonNegativeFloat = argument(1.0, help="weight of the mean squared error of the pixels")
    lpips_weight: NonNegativeFloat = argument(0.0, help="weight of the perceptual distance LPIPS")
    lpips_weights: str | None = argument(
        None, help="file of torchvision's VGG16 weights; default: downloaded; random: for tests"
    )
    quantizer_weight: NonNegativeFloat = argument(1.0, help="weight of the codebook and commitment terms")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1_weight + self.l2_weight == 0:
            raise ValueError("One of `l1_weight` and `l2_weight` must be positive, got 0.0 for both.")


def reconstruction_objective(
    config: ReconstructionConfig, output: VQVAEOutput, target: torch.Tensor, perceptual_loss: nn.Module | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of pixels and features, the quantizer's, both with their weights, and what they are made of."""
    sample, quantizer_loss = cast(torch.Tensor, output.sample), cast(torch.Tensor, output.loss)
    reconstruction = reconstruction_loss(sample, target, config.l1_weight, config.l2_weight)
    metrics = {"reconstruction_loss": reconstruction, "quantizer_loss": quantizer_loss}
    if config.lpips_weight > 0 and perceptual_loss is not None:
        metrics["lpips_loss"] = perceptual_loss(sample, target).mean()
        reconstruction = reconstruction + config.lpips_weight * metrics["lpips_loss"]
    return reconstruction, config.quantizer_weight * quantizer_loss, metrics


def reconstruction_loss(
    sample: torch.Tensor, target: torch.Tensor, l1_weight: float, l2_weight: float
) -> torch.Tensor:
    """Weighted sum of mean absolute and mean squared error, in fp32 whatever the dtype."""
    sample, target = sample.float(), target.float()
    # Terms without weight are not computed.
    terms = ((l1_weight, functional.l1_loss), (l2_weight, functional.mse_loss))
    weighted = [weight * distance(sample, target) for weight, distance in terms if weight != 0]
    return torch.stack(weighted).sum() if weighted else sample.new_zeros(())
