# SPDX-License-Identifier: Apache-2.0
"""Outputs of the autoencoders' methods."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class VQVAEOutput(ModelOutput):
    """
    Output of [`VQVAEModel`] and [`HierarchicalVQVAEModel`], whose features and latents are tuples of one map per level.

    Args:
        loss (`torch.FloatTensor` of shape `()`): Codebook and commitment terms of the quantizer, in fp32. The
            reconstruction terms belong to the training recipe.
        sample (`torch.FloatTensor` of shape `(batch, out_channels, height, width)`): Reconstruction, not clamped.
        features (`torch.FloatTensor` of shape `(batch, latent_channels, latent height, latent width)`): The encoder's
            continuous output.
        latents (`torch.FloatTensor`, as `features`): Quantized features with straight-through gradient, in fp32.
        codes (`torch.LongTensor` of shape `(batch, length)`): Token maps, coarse to fine, each row-major.
        quantizer_inputs (`torch.FloatTensor` of shape `(batch, length, latent_channels)`): The vectors that `codes`
            stand for, in fp32 and without a gradient: what the scales before leave of the features, reduced to the scale.
    """

    loss: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    features: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    latents: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    codes: torch.Tensor | None = None
    quantizer_inputs: torch.Tensor | None = None


@dataclass
class VQVAEEncoderOutput(ModelOutput):
    """
    Output of [`VQVAEModel.encode`] and [`HierarchicalVQVAEModel.encode`], whose features and latents are tuples of one map
    per level.

    Args:
        features (`torch.FloatTensor` of shape `(batch, latent_channels, latent height, latent width)`): The encoder's
            continuous output.
        latents (`torch.FloatTensor`, as `features`): Quantized features, in fp32.
        codes (`torch.LongTensor` of shape `(batch, length)`): Token maps, coarse to fine, each row-major.
    """

    features: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    latents: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    codes: torch.Tensor | None = None


@dataclass
class VQVAEDecoderOutput(ModelOutput):
    """
    Output of [`VQVAEModel.decode`] and [`HierarchicalVQVAEModel.decode`].

    Args:
        sample (`torch.FloatTensor` of shape `(batch, out_channels, height, width)`): Images in `[-1, 1]`; of class maps
            (`VQVAEConfig.sample_type`) the logits of the classes.
    """

    sample: torch.Tensor | None = None
