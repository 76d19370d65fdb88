# SPDX-License-Identifier: Apache-2.0
"""Proposals for `patch_nums`: the released schedules, and the rule that they follow for images of other sizes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .ranges import MOST_PIXELS, PositiveInt, checked
from .scales import normalize_patch_nums, normalize_size, scale_sizes


# Token maps of the models that VAR released, by resolution in pixels, of which 16 are a position of the grid. Switti has the
# same.
RELEASED_PATCH_NUMS = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
# From the side 4 on, the released sides grow by factors of 1.26, 1.41 and 1.32 on average.
USUAL_FACTOR = 4 / 3
LEAST_FACTOR, MOST_FACTOR = 1.2, 2.0
MOST_POSITIONS = 2**20
FIRST_SIDES = (1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Schedule:
    """
    A schedule of token maps.

    Args:
        patch_nums (`list`): Size of every map, coarse to fine, as configurations and recipes take it.
        reason (`str`): Where it comes from.
    """

    patch_nums: list[int | list[int]]
    reason: str

    @property
    def scale_lengths(self) -> list[int]:
        """Tokens of every scale."""
        return [height * width for height, width in scale_sizes(self.patch_nums)]

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return sum(self.scale_lengths)


def propose_schedules(
    image_size: int | Sequence[int], downsampling: int = 16, max_tokens: int | None = None
) -> list[Schedule]:
    """
    Propose `patch_nums` for images of a size: one schedule to begin with, and its neighbours with fewer and more tokens.

    The last map is the grid of the latents. Where VAR released a schedule for that grid (Tian et al. 2024,
    https://arxiv.org/abs/2404.02905: 16x16, 32x32 and 64x64), it is the first proposal. For other grids, the sides are 1, 2, 3
    and 4, and then grow by equal factors, those closest to 4/3, to the side of the grid. In maps of images that are not
    square, each map has the aspect ratio of the grid and about the area of the square one (Han et al. 2024,
    https://arxiv.org/abs/2412.04431, does so as well).

    Args:
        image_size (`int` or `Sequence[int]`): Side, or height and width, of the images in pixels.
        downsampling (`int`, *optional*, defaults to 16): Pixels that one position of the latents stands for, in each
            direction; a power of 2.
        max_tokens (`int`, *optional*): Most tokens of an image. If the first proposal has more, the one with the most tokens
            that are not more takes its place.

    Returns:
        `list[Schedule]`: One to three schedules, the recommended one first.

    Raises:
        `ValueError`: If an argument is out of its range, the size is not a multiple of `downsampling`, or no schedule has so
            few tokens.

    Example:

    ```python
    >>> from hf_var.schedules import propose_schedules

    >>> propose_schedules(256)[0].patch_nums
    [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    >>> propose_schedules((64, 96), downsampling=16)[0].patch_nums
    [1, 2, [2, 4], [3, 5], [4, 6]]
    ```
    """
    grid = _grid(image_size, downsampling)
    max_tokens = checked("max_tokens", max_tokens, PositiveInt | None)
    candidates = _candidates(grid)
    usual = candidates[0]
    candidates.sort(key=lambda schedule: schedule.num_tokens)
    fitting = [entry for entry in candidates if max_tokens is None or entry.num_tokens <= max_tokens]
    if not fitting:
        raise ValueError(
            f"`max_tokens` must be at least {candidates[0].num_tokens} for a grid of {grid[0]}x{grid[1]}, whose last map alone "
            f"has {grid[0] * grid[1]}, got {max_tokens}. A tokenizer with a larger `downsampling` has a smaller grid."
        )
    place = fitting.index(usual) if usual in fitting else len(fitting) - 1
    return [fitting[place], *fitting[max(place - 1, 0) : place], *fitting[place + 1 : place + 2]]


def _grid(image_size: int | Sequence[int], downsampling: int) -> tuple[int, int]:
    """Height and width of the latents."""
    height, width = normalize_size("image_size", image_size)
    if checked("downsampling", downsampling, PositiveInt) & (downsampling - 1):
        raise ValueError(
            f"`downsampling` must be a power of 2, as every level of a tokenizer halves the image, got {downsampling!r}."
        )
    if height * width > MOST_PIXELS:
        raise ValueError(f"`image_size` must be at most {MOST_PIXELS} pixels, got {height}x{width}.")
    if height % downsampling or width % downsampling:
        counts = (
            (height // downsampling, width // downsampling),
            (-(-height // downsampling), -(-width // downsampling)),
        )
        near = dict.fromkeys("x".join(str(max(count, 1) * downsampling) for count in sides) for sides in counts)
        raise ValueError(
            f"`image_size` must be a multiple of downsampling={downsampling} in both directions, such as {' or '.join(near)}, "
            f"got {height}x{width}."
        )
    grid = height // downsampling, width // downsampling
    if grid[0] * grid[1] > MOST_POSITIONS:
        raise ValueError(
            f"`image_size` must give a grid of at most {MOST_POSITIONS} positions, got {grid[0]}x{grid[1]}: more than attention "
            "over all tokens can do."
        )
    return grid


def _candidates(grid: tuple[int, int]) -> list[Schedule]:
    """Different schedules for a grid, the usual one first."""
    # The side of the square of the same area.
    side = math.sqrt(grid[0] * grid[1])
    growth = max(side / FIRST_SIDES[-1], 1.0)
    # Steps from the side 4 on.
    fewest, usual, most = (
        round_steps(math.log(growth, factor))
        for factor, round_steps in ((MOST_FACTOR, math.ceil), (USUAL_FACTOR, round), (LEAST_FACTOR, math.floor))
    )
    steps = sorted(range(max(fewest, 1), max(most, fewest, 1) + 1), key=lambda number: abs(number - usual))
    plans = [(_sides(side, number), _rule(growth, number)) for number in steps]
    plans.append(
        (_doubled_sides(side), "sides that about double: fewer tokens for the last map than any released schedule has")
    )
    for numbers in RELEASED_PATCH_NUMS.values():
        if numbers[-1] == side:
            plans.insert(
                0, (list(numbers), f"VAR was released with these sides for a grid of {numbers[-1]}x{numbers[-1]}")
            )
    found: dict[str, Schedule] = {}
    for sides, reason in plans:
        schedule = Schedule(_maps(sides, grid), reason)
        found.setdefault(str(schedule.patch_nums), schedule)
    return list(found.values())


def _sides(end: float, num_steps: int) -> list[float]:
    """The first sides, and from 4 on equal factors to the end."""
    if end <= FIRST_SIDES[-1]:
        return [side for side in FIRST_SIDES if side < end] + [end]
    growth = end / FIRST_SIDES[-1]
    return [*FIRST_SIDES, *(FIRST_SIDES[-1] * growth ** (step / num_steps) for step in range(1, num_steps + 1))]


def _rule(growth: float, num_steps: int) -> str:
    """What [`_sides`] does, in words."""
    if growth == 1:
        return "every side from 1 to that of the grid"
    factor = growth ** (1 / num_steps)
    return f"sides 1, 2, 3 and 4, then factors of {factor:.2f}; released schedules have 1.26 to 1.41 on average"


def _doubled_sides(end: float) -> list[float]:
    halves = [end / 2**step for step in range(int(math.log2(end)) + 1)]
    return [1.0, *reversed(halves)]


def _maps(sides: Sequence[float], grid: tuple[int, int]) -> list[int | list[int]]:
    """Maps with the aspect ratio of the grid and about the area of squares of these sides, ending with the grid."""
    narrow = math.sqrt(min(grid) / max(grid))
    maps: list[tuple[int, int]] = []
    for side in sides:
        # Less than one position wide: a line of as many positions as the square has.
        short, long = (side * narrow, side / narrow) if side * narrow >= 1 else (1.0, side**2)
        narrower, wider = int(short + 0.5), int(long + 0.5)
        maps.append((narrower, wider) if grid[0] <= grid[1] else (wider, narrower))
    growing = [size for size, before in zip(maps[:-1], [(0, 0), *maps], strict=False) if size not in (before, grid)]
    return normalize_patch_nums([*growing, grid])


__all__ = ["RELEASED_PATCH_NUMS", "Schedule", "propose_schedules"]
