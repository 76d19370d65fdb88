# SPDX-License-Identifier: Apache-2.0
"""From rows to batches: reading rows as items, counting the broken ones, stacking, loading in other processes."""

import random
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..image_decoding import BrokenImageError, normalize_pixels
from .sources import AnyDataset


# The share of broken images is not checked before this many images were read.
FEWEST_IMAGES_SEEN = 100


class RowReader(Protocol):
    """Turns a row into an item, a dictionary of arrays and numbers. Raises a [`BrokenImageError`] if there is none."""

    @property
    def is_random(self) -> bool:
        """Whether it takes random numbers from its generator."""
        ...

    def prepare(self, dataset: AnyDataset) -> AnyDataset:
        """The columns of `dataset` that are needed, stored as they are needed."""
        ...

    def __call__(self, row: dict[str, Any], generator: random.Random) -> dict[str, Any]: ...


@dataclass
class Tally:
    """Numbers of images that a process read, and of broken ones among these."""

    seen: int = 0
    broken: int = 0
    last_reason: str | None = None

    def add(self, other: "Tally") -> None:
        self.seen += other.seen
        self.broken += other.broken
        self.last_reason = other.last_reason or self.last_reason

    def check(self, max_broken_share: float) -> None:
        """Raise a `ValueError` if the share of broken images is too high."""
        if self.seen >= FEWEST_IMAGES_SEEN and self.broken > max_broken_share * self.seen:
            raise ValueError(
                f"{self.broken} of {self.seen} images cannot be read, more than `max_broken_share` = "
                f"{max_broken_share}. The last one: {self.last_reason}"
            )


class Loaded(NamedTuple):
    """A batch, `None` if none of its images can be read, and the counts of the images that were read for it."""

    batch: dict[str, torch.Tensor] | None
    tally: Tally


class ItemReader:
    """Reads rows and counts the broken ones. Random numbers follow from `seed` and the row's number below 2**64."""

    def __init__(self, read_row: RowReader, *seed: int):
        self.read_row = read_row
        self.tally = Tally()
        self._seed = sum(number << (64 * place) for place, number in enumerate(seed, start=1))
        self._generator = random.Random()

    def read(self, row: dict[str, Any], number: int) -> dict[str, Any] | None:
        """The item of a row, or `None` if it is broken."""
        if self.read_row.is_random:
            self._generator.seed(self._seed + number)
        self.tally.seen += 1
        try:
            return self.read_row(row, self._generator)
        except BrokenImageError as error:
            self.tally.broken += 1
            self.tally.last_reason = str(error)
            return None

    def read_batch(self, columns: dict[str, Any], first: int) -> Loaded:
        """The readable items of a batch of `datasets`, whose rows are numbered from `first` on."""
        self.tally = Tally()
        items = [self.read(row, number) for number, row in enumerate(rows_of(columns), start=first)]
        return Loaded(collate([item for item in items if item is not None]), self.tally)


def rows_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch of `datasets` as single rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor] | None:
    """A batch of items, all `pixel_values` in `[-1, 1]` or ids of class maps as they are; `None` without items."""
    if not items:
        return None
    # Stacking keeps the order of axes in memory, which differs between images and arrays.
    batch = {
        name: torch.from_numpy(np.ascontiguousarray(np.stack([item[name] for item in items]))) for name in items[0]
    }
    for name, values in batch.items():
        if name.endswith("pixel_values") and (values.dtype == torch.uint8 or values.is_floating_point()):
            batch[name] = normalize_pixels(values)
    return batch


def make_loader(dataset: Dataset, num_workers: int, keys: Iterable[Any] | None = None) -> DataLoader:
    """The elements of `dataset` as they are, all or those of `keys`, prepared by `num_workers` processes."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=cast(Any, keys),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        # Launchers send SIGTERM to all processes; the loading ones ignore it and end together with their parent.
        worker_init_fn=_ignore_sigterm,
        # Without its own generator, an iterator takes a number from torch's default one, and a resumed run takes one more.
        generator=torch.Generator(),
    )


def _as_it_is(element: Any) -> Any:
    return element


def _ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
