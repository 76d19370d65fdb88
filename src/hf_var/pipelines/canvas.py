# SPDX-License-Identifier: Apache-2.0
"""What a call of raster order fills: maps of codes at the size of the images, with those that are given."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch.nn import functional

from ..autoencoders import TokenizerConfig
from ..priors import RQTransformerConfig
from .checks import as_tensor, check_code_range, is_number
from .editing import known_latents
from .raster import RasterOrder


@dataclass(frozen=True)
class Canvas:
    """
    The codes of images of the tokenizer `vqvae`, which has their size, in an `order`. The first ones may be `given`
    `(batch, n)`, in this order. `size` is that of a map larger than the prior's, over which its window moves, and the
    condition with it if `moves_condition`.
    """

    vqvae: Any
    order: RasterOrder
    given: torch.Tensor | None = None
    size: tuple[int, int] | None = None
    moves_condition: bool = False

    def latents(self, sampled: torch.Tensor) -> Any:
        """The latents of the first codes of the order, `(batch, n)`; the vectors of others are zeros."""
        missing = len(self.order.places) - sampled.shape[1]
        codes = self.order.codes(functional.pad(sampled, (0, missing)))
        if missing == 0:
            return self.vqvae.latents(codes)
        known = functional.pad(torch.ones_like(sampled[:1]), (0, missing))
        return known_latents(self.vqvae, codes, self.order.codes(known)[0])


def make_canvas(
    vqvae: Any,
    prior: Any,
    codes: torch.Tensor | None = None,
    num_given_rows: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Canvas:
    """The canvas of a call, see [`ARPipeline.__call__`]; `prior` is the configuration of the prior."""
    is_stacked, size = isinstance(prior, RQTransformerConfig), None
    own = vqvae.config.image_size
    wanted = own[0] if height is None else height, own[1] if width is None else width
    if wanted != own:
        if not is_stacked:
            raise ValueError(
                f"`height` and `width` must be {own[0]} and {own[1]}: only an `RQTransformer` samples larger images, got "
                f"{height} and {width}."
            )
        if not all(is_number(side, Integral) and side >= least for side, least in zip(wanted, own, strict=True)):
            raise ValueError(f"`height` and `width` must be at least {own[0]} and {own[1]}, got {height} and {width}.")
        vqvae = vqvae.at_size(*wanted)
        size = vqvae.config.scale_sizes[0]
    sizes = vqvae.config.scale_sizes
    order = RasterOrder(sizes[:1], prior.depth) if is_stacked else RasterOrder(sizes)
    return Canvas(vqvae, order, _given(codes, num_given_rows, order, vqvae.config), size)


def _given(
    codes: Any, num_given_rows: int | None, order: RasterOrder, tokenizer: TokenizerConfig
) -> torch.Tensor | None:
    """The first codes of the order, `(batch, n)`, that are given."""
    if codes is None:
        if num_given_rows is not None:
            raise ValueError(f"`num_given_rows` = {num_given_rows!r} needs `codes`.")
        return None
    found: Any = as_tensor(codes)
    length = len(order.places)
    if found is None or found.ndim != 2 or 0 in found.shape or found.shape[1] > length or found.shape[1] % order.depth:
        whole = f"a multiple of {order.depth}, " if order.depth > 1 else ""
        got = type(codes).__name__ if found is None else tuple(found.shape)
        raise ValueError(f"`codes` must have the shape (batch, n) with n {whole}at most {length}, got {got}.")
    sampled = order.sampled(check_code_range("codes", found, tokenizer.codebook_size))
    if num_given_rows is None:
        if sampled.shape[1] == length:
            raise ValueError("`num_given_rows` must say how many rows of the whole `codes` are kept.")
        return sampled
    if not is_number(num_given_rows, Integral) or not 0 <= num_given_rows < len(order.row_ends):
        raise ValueError(f"`num_given_rows` must be from 0 to {len(order.row_ends) - 1}, got {num_given_rows!r}.")
    end = order.row_ends[num_given_rows - 1] if num_given_rows > 0 else 0
    if end > sampled.shape[1]:
        raise ValueError(f"`codes` must hold {num_given_rows} rows, got {sampled.shape[1]} codes of {end}.")
    return sampled[:, :end]
