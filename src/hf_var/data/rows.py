# SPDX-License-Identifier: Apache-2.0
"""What all kinds of rows have in common: reading labels, counting what is broken, forming batches."""

import random
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .sources import AnyDataset


# A share says nothing before this many images were seen.
FEWEST_IMAGES_SEEN = 100


class BrokenImageError(Exception):
    """An image cannot be read. Says which and why."""


class RowReader(Protocol):
    """
    Turns a row into an item, a dictionary of arrays and numbers.

    Attributes:
        is_random (`bool`): Whether it draws from the generator that it is given.
    """

    is_random: bool

    def prepare(self, dataset: AnyDataset) -> AnyDataset:
        """The columns of `dataset` that are needed, stored as they are needed."""
        ...

    def __call__(self, row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
        """The item of a row. Raises a [`BrokenImageError`] if there is none."""
        ...


@dataclass
class Tally:
    """Images that a process looked at, and those of them that could not be read."""

    seen: int = 0
    broken: int = 0
    last_reason: str | None = None

    def add(self, other: "Tally") -> None:
        self.seen += other.seen
        self.broken += other.broken
        self.last_reason = other.last_reason or self.last_reason

    def check(self, max_broken_share: float) -> None:
        """Raise a `ValueError` if too many of a fair number of images are broken."""
        if self.seen >= FEWEST_IMAGES_SEEN and self.broken > max_broken_share * self.seen:
            raise ValueError(
                f"{self.broken} of {self.seen} images cannot be read, more than `max_broken_share` = "
                f"{max_broken_share}. The last one: {self.last_reason}"
            )


class ItemReader:
    """
    Reads rows one by one and counts the broken ones.

    Args:
        read_row ([`RowReader`]): How a row becomes an item.
        seed (`tuple[int, ...]`):
            Fixes, with the number that each row comes with, what is drawn for it. None negative.
    """

    def __init__(self, read_row: RowReader, seed: tuple[int, ...]):
        self.read_row = read_row
        self.tally = Tally()
        self._seed = sum(number << (64 * place) for place, number in enumerate(seed, start=1))
        self._generator = random.Random()

    def read(self, row: dict[str, Any], number: int) -> dict[str, Any] | None:
        """The item of a row, or `None` if it is broken. `number` is below 2**64."""
        if self.read_row.is_random:
            self._generator.seed(self._seed + number)
        self.tally.seen += 1
        try:
            return self.read_row(row, self._generator)
        except BrokenImageError as error:
            self.tally.broken += 1
            self.tally.last_reason = str(error)
            return None


def rows_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch of `datasets` as single rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def read_label(row: dict[str, Any], column: str, num_labels: int | None) -> int:
    """
    The label of a row.

    Raises:
        `ValueError`: If it is none of `num_labels` classes.
    """
    label = row[column]
    if not isinstance(label, (int, np.integer)):
        raise ValueError(f"`label_column` = {column!r} must hold integers, got {label!r}.")
    if label < 0 or (num_labels is not None and label >= num_labels):
        limit = "at least 0" if num_labels is None else f"from 0 to {num_labels - 1}"
        raise ValueError(f"`label_column` = {column!r} must hold labels {limit}, got {label}.")
    return int(label)


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of items, with `pixel_values` in `[-1, 1]`."""
    # Stacking keeps the order of axes in memory, which differs between images and arrays.
    batch = {
        name: torch.from_numpy(np.ascontiguousarray(np.stack([item[name] for item in items]))) for name in items[0]
    }
    if "pixel_values" in batch:
        batch["pixel_values"] = scale_pixels(batch["pixel_values"])
    return batch


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in `[-1, 1]`."""
    return pixels.float().div_(127.5).sub_(1)


def make_loader(dataset: Dataset, num_workers: int, numbers: Iterable[int] | None = None) -> DataLoader:
    """
    The elements of `dataset`, whole batches with what goes with them, prepared by `num_workers` processes.

    Args:
        dataset (`torch.utils.data.Dataset`): Batches by number, or an iterable of batches.
        num_workers (`int`): 0: this process prepares them.
        numbers (`Iterable[int]`, *optional*): Which batches, where they have numbers.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=cast(Any, numbers),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        # Launchers tell all processes that a machine is taken away; the loading ones end with the one they load for.
        worker_init_fn=_ignore_sigterm,
        # Without its own, an iterator takes a number from torch's default generator, and a resumed run has one more.
        generator=torch.Generator(),
    )


def _as_it_is(element: Any) -> Any:
    return element


def _ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
