# SPDX-License-Identifier: Apache-2.0
"""A bound on the keys and values that the layers of a VAR transformer keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..ranges import CheckedFields, PositiveInt, checked
from .configuration_blocks import BlocksMixin
from .layer_hooks import LayerCall, LayerHook


@dataclass
class CacheBudget(LayerHook, CheckedFields):
    r"""
    Bounds the keys and values that each head keeps after each scale: those stay to which the queries of the scale pay most
    attention, as in SnapKV ([Li et al. 2024](https://huggingface.co/papers/2404.14469)).

    Attention is averaged over at most `num_queries` queries, in equal steps over the scale. ScaleKV ([Li et al. 2025](https://huggingface.co/papers/2505.19602))
    gives layers budgets of their own, from a calibration; for such budgets, override [`~CacheBudget.budget`].

    Args:
        max_keys (`int` or `list[int]`): Keys that are kept, one number or one for each scale.
        num_queries (`int`, *optional*, defaults to 32): Queries whose attention counts.

    Raises:
        `ValueError`: If a number is out of range, there is not one for each scale, or the model keeps no keys.
    """

    max_keys: Any
    num_queries: PositiveInt = 32

    def __post_init__(self) -> None:
        is_list = isinstance(self.max_keys, Sequence) and not isinstance(self.max_keys, str)
        self.max_keys = checked("max_keys", self.max_keys, Sequence[PositiveInt] if is_list else PositiveInt)
        super().__post_init__()

    def check(self, config: BlocksMixin) -> None:
        self.__post_init__()
        num_scales = len(config.scale_sizes)
        if isinstance(self.max_keys, list) and len(self.max_keys) != num_scales:
            raise ValueError(
                f"`max_keys` must be one number or {num_scales}, one for each scale, got {len(self.max_keys)}."
            )
        if not config.is_causal:
            raise ValueError("`CacheBudget` needs a model that keeps keys and values, got one with is_causal=False.")

    def budget(self, call: LayerCall) -> int:
        """
        The number of keys that a layer keeps after a scale.

        Args:
            call ([`LayerCall`]): The layer and the scale.

        Returns:
            `int`, at least 1.
        """
        return self.max_keys[call.scales[-1]] if isinstance(self.max_keys, list) else self.max_keys

    def keep_keys(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, call: LayerCall
    ) -> torch.Tensor | None:
        budget = checked("budget", self.budget(call), PositiveInt)
        if key.shape[2] <= budget:
            return None
        # Where a call reads several scales, those of the last one.
        query = query[:, :, -call.config.scale_lengths[call.scales[-1]] :]
        length = query.shape[2]
        places = torch.linspace(0, length - 1, min(length, self.num_queries), device=query.device).round().long()
        scores = query[:, :, places] @ key.mT * scaling  # (batch, heads, queries, keys)
        attention = functional.softmax(scores, dim=-1, dtype=torch.float32).mean(dim=2)
        return attention.topk(budget, dim=-1).indices.sort(dim=-1).values


__all__ = ["CacheBudget"]
