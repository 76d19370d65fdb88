# SPDX-License-Identifier: Apache-2.0
"""
Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): every channel is rounded to one of a few levels.

The codes are all combinations of levels, so no table is learned. Rounding passes the gradient on unchanged (section 3.1),
so codebook and commitment terms are not needed.

In a residual quantizer the features are bounded once, and the residuals are rounded without another tanh, as in
`ResidualFSQ` of vector-quantize-pytorch: a tanh at every scale would cause distortions that later scales cannot
correct. The residuals of a scale cover only a part of the levels' range, for instance half a step after a map of the same
size, so some levels would never be used. Therefore every scale has a learned extent that its levels are multiplied by (Zhu
et al. 2025, arXiv 2508.15860). A single scale has none: it is the paper's quantizer.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from .codebook import BaseCodebook, CodeWeights
from .configuration_vqvae import VQVAEConfig


# Keeps the bounded features away from the last rounding border (appendix A.1).
EPSILON = 1e-3


class LogExtents(CodeWeights, nn.Embedding):
    """Logarithms of the extents, `(scales, latent_channels)`: an embedding, because offloading knows those."""

    def __init__(self, scale_sizes: Sequence[tuple[int, int]], levels: Sequence[int]):
        super().__init__(len(scale_sizes), len(levels), dtype=torch.float32)
        # A map of L levels leaves at most half a step, which the L levels of the next map of its size are to cover.
        times = [scale_sizes[:scale].count(size) for scale, size in enumerate(scale_sizes)]
        self.start = [[-earlier * math.log(level - 1) for level in levels] for earlier in times]

    def init_weights(self) -> None:
        init.copy_(self.weight, torch.tensor(self.start, dtype=torch.float32))


class FiniteScalarCodebook(BaseCodebook):
    """
    The implicit codebook: of L levels of a channel, the digits 0 to L - 1 of a code, the first channel's digit counting
    ones. Its vectors are `(digit - L // 2) / (L // 2)`: symmetric for odd L, from -1 to 1 - 2 / L for even L.
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.levels: list[int] = list(config.fsq_levels or ())
        self.half_widths = [level // 2 for level in self.levels]
        self.places = [math.prod(self.levels[:channel]) for channel in range(len(self.levels))]
        several = len(config.scale_sizes) > 1
        self.log_extents = LogExtents(config.scale_sizes, self.levels) if several else None
        self.count_hits(config)

    def bound(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, latent_channels, height, width)` features as numbers that round to a level (appendix A.1)."""
        half_lengths = [(level - 1) * (1 - EPSILON) / 2 for level in self.levels]
        offsets = [0.0 if level % 2 else 0.5 for level in self.levels]
        shifts = [math.tan(offset / length) for offset, length in zip(offsets, half_lengths, strict=True)]
        half_length, offset, shift, half_width = (
            constants(values, torch.float32, features.device).view(-1, 1, 1)
            for values in (half_lengths, offsets, shifts, self.half_widths)
        )
        bounded = (torch.tanh(features.float() + shift) * half_length - offset) / half_width
        return bounded.to(features.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        half_widths, levels, places = (
            constants(values, torch.int64, inputs.device) for values in (self.half_widths, self.levels, self.places)
        )
        if inputs.is_floating_point():
            rounded = (inputs * half_widths).round().nan_to_num() + half_widths
            digits = rounded.clamp(min=0).minimum(levels - 1)
            return (digits.long() * places).sum(dim=-1)
        digits = inputs[..., None].div(places, rounding_mode="floor") % levels
        return (digits - half_widths) / half_widths.float()

    def extent(self, scale: int, device: torch.device) -> torch.Tensor | None:
        if self.log_extents is None:
            return None
        return self.log_extents(torch.full((), scale, device=device)).exp()

    def straight_through(self, found: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        half_widths, levels = (
            constants(values, torch.int64, vectors.device) for values in (self.half_widths, self.levels)
        )
        # Beyond the last level only a larger extent changes the result, so the vectors get no gradient.
        digits = (vectors * half_widths + half_widths).clamp(min=-0.5).minimum(levels - 0.5)
        inside = digits / half_widths
        # The value is exactly that of `found`: decoding the codes gives the same latents.
        return found + (inside - inside.detach())


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    A vector of `values`. Buffers would have to be saved, or created again after loading on the meta device, and a copy
    from the CPU is refused while a CUDA graph is recorded. So the vector is created on the device, value by value.
    """
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
