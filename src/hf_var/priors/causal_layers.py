# SPDX-License-Identifier: Apache-2.0
"""Convolutions that see no later code, for whole maps and for rows after those in a cache."""

import torch
from torch import nn
from torch.nn import functional

from .row_cache import RowCache


class MaskedConv2d(nn.Module):
    """
    A convolution over maps `(batch, channels, rows, width)` whose kernel ends in the row it predicts: `padding` is left,
    right, top and bottom as in `torch.nn.functional.pad`, and the last `num_masked` weights of the last row count as zero
    whatever they hold (van den Oord et al. 2016, masks A and B).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        num_masked: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.padding = padding
        self.num_masked = num_masked
        self._add_weights(out_channels, in_channels, *kernel_size)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None

    def _add_weights(self, *shape: int) -> None:
        self.weight = nn.Parameter(torch.empty(shape))

    def effective_weight(self) -> torch.Tensor:
        """The weight as it acts."""
        return mask_last(self.weight, self.num_masked)

    def forward(self, states: torch.Tensor, cache: RowCache | None = None) -> torch.Tensor:
        left, right, top, bottom = self.padding
        if cache is not None and top > 0:
            states, top = cache.extend(self, states, top), 0
        states = functional.pad(states, (left, right, top, bottom))
        weight = self.effective_weight() if cache is None else cache.keep(self, self.effective_weight)
        return functional.conv2d(states, weight, self.bias)  # (batch, channels, rows, width)


class WeightNormConv2d(MaskedConv2d):
    """
    A [`MaskedConv2d`] whose weight is a length times a direction per output channel (Salimans and Kingma 2016), the
    direction masked before its norm is taken. Plain parameters: torch's parametrizations rename keys.
    """

    def _add_weights(self, *shape: int) -> None:
        self.weight_g = nn.Parameter(torch.empty(shape[0], 1, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(shape))

    def direction(self) -> torch.Tensor:
        """The direction of every output channel, masked."""
        return mask_last(self.weight_v, self.num_masked)

    def effective_weight(self) -> torch.Tensor:
        direction = self.direction()
        return direction * (self.weight_g / norm_per_channel(direction))


def norm_per_channel(weight: torch.Tensor) -> torch.Tensor:
    """Norm of the weights of every output channel, `(channels, 1, 1, 1)`."""
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)


def mask_last(weight: torch.Tensor, num_masked: int) -> torch.Tensor:
    """`weight` `(out, in, height, width)` with zeros in the last `num_masked` places of each kernel's last row."""
    if num_masked == 0:
        return weight
    # Made anew at each call: a buffer would be one more thing that loading without memory leaves undefined.
    mask = torch.zeros(weight.shape[2:], dtype=torch.bool, device=weight.device)
    mask[-1, weight.shape[3] - num_masked :] = True
    return weight.masked_fill(mask, 0)
