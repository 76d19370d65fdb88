# SPDX-License-Identifier: Apache-2.0
"""Reconstruction losses: distances of pixels, LPIPS, and the cross-entropy of class maps."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from ..autoencoders import VQVAEOutput
from ..autoencoders.class_maps import as_one_hot
from ..ranges import CheckedFields, NonNegativeFloat, argument


@dataclass(kw_only=True)
class PixelLossConfig(CheckedFields):
    """Weights of the terms that compare images with their reconstructions."""

    l1_weight: NonNegativeFloat = argument(0.0, help="weight of the mean absolute error of the pixels")
    l2_weight: NonNegativeFloat = argument(1.0, help="weight of the mean squared error of the pixels")
    lpips_weight: NonNegativeFloat = argument(0.0, help="weight of the perceptual distance LPIPS")
    lpips_weights: str | None = argument(
        None, help="file of torchvision's VGG16 weights; default: downloaded; random: for tests"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_pixel_term:
            raise ValueError("One of `l1_weight` and `l2_weight` must be positive, got 0.0 for both.")

    @property
    def has_pixel_term(self) -> bool:
        """Whether pixels are compared with those of the reconstruction."""
        return self.l1_weight + self.l2_weight > 0


@dataclass(kw_only=True)
class ReconstructionConfig(PixelLossConfig):
    """Weights of a tokenizer's objective, without the adversary."""

    bce_weight: NonNegativeFloat = argument(
        0.0, help="weight of the binary cross-entropy of each class of class maps, in place of the terms of images"
    )
    quantizer_weight: NonNegativeFloat = argument(1.0, help="weight of the codebook and commitment terms")

    @property
    def has_pixel_term(self) -> bool:
        return super().has_pixel_term or self.bce_weight > 0


def reconstruction_objective(
    config: ReconstructionConfig, output: VQVAEOutput, target: torch.Tensor, perceptual_loss: nn.Module | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """
    The loss of pixels and features, or of the pixels of class maps (ids or one-hot), the quantizer's, both with their
    weights, and what they are made of.
    """
    sample, quantizer_loss = cast(torch.Tensor, output.sample), cast(torch.Tensor, output.loss)
    if config.bce_weight > 0:
        reconstruction = config.bce_weight * class_map_loss(sample, target)
        metrics = {"reconstruction_loss": reconstruction}
    else:
        reconstruction, metrics = pixel_loss(config, perceptual_loss, sample, target)
    metrics["quantizer_loss"] = quantizer_loss
    return reconstruction, config.quantizer_weight * quantizer_loss, metrics


def pixel_loss(
    config: PixelLossConfig, perceptual_loss: nn.Module | None, sample: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of pixels and features with their weights, and the metrics `reconstruction_loss` and, if used, `lpips_loss`."""
    loss = reconstruction_loss(sample, target, config.l1_weight, config.l2_weight)
    metrics = {"reconstruction_loss": loss}
    if config.lpips_weight > 0 and perceptual_loss is not None:
        metrics["lpips_loss"] = perceptual_loss(sample, target).mean()
        loss = loss + config.lpips_weight * metrics["lpips_loss"]
    return loss, metrics


def reconstruction_loss(
    sample: torch.Tensor, target: torch.Tensor, l1_weight: float, l2_weight: float
) -> torch.Tensor:
    """Weighted sum of mean absolute and mean squared error, in fp32 whatever the dtype."""
    sample, target = sample.float(), target.float()
    # Terms without weight are not computed.
    terms = ((l1_weight, functional.l1_loss), (l2_weight, functional.mse_loss))
    weighted = [weight * distance(sample, target) for weight, distance in terms if weight != 0]
    return torch.stack(weighted).sum() if weighted else sample.new_zeros(())


def class_map_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Mean binary cross-entropy of every class at every pixel (Esser et al. 2021), in fp32 whatever the dtype: of logits
    `(batch, classes, height, width)` for class maps, ids or one-hot.
    """
    one_hot = as_one_hot(target, logits.shape[1]).float()
    return functional.binary_cross_entropy_with_logits(logits.float(), one_hot)
