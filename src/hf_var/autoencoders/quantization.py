# SPDX-License-Identifier: Apache-2.0
"""
The multi-scale residual quantizer of VAR (Tian et al. 2024, section 3.2, algorithms 1 and 2).

One scale as large as the latents is the quantizer of VQ-VAE, several such scales are that of RQ-VAE. Everything here
computes in fp32, also inside autocast: the search compares small differences of distances, and the running
reconstruction adds up over the scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ..scales import bounds
from .configuration_vqvae import VQVAEConfig


class Float32Weights(nn.Module):
    """
    Weights that `.to(dtype)`, `.half()` and `.bfloat16()` move but do not round: rounded codes would be other codes.
    (transformers keeps the quantizer in fp32 while loading, but not afterwards.)
    """

    def _apply(self, fn, recurse=True):
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(move_only, recurse)


class Codebook(Float32Weights, nn.Embedding):
    """
    The code vectors, `(codebook_size, latent_channels)`.

    Search and look-up are both `forward`, because offloading hooks bring the weights to the device there only.
    """

    running_hits: torch.Tensor

    def __init__(self, config: VQVAEConfig):
        super().__init__(config.codebook_size, config.latent_channels, dtype=torch.float32)
        self.normalize = config.normalize_codebook
        # Running average of how often each scale used each code in training; it travels with the weights.
        self.register_buffer(
            "running_hits", torch.zeros(len(config.patch_nums), config.codebook_size, dtype=torch.float32)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        Integer `inputs` are codes and give their vectors `(..., latent_channels)`; floating-point `inputs` are vectors
        `(..., latent_channels)` and give the nearest codes `(...)`.
        """
        if not inputs.is_floating_point():
            return super().forward(inputs)
        vectors = inputs.flatten(0, -2)
        if self.normalize:
            similarity = functional.normalize(vectors, dim=-1) @ functional.normalize(self.weight, dim=-1).T
        else:
            # Without the vector's own square, which is the same for all codes, minus half the squared distance.
            similarity = torch.addmm(self.weight.square().sum(dim=-1), vectors, self.weight.T, beta=-0.5)
        return similarity.argmax(dim=-1).view(inputs.shape[:-1])


class RefinementConv(Float32Weights, nn.Conv2d):
    """phi(x) = (1 - ratio) x + ratio conv(x), which repairs what the enlargement of a token map loses."""

    def __init__(self, config: VQVAEConfig):
        super().__init__(config.latent_channels, config.latent_channels, kernel_size=3, padding=1, dtype=torch.float32)
        self.ratio = config.refinement_ratio

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * (1 - self.ratio) + super().forward(hidden_states) * self.ratio


def refinement_conv_indices(num_scales: int, num_convs: int) -> list[int]:
    """
    Which of `num_convs` shared convolutions serves each scale: the one whose tick is nearest to the scale's relative
    depth. The ticks' margins are narrower for four convolutions than for any other number.

    Many schedules, that of the released models among them, have scales exactly between two ticks. Which one is nearer
    is then a matter of rounding: the order of the operations below is part of the checkpoints.
    """
    margin = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    last_tick = 1 - margin
    step = (last_tick - margin) / max(num_convs - 1, 1)
    ticks = [margin + index * step for index in range(num_convs)]
    if num_convs > 1:
        ticks[-1] = last_tick
    depths = [scale / (num_scales - 1) if num_scales > 1 else 0.0 for scale in range(num_scales)]
    return [min(range(num_convs), key=lambda index: abs(ticks[index] - depth)) for depth in depths]


@dataclass
class QuantizerOutput:
    """
    Attributes:
        codes (`torch.LongTensor` of shape `(batch, length)`): Token maps of all scales.
        latents (`torch.FloatTensor` of shape `(batch, latent_channels, height, width)`): Sum over the scales.
        inputs (`torch.FloatTensor` of shape `(batch, length, latent_channels)`):
            The vectors that the search compared with the codes, without a gradient.
        loss (`torch.FloatTensor`, *optional*): Codebook and commitment terms, averaged over the scales.
    """

    codes: torch.Tensor
    latents: torch.Tensor
    inputs: torch.Tensor
    loss: torch.Tensor | None = None


class MultiScaleResidualQuantizer(nn.Module):
    """Quantize a feature map as a sum of enlarged and refined token maps of growing size."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.scale_sizes = config.scale_sizes
        self.scale_bounds = bounds(config.scale_lengths)
        self.latent_channels = config.latent_channels
        self.commitment_loss_weight = config.commitment_loss_weight
        self.codebook_loss_weight = config.codebook_loss_weight
        self.codebook = Codebook(config)
        num_scales = len(self.scale_sizes)
        # As many convolutions as scales give each scale its own.
        num_convs = config.num_refinement_convs or num_scales
        self.refinement_indices = refinement_conv_indices(num_scales, num_convs)
        self.refinement_convs = nn.ModuleList(
            RefinementConv(config) for _ in range(num_convs if config.refinement_ratio > 0 else 0)
        )

    def pool(self, latents: torch.Tensor, scale: int) -> torch.Tensor:
        """Reduce a map of the size of the latents to that of `scale` by averaging over areas."""
        if self.scale_sizes[scale] == tuple(latents.shape[-2:]):
            return latents
        if latents.device.type == "mps":
            # Apple's kernel pools to divisors of the size only.
            return functional.interpolate(latents.cpu(), size=self.scale_sizes[scale], mode="area").to(latents.device)
        return functional.interpolate(latents, size=self.scale_sizes[scale], mode="area")

    def expand(self, code_vectors: torch.Tensor, scale: int) -> torch.Tensor:
        """What `code_vectors` of shape `(batch, length of scale, latent_channels)` add to the latents."""
        height, width = self.scale_sizes[scale]
        expanded = code_vectors.transpose(1, 2).unflatten(2, (height, width))
        if self.scale_sizes[scale] != self.scale_sizes[-1]:
            expanded = functional.interpolate(expanded, size=self.scale_sizes[-1], mode="bicubic")
        if len(self.refinement_convs) == 0:
            return expanded.contiguous()
        return self.refinement_convs[self.refinement_indices[scale]](expanded.contiguous())

    def running_latents(self, codes: torch.Tensor) -> Iterator[torch.Tensor]:
        """The latents after each scale that `codes` of shape `(batch, length)` hold, coarse to fine."""
        latents = None
        for scale, (begin, end) in enumerate(self.scale_bounds):
            if begin >= codes.shape[1]:
                return
            update = self.expand(self.codebook(codes[:, begin:end]), scale)
            latents = update if latents is None else latents + update
            yield latents

    def forward(self, features: torch.Tensor, return_loss: bool = False) -> QuantizerOutput:
        """
        Args:
            features (`torch.FloatTensor` of shape `(batch, latent_channels, height, width)`): The encoder's output.
            return_loss (`bool`, *optional*, defaults to `False`): Whether to compute the training terms.
        """
        features = features.float()
        # The residual only steers the search, which has no gradient.
        residual = features.detach()
        latents = torch.zeros_like(residual)
        codes, inputs, loss = [], [], features.new_zeros(())
        for scale in range(len(self.scale_sizes)):
            vectors = (
                self.pool(residual, scale).flatten(2).transpose(1, 2)
            )  # (batch, length of scale, latent_channels)
            inputs.append(vectors)
            codes.append(self.codebook(vectors))
            update = self.expand(self.codebook(codes[-1]), scale)
            latents = latents + update
            residual = residual - update.detach()
            if return_loss:
                commitment = functional.mse_loss(latents.detach(), features)
                codebook = functional.mse_loss(latents, features.detach())
                loss = loss + self.commitment_loss_weight * commitment + self.codebook_loss_weight * codebook
        loss = loss / len(self.scale_sizes) if return_loss else None
        return QuantizerOutput(torch.cat(codes, dim=1), latents, torch.cat(inputs, dim=1), loss)
