# SPDX-License-Identifier: Apache-2.0
"""The schedule of token maps that both stages share: `patch_nums` as sizes, lengths and bounds."""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral
from typing import Annotated, Any

from .ranges import Interval, check_fields, checked


PatchNums = Sequence[int | Sequence[int]]
# transformers makes a name for every label.
NumLabels = Annotated[int, Interval(minimum=0, maximum=2**20)]
# How guidance grows over the scales: from 1 at the first one, or not at all.
GUIDANCE_RULES = ("linear", "constant")


def normalize_patch_nums(patch_nums: PatchNums) -> list[int | list[int]]:
    """
    `patch_nums` as JSON gives it back: a list of integers (square maps) and `[height, width]` lists.

    Raises:
        `ValueError`: If it is empty, has an entry that is neither a positive integer nor a pair of them, or if the
            last map is not the largest one (it is the grid that all coarser maps are enlarged to).
    """
    if not _is_list(patch_nums) or len(patch_nums) == 0:
        raise ValueError(
            f"`patch_nums` must be a list with the size of every scale, coarse to fine, got {patch_nums!r}."
        )
    entries: list[int | list[int]] = []
    for entry in patch_nums:
        sides: Any = [entry, entry] if isinstance(entry, Integral) else entry
        if not (_is_list(sides) and len(sides) == 2 and all(_is_length(side) for side in sides)):
            raise ValueError(
                f"`patch_nums` must hold positive integers or (height, width) pairs of them, got the entry {entry!r} "
                f"in {list(patch_nums)}."
            )
        height, width = map(int, sides)
        entries.append(height if height == width else [height, width])
    sizes = scale_sizes(entries)
    if any(height > sizes[-1][0] or width > sizes[-1][1] for height, width in sizes):
        raise ValueError(
            f"`patch_nums` must end with its largest map, since that is the grid of the latents, got {list(patch_nums)}."
        )
    return entries


def normalize_size(name: str, size: Any) -> tuple[int, int]:
    """`(height, width)` of an integer or a pair, the field `name` of a configuration."""
    sides: Any = [size, size] if isinstance(size, Integral) else size
    if not (_is_list(sides) and len(sides) == 2 and all(_is_length(side) for side in sides)):
        raise ValueError(f"`{name}` must be a positive integer or a (height, width) pair of them, got {size!r}.")
    return int(sides[0]), int(sides[1])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_length(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def scale_sizes(patch_nums: PatchNums) -> list[tuple[int, int]]:
    """`(height, width)` of the token map of every scale."""
    return [(entry, entry) if isinstance(entry, int) else (entry[0], entry[1]) for entry in patch_nums]


def bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First position and position past the last of consecutive pieces of these lengths."""
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


class ScheduleMixin:
    """What the configurations of both stages share: values that follow from `patch_nums`, and the checks of all fields."""

    patch_nums: Any

    def __post_init__(self, **kwargs) -> None:
        for name in ("id2label", "label2id"):
            checked(name, getattr(self, name), dict | None)
        if "num_labels" in kwargs:
            kwargs["num_labels"] = checked("num_labels", kwargs["num_labels"], NumLabels | None)
        for name in kwargs:
            known = inspect.getattr_static(type(self), name, None)
            if isinstance(known, property) and known.fset is None:
                raise ValueError(f"`{name}` follows from other fields of {type(self).__name__}, leave it out.")
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        check_fields(self)
        # Some schedules follow from other fields.
        if not isinstance(inspect.getattr_static(type(self), "patch_nums"), property):
            self.patch_nums = normalize_patch_nums(self.patch_nums)

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
