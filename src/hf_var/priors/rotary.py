# SPDX-License-Identifier: Apache-2.0
"""Rotary positions in token maps (Su et al. 2021), which begin anew at every scale and span the same angles."""

import torch

from .configuration_text_var import TextVARConfig


def position_angles(
    config: TextVARConfig, begin: int, end: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines, each `(end - begin, head_dim / 2)` in fp32, of the tokens `begin` to `end` of an image; both are
    at the ends of scales. The first half of the pairs of channels turns with a token's column, the second with its
    row.
    """
    # The order of the products is the official one: another would move the angles by their rounding.
    exponents = torch.arange(0, config.head_dim, 4, device=device).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles, first = [], 0
    for height, width in config.scale_sizes:
        if begin <= first < end:
            rows, columns = (
                torch.outer(
                    torch.arange(side, device=device).float(), frequencies * (config.rope_size / max(side - 1, 1))
                )
                for side in (height, width)
            )
            by_column, by_row = columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)
            angles.append(torch.cat([by_column, by_row], dim=-1))
        first += height * width
    whole = torch.cat(angles)
    return whole.cos(), whole.sin()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of `(..., length, head_dim)` by the angles of their tokens, in fp32."""
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
