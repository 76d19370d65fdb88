# SPDX-License-Identifier: Apache-2.0
"""The schedule of token maps that both stages share: `patch_nums` as sizes, lengths and bounds."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any


PatchNums = Sequence[int | Sequence[int]]


def check_positive_integers(**values) -> None:
    """Raise a `ValueError` which names the first of `values` that is not an integer of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_fractions(**values) -> None:
    """Raise a `ValueError` which names the first of `values` that is not a number in `[0, 1)`."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise ValueError(f"`{name}` must be a number of at least 0 and below 1, got {value!r}.")


def check_weights(**values) -> None:
    """Raise a `ValueError` which names the first of `values` that is not a number of at least 0."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
            raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}.")


def normalize_patch_nums(patch_nums: PatchNums) -> list[int | list[int]]:
    """
    `patch_nums` as JSON gives it back: a list of integers (square maps) and `[height, width]` lists.

    Raises:
        `ValueError`: If it is empty, has an entry that is neither a positive integer nor a pair of them, or if the
            last map is not the largest one (it is the grid that all coarser maps are enlarged to).
    """
    if not isinstance(patch_nums, Sequence) or isinstance(patch_nums, str) or len(patch_nums) == 0:
        raise ValueError(
            f"`patch_nums` must be a list with the size of every scale, coarse to fine, got {patch_nums!r}."
        )
    entries: list[int | list[int]] = []
    for entry in patch_nums:
        sides = [entry, entry] if isinstance(entry, int) else entry
        valid = isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == 2
        if not valid or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
            raise ValueError(
                f"`patch_nums` must hold positive integers or (height, width) pairs of them, got the entry {entry!r} "
                f"in {list(patch_nums)}."
            )
        entries.append(sides[0] if sides[0] == sides[1] else list(sides))
    sizes = scale_sizes(entries)
    if any(height > sizes[-1][0] or width > sizes[-1][1] for height, width in sizes):
        raise ValueError(
            f"`patch_nums` must end with its largest map, since that is the grid of the latents, got {list(patch_nums)}."
        )
    return entries


def scale_sizes(patch_nums: PatchNums) -> list[tuple[int, int]]:
    """`(height, width)` of the token map of every scale."""
    return [(entry, entry) if isinstance(entry, int) else (entry[0], entry[1]) for entry in patch_nums]


def bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First position and position past the last of consecutive pieces of these lengths."""
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


class ScheduleMixin:
    """What the configurations of both stages share: values that follow from `patch_nums`, and checks while loading."""

    patch_nums: Any

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        # transformers would set overrides on the finished object, past its checks. `dtype` is transformers' own affair.
        names = (vars(cls)["__dataclass_fields__"].keys() - {"dtype"}) & kwargs.keys()
        overrides = {name: kwargs.pop(name) for name in names}
        return super().from_dict({**config_dict, **overrides}, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def scale_sizes(self) -> list[tuple[int, int]]:
        """`(height, width)` of the token map of every scale."""
        return scale_sizes(self.patch_nums)

    @property
    def scale_lengths(self) -> list[int]:
        """Tokens of every scale."""
        return [height * width for height, width in self.scale_sizes]
