# SPDX-License-Identifier: Apache-2.0
"""The part of a call that predicts one code after the other: the order of the codes, and for each kind of prior the logits."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional
from transformers import DynamicCache

from ..priors import RowCache, RQTransformer, VARCache, VARTransformer
from ..priors.stacks import stack_codes, unstack_codes
from ..scales import bounds
from .sampling import apply_guidance


Arguments = Mapping[str, torch.Tensor]


class Place(NamedTuple):
    """Where a code of the order stands: its level for callbacks, its map for values per map, and whether it ends a row."""

    level: int
    k: int
    ends_row: bool


class RasterOrder:
    """
    The order in which codes are sampled: maps of `sizes` one after the other, each in rows, or if `depth` is above 1 the
    positions of the only size in rows, with all codes of a position next to each other.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], depth: int = 1):
        self.sizes, self.depth = list(sizes), depth
        self.places = [
            Place(level, level if depth == 1 else d, (column, d) == (width - 1, depth - 1))
            for level, (height, width) in enumerate(sizes)
            for _ in range(height)
            for column in range(width)
            for d in range(depth)
        ]
        self.row_ends = [number for number, place in enumerate(self.places, start=1) if place.ends_row]

    def codes(self, sampled: torch.Tensor) -> torch.Tensor:
        """The first codes of the order, `(batch, n)`, as the tokenizer orders them: whole positions, depth by depth."""
        return sampled if self.depth == 1 else unstack_codes(sampled.unflatten(1, (-1, self.depth)))

    def sampled(self, codes: torch.Tensor) -> torch.Tensor:
        """The inverse of `codes`."""
        return codes if self.depth == 1 else stack_codes(codes, self.depth).flatten(1)


class RasterPredictor(Protocol):
    """Predicts codes in a [`RasterOrder`]. The arguments of a prior have an unconditional second half of the batch if `guided`."""

    def logits(self, sampled: torch.Tensor, number: int, weight: float) -> torch.Tensor:
        """Logits `(batch, 1, codebook_size)` of the code `number`, given the first `number` of `sampled`, guided by `weight`."""
        ...


class LevelsPredictor:
    """Runs a [`PixelCNN`] or [`PixelSNAIL`] for each level over its rows; finer ones also read the coarser level's codes."""

    def __init__(self, priors: Sequence[Any], order: RasterOrder, arguments: Sequence[Arguments]):
        self.priors, self.order, self.arguments = priors, order, arguments
        self.bounds = bounds([height * width for height, width in order.sizes])
        self.cache, self.level = RowCache(), -1

    def logits(self, sampled: torch.Tensor, number: int, weight: float) -> torch.Tensor:
        level = self.order.places[number].level
        if level != self.level:
            self.cache, self.level = RowCache(), level
        begin, _ = self.bounds[level]
        row, column = divmod(number - begin, self.order.sizes[level][1])
        while self.cache.num_rows < row:
            self._read(sampled, self.cache.num_rows)
            self.cache.finish_rows()
        logits = self._read(sampled, row)[:, column : column + 1]
        return apply_guidance(logits, weight) if len(logits) > len(sampled) else logits

    def _read(self, sampled: torch.Tensor, row: int) -> torch.Tensor:
        (begin, _), (_, width) = self.bounds[self.level], self.order.sizes[self.level]
        arguments = self.arguments[self.level]
        codes = sampled[:, begin + row * width : begin + (row + 1) * width]
        condition = {}
        if self.level > 0:
            condition["condition_codes"] = sampled[:, slice(*self.bounds[self.level - 1])]
        num_halves = len(next(iter(arguments.values()))) // len(codes) if arguments else 1
        inputs = {name: values.repeat(num_halves, 1) for name, values in {"codes": codes, **condition}.items()}
        return self.priors[self.level](**inputs, **arguments, cache=self.cache).logits


class TokenPredictor:
    """
    Runs a [`VARTransformer`] of raster order, which reads the code vector of the token before (Esser et al. 2021): a row of
    `vectors` `(codebook_size, latent_channels)`.
    """

    def __init__(self, prior: VARTransformer, vectors: torch.Tensor, arguments: Arguments, guided: bool):
        self.prior, self.vectors, self.arguments, self.guided = prior, vectors, arguments, guided
        self.cache, self.num_read = VARCache(prior.config), 0

    def logits(self, sampled: torch.Tensor, number: int, weight: float) -> torch.Tensor:
        inputs = None
        if number > 0:
            unread = sampled[:, max(self.num_read - 1, 0) : number]
            inputs = functional.embedding(unread.repeat(2, 1) if self.guided else unread, self.vectors)
        # A cache remembers the condition after its first call.
        condition = self.arguments if self.num_read == 0 else {}
        logits = self.prior(**condition, scale_inputs=inputs, cache=self.cache).logits[:, -1:]
        self.num_read = number + 1
        return apply_guidance(logits, weight) if self.guided else logits


class StackPredictor:
    """
    Runs an [`RQTransformer`]: at each position one step over the positions, then one for each depth. It reads codes or, where
    these are given, their `vectors`.
    """

    def __init__(self, prior: RQTransformer, vectors: torch.Tensor | None, arguments: Arguments, guided: bool):
        self.prior: Any = prior
        self.arguments, self.guided = arguments, guided
        self.depth = prior.config.depth
        self.vectors = vectors
        self.cache, self.num_read = DynamicCache(), 0
        self.depth_cache, self.context = DynamicCache(), torch.empty(0)

    def logits(self, sampled: torch.Tensor, number: int, weight: float) -> torch.Tensor:
        position, depth = divmod(number, self.depth)
        if depth == 0:
            stacks = sampled[:, :number].unflatten(1, (position, self.depth))
            self.context, self.depth_cache = self._read(stacks), DynamicCache()
        inputs = self._inputs(sampled[:, position * self.depth : number]) if depth > 0 else {}
        logits = self.prior.predict_depth(self.context, **inputs, cache=self.depth_cache).unsqueeze(1)
        return apply_guidance(logits, weight) if self.guided else logits

    def _read(self, stacks: torch.Tensor) -> torch.Tensor:
        """The context `(batch, hidden)` of the position after `stacks` `(batch, positions, depth)`."""
        unread, is_first = stacks[:, self.num_read :], self.cache.get_seq_length() == 0
        self.num_read = stacks.shape[1]
        return self._step(unread, self.arguments if is_first else {}, self.cache)

    def _step(self, stacks: torch.Tensor, condition: Arguments, cache: DynamicCache) -> torch.Tensor:
        inputs = self._inputs(stacks) if stacks.shape[1] > 0 else {}
        return self.prior(**condition, **inputs, cache=cache).context[:, -1]

    def _inputs(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = codes.repeat(2, *[1] * (codes.ndim - 1)) if self.guided else codes
        return (
            {"codes": codes} if self.vectors is None else {"code_vectors": functional.embedding(codes, self.vectors)}
        )


class WindowPredictor(StackPredictor):
    """
    The same over a map that is larger than the prior's, of `size` `(height, width)`: each position is predicted in a window
    of the prior's size around it, which is read anew (Esser et al. 2021, section 3.3). If `moves_condition`, the condition is
    a map of the same size, of which the prior sees the same window.
    """

    def __init__(
        self,
        prior: RQTransformer,
        vectors: torch.Tensor | None,
        arguments: Arguments,
        guided: bool,
        size: tuple[int, int],
        moves_condition: bool,
    ):
        super().__init__(prior, vectors, arguments, guided)
        self.window, self.size, self.moves_condition = prior.config.scale_sizes[0], size, moves_condition

    def _read(self, stacks: torch.Tensor) -> torch.Tensor:
        row, column = divmod(stacks.shape[1], self.size[1])
        (top, local_row), (left, local_column) = (
            window_place(index, side, window)
            for index, side, window in zip((row, column), self.size, self.window, strict=True)
        )
        missing = self.size[0] * self.size[1] - stacks.shape[1]
        whole = functional.pad(stacks, (0, 0, 0, missing)).unflatten(1, self.size)
        number = local_row * self.window[1] + local_column
        seen = self._cut(whole, top, left)[:, :number]
        condition = dict(self.arguments)
        if self.moves_condition:
            # What stands for no condition is the same everywhere.
            maps = condition["condition_ids"].unflatten(1, self.size)
            condition["condition_ids"] = self._cut(maps, top, left)
        return self._step(seen, condition, DynamicCache())

    def _cut(self, maps: torch.Tensor, top: int, left: int) -> torch.Tensor:
        height, width = self.window
        return maps[:, top : top + height, left : left + width].flatten(1, 2)


def window_place(index: int, side: int, window: int) -> tuple[int, int]:
    """First row (or column) of the window of a row, and the row in it: the middle one, except near the map's edges."""
    first = min(max(index - window // 2, 0), side - window)
    return first, index - first
