# SPDX-License-Identifier: Apache-2.0
"""Less memory for the tokenizer: image by image, and large images tile by tile."""

from collections.abc import Callable
from itertools import product
from typing import Annotated

import torch

from ..ranges import Interval, PositiveInt, checked


class SlicingAndTilingMixin:
    """The memory options of diffusers' autoencoders, with the same names."""

    use_slicing: bool = False
    use_tiling: bool = False
    tile_sample_min_size: int = 256
    tile_overlap_factor: float = 0.25

    def enable_slicing(self) -> None:
        """Encode and decode the images of a batch one after the other: the same results, with the memory of one image."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once again."""
        self.use_slicing = False

    def enable_tiling(self, tile_sample_min_size: int = 256, tile_overlap_factor: float = 0.25) -> None:
        """
        Decode images that are larger than a tile in tiles that overlap and are blended.

        The latents and the coarsest level are decoded as a whole, and so are all levels up to the finest that has
        attention (`VQVAEConfig.attention_levels`); only the levels after it, which take most of the memory, are tiled.
        They normalise over the whole map, and in tiles only over the tile. A tiled image therefore has no steps at the
        seams, but differs from the whole one, more so with smaller tiles. Images that fit a tile do not change.
        Encoding is never tiled, because other features would give other codes.

        Args:
            tile_sample_min_size (`int`, *optional*, defaults to 256): Height and width of a tile in pixels.
            tile_overlap_factor (`float`, *optional*, defaults to 0.25):
                Share of a tile that the next one overlaps, at least 0 and at most 0.5.

        Raises:
            `ValueError`: If an argument is out of its range.
        """
        tile_sample_min_size = checked("tile_sample_min_size", tile_sample_min_size, PositiveInt)
        overlap = checked(
            "tile_overlap_factor", tile_overlap_factor, Annotated[float, Interval(minimum=0, maximum=0.5)]
        )
        self.use_tiling = True
        self.tile_sample_min_size = tile_sample_min_size
        self.tile_overlap_factor = overlap

    def disable_tiling(self) -> None:
        """Decode images as a whole again."""
        self.use_tiling = False

    def _copy_options(self, other: "SlicingAndTilingMixin") -> None:
        """Give `other` the same options."""
        for name in ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_overlap_factor"):
            setattr(other, name, getattr(self, name))

    def _map_slices(self, function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and inputs.shape[0] > 1:
            return torch.cat([function(part) for part in inputs.split(1)])
        return function(inputs)


def map_tiles(
    function: Callable[[torch.Tensor], torch.Tensor],
    maps: torch.Tensor,
    upsampling_factor: int,
    tile_size: int,
    overlap: int,
) -> torch.Tensor:
    """
    Apply `function` to overlapping tiles of `maps` and blend the results linearly where they overlap.

    Args:
        function (`Callable`): From `(batch, channels, h, w)` to maps `upsampling_factor` times as high and wide.
        maps (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Its whole input.
        upsampling_factor (`int`): How much larger the results are.
        tile_size (`int`): Height and width of the tiles, in positions of `maps`.
        overlap (`int`): Positions that neighbours have in common at least.

    Returns:
        `torch.FloatTensor`: `function(maps)`, exactly if one tile holds all.
    """
    height, width = maps.shape[-2:]
    rows, columns = _tiles(height, tile_size, overlap), _tiles(width, tile_size, overlap)
    if len(rows) == len(columns) == 1:
        return function(maps)
    places = list(product(rows, columns))
    tiles = [function(maps[..., top:bottom, left:right]) for (top, bottom), (left, right) in places]
    factor = upsampling_factor
    # In fp32: half precision would show steps along the seams.
    blended = torch.zeros(*tiles[0].shape[:2], height * factor, width * factor, device=maps.device)
    total = torch.zeros(blended.shape[-2:], device=maps.device)
    for tile, ((top, bottom), (left, right)) in zip(tiles, places, strict=True):
        row_weights = _ramp(top, bottom, height, overlap, factor, maps.device)
        column_weights = _ramp(left, right, width, overlap, factor, maps.device)
        weights = row_weights[:, None] * column_weights  # (tile height, tile width)
        region = (..., slice(top * factor, bottom * factor), slice(left * factor, right * factor))
        blended[region] += tile * weights
        total[region] += weights
    return (blended / total).to(tiles[0].dtype)  # (batch, channels, height * factor, width * factor)


def _tiles(size: int, tile_size: int, overlap: int) -> list[tuple[int, int]]:
    """Begin and end of tiles of equal size that cover `size` positions: the last one ends with them."""
    if size <= tile_size:
        return [(0, size)]
    begins = [*range(0, size - tile_size, tile_size - overlap), size - tile_size]
    return [(begin, begin + tile_size) for begin in begins]


def _ramp(begin: int, end: int, size: int, overlap: int, factor: int, device: torch.device) -> torch.Tensor:
    """Weights of a tile's pixels along one axis: 1 inside, falling to both edges that have a neighbour."""
    pixels = torch.arange((end - begin) * factor, device=device) + 0.5
    weights = torch.ones_like(pixels)
    width = max(overlap * factor, 1)
    if begin > 0:
        weights = torch.minimum(weights, pixels / width)
    if end < size:
        weights = torch.minimum(weights, pixels.flip(0) / width)
    return weights
