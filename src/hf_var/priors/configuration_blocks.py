# SPDX-License-Identifier: Apache-2.0
"""What the configurations of transformers share that predict whole blocks of tokens, scale by scale."""

import math
from itertools import accumulate
from typing import Any

from ..ranges import PositiveFloat, PositiveInt
from ..scales import ScheduleMixin


class BlocksMixin(ScheduleMixin):
    """Values that follow from schedule and widths. A configuration may have other blocks than scales."""

    # Fields of the configurations.
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    layer_norm_eps: PositiveFloat
    latent_channels: PositiveInt
    codebook_size: PositiveInt
    initializer_range: PositiveFloat | None
    is_causal: Any

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return sum(self.scale_lengths)

    @property
    def block_lengths(self) -> list[int]:
        """Tokens of every block that one step predicts."""
        return self.scale_lengths

    @property
    def block_ends(self) -> list[int]:
        """Position past the last token of every block."""
        return list(accumulate(self.block_lengths))

    @property
    def is_raster(self) -> bool:
        """Whether tokens are predicted one by one, in raster order, instead of scale by scale."""
        return self.block_lengths != self.scale_lengths and set(self.block_lengths) == {1}

    @property
    def has_known_inputs(self) -> bool:
        """Whether the blocks are whole scales or single tokens: a tokenizer makes no inputs of other blocks."""
        return self.is_raster or self.block_lengths == self.scale_lengths

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def initial_std(self) -> float:
        """Standard deviation of the initial weights."""
        return math.sqrt(1 / (3 * self.hidden_size)) if self.initializer_range is None else self.initializer_range
