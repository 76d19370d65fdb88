# SPDX-License-Identifier: Apache-2.0
"""Layers that run for a part of the tokens of the last scales (FastVAR: Guo et al. 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional

from ..ranges import CheckedFields, Interval, NonNegativeInt, check_fields, fitting
from .configuration_blocks import BlocksMixin
from .layer_hooks import LayerCall, LayerHook, LayerRun, gather_tokens


# What a layer added to its input at the last scale that was not pruned, `(batch, hidden, height, width)`.
INCREMENT = "increment"
PRUNED_SHARE = Interval(above=0, maximum=1)


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

    For shares that depend on the layer, override [`~TokenPruning.share`].

    Args:
        shares (`list[float]`):
            Shares of the tokens that are kept, in (0, 1], of the last scales, coarse to fine: `[0.6, 0.4]` are those of the
            last two. 1 prunes nothing.
        first_layer (`int`, *optional*, defaults to 0): First layer that is pruned.

    Raises:
        `ValueError`: If a share is out of range, or the first scale would be pruned.
    """

    shares: Sequence[Annotated[float, PRUNED_SHARE]]
    first_layer: NonNegativeInt = 0

    def check(self, config: BlocksMixin) -> None:
        check_fields(self)
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

    def share(self, config: BlocksMixin, layer_idx: int, scale: int) -> float:
        """
        The share of tokens that a layer is run for at a scale.

        Args:
            config ([`VARConfig`] or [`TextVARConfig`]): Configuration of the transformer.
            layer_idx (`int`): The layer, from 0 on.
            scale (`int`): The scale, from 0 on.

        Returns:
            `float` in (0, 1]; 1 at the first scale.
        """
        place = scale - len(config.scale_sizes) + len(self.shares)
        return self.shares[place] if place >= 0 and layer_idx >= self.first_layer else 1.0

    def run_layer(self, run: LayerRun, hidden_states: torch.Tensor, call: LayerCall) -> torch.Tensor:
        config, scale = call.config, call.scales[-1]
        sizes, lengths = config.scale_sizes, config.scale_lengths
        length = sum(lengths[each] for each in call.scales)
        if hidden_states.shape[1] != length:
            raise ValueError(
                f"`TokenPruning` must get all {length} tokens of a scale, got {hidden_states.shape[1]}: put it before the "
                "hook that leaves out the others."
            )
        num_kept = self._num_kept(call, scale)
        if len(call.scales) > 1 or num_kept == length:
            hidden_states, given = run(hidden_states), hidden_states
            if scale + 1 < len(sizes) and self._num_kept(call, scale + 1) < lengths[scale + 1]:
                added = (hidden_states - given)[:, -lengths[scale] :]
                call.state[INCREMENT] = added.mT.unflatten(2, sizes[scale])
            return hidden_states
        if INCREMENT not in call.state:
            raise ValueError(
                "`TokenPruning` must see the scale before the first pruned one: put it before other hooks."
            )
        tokens = pivotal_tokens(hidden_states, num_kept)
        resized = functional.interpolate(call.state[INCREMENT], sizes[scale], mode="bilinear", align_corners=False)
        restored = hidden_states + resized.flatten(2).mT
        kept = run(gather_tokens(hidden_states, tokens), tokens)
        return restored.scatter(1, tokens.unsqueeze(-1).expand_as(kept), kept.to(restored.dtype))

    def _num_kept(self, call: LayerCall, scale: int) -> int:
        """Tokens of a scale that the layer of a call is run for."""
        share = fitting("share", self.share(call.config, call.layer_idx, scale), float, PRUNED_SHARE)
        return max(1, round(share * call.config.scale_lengths[scale]))


def pivotal_tokens(hidden_states: torch.Tensor, number: int) -> torch.Tensor:
    """Places `(batch, number)`, ascending, of the vectors `(batch, length, hidden)` that are farthest from their mean."""
    distances = (hidden_states - hidden_states.mean(dim=1, keepdim=True)).float().square().sum(dim=-1)
    return distances.topk(number, dim=1).indices.sort(dim=1).values


__all__ = ["TokenPruning"]
