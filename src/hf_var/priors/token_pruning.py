# SPDX-License-Identifier: Apache-2.0
"""Layers that run for a part of the tokens of the last scales (FastVAR: Guo et al. 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional

from ..ranges import CheckedFields, Interval, NonNegativeInt
from .configuration_blocks import BlocksMixin
from .layer_hooks import LayerCall, LayerHook, LayerRun, gather_tokens


# What a layer added to its input at the last scale that was not pruned, `(batch, hidden, height, width)`.
INCREMENT = "increment"


@dataclass
class TokenPruning(LayerHook, CheckedFields):
    r"""
    Runs layers for a part of the tokens of the last scales only, which have most of the tokens: FastVAR's cached token
    pruning ([Guo et al. 2025](https://huggingface.co/papers/2503.23367)).

    For each layer and image, the tokens are chosen that differ most from the mean of all tokens, in the squared distance:
    these carry the details that the scale adds. The others get what the same layer added at their place at the last scale
    that was not pruned, resized bilinearly.

    In the paper each branch of a layer is restored by itself; here it is the sum of all branches of a layer, so that it is
    the same for every kind of layer.

    Args:
        shares (`list[float]`):
            Shares of the tokens that are kept, in (0, 1], of the last scales, coarse to fine: `[0.6, 0.4]` are those of the
            last two. 1 prunes nothing.
        first_layer (`int`, *optional*, defaults to 0): First layer that is pruned.

    Raises:
        `ValueError`: If a share is out of range, or the first scale would be pruned.
    """

    shares: Sequence[Annotated[float, Interval(above=0, maximum=1)]]
    first_layer: NonNegativeInt = 0

    def check(self, config: BlocksMixin) -> None:
        num_scales = len(config.scale_sizes)
        if len(self.shares) >= num_scales:
            raise ValueError(
                f"`shares` must be those of fewer than {num_scales} scales, since the first one is never pruned, got "
                f"{len(self.shares)}."
            )
        if self.first_layer >= config.num_hidden_layers:
            raise ValueError(
                f"`first_layer` must be a layer from 0 to {config.num_hidden_layers - 1}, got {self.first_layer}."
            )

    def run_layer(self, run: LayerRun, hidden_states: torch.Tensor, call: LayerCall) -> torch.Tensor:
        if call.layer_idx < self.first_layer:
            return run(hidden_states)
        config, scale = call.config, call.scales[-1]
        sizes = config.scale_sizes
        length = hidden_states.shape[1]
        num_kept = max(1, round(self._share(config, scale) * length))
        if len(call.scales) > 1 or num_kept == length:
            hidden_states, given = run(hidden_states), hidden_states
            if scale + 1 < len(sizes) and self._share(config, scale + 1) < 1:
                added = (hidden_states - given)[:, -config.scale_lengths[scale] :]
                call.state[INCREMENT] = added.mT.unflatten(2, sizes[scale])
            return hidden_states
        tokens = pivotal_tokens(hidden_states, num_kept)
        resized = functional.interpolate(call.state[INCREMENT], sizes[scale], mode="bilinear", align_corners=False)
        restored = hidden_states + resized.flatten(2).mT
        kept = run(gather_tokens(hidden_states, tokens), tokens)
        return restored.scatter(1, tokens.unsqueeze(-1).expand_as(kept), kept.to(restored.dtype))

    def _share(self, config: BlocksMixin, scale: int) -> float:
        place = scale - len(config.scale_sizes) + len(self.shares)
        return self.shares[place] if place >= 0 else 1.0


def pivotal_tokens(hidden_states: torch.Tensor, number: int) -> torch.Tensor:
    """Places `(batch, number)`, ascending, of the vectors `(batch, length, hidden)` that are farthest from their mean."""
    distances = (hidden_states - hidden_states.mean(dim=1, keepdim=True)).float().square().sum(dim=-1)
    return distances.topk(number, dim=1).indices.sort(dim=1).values


__all__ = ["TokenPruning"]
