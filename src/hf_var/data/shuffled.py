# SPDX-License-Identifier: Apache-2.0
"""Endless batches of a data set with an index: a place in the order is a number."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .config import BatchArguments
from .rows import ItemReader, RowReader, Tally, collate, make_loader, rows_of


# So many broken images in a row, drawn at random, are no accident.
MOST_REPLACEMENTS = 100


class ShuffledRows:
    """
    An endless shuffled walk through a data set: item `position` is an item of epoch `position // length`, and its place
    in the shuffled order, its augmentation and what replaces it if it is broken follow from `seed` and `position` alone.
    A run can therefore be resumed at any position without a state, whatever was prefetched and however many processes
    load.

    Args:
        dataset (`datasets.Dataset`): The rows.
        read_row ([`RowReader`]): How a row becomes an item.
        seed (`int`): Seed of the order and of the augmentation.
    """

    def __init__(self, dataset: datasets.Dataset, read_row: RowReader, seed: int):
        self.dataset: Any = read_row.prepare(dataset)
        self.seed = seed
        self._reader = ItemReader(read_row, (seed,))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def read(self, positions: Sequence[int]) -> tuple[list[dict[str, Any]], Tally]:
        """The items at `positions`, and how many images were looked at for them."""
        self._reader.tally = tally = Tally()
        rows = rows_of(self.dataset[[self._row_index(position) for position in positions]])
        items = []
        for row, position in zip(rows, positions, strict=True):
            item = self._reader.read(row, position)
            items.append(self._replacement(position, tally) if item is None else item)
        return items, tally

    def _row_index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return int(self._order[place])

    def _replacement(self, position: int, tally: Tally) -> dict[str, Any]:
        generator = np.random.default_rng((self.seed, position, 1))
        for index in generator.integers(len(self.dataset), size=MOST_REPLACEMENTS).tolist():
            item = self._reader.read(self.dataset[index], position)
            if item is not None:
                return item
        raise ValueError(
            f"{MOST_REPLACEMENTS} images drawn one after the other cannot be read. The last one: {tally.last_reason}"
        )


class ShuffledBatches(Dataset):
    """
    The batches of one process out of several, which take turns: batch `number` of process `index` is batch
    `number * num_processes + index` of all. Two processes thus see in one step what one process sees in two.

    Args:
        dataset (`datasets.Dataset`): The rows.
        read_row ([`RowReader`]): How a row becomes an item.
        args ([`BatchArguments`]): The arguments.
        process_index (`int`): This process.
        num_processes (`int`): Number of processes.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        read_row: RowReader,
        args: BatchArguments,
        process_index: int,
        num_processes: int,
    ):
        self.rows = ShuffledRows(dataset, read_row, args.seed)
        self.batch_size = args.train_batch_size
        self.num_workers = args.dataloader_num_workers
        self.process_index = process_index
        self.num_processes = num_processes
        self.batches_yielded = 0

    def __getitem__(self, number: int) -> tuple[dict[str, torch.Tensor], Tally]:
        first = (number * self.num_processes + self.process_index) * self.batch_size
        items, tally = self.rows.read(range(first, first + self.batch_size))
        return collate(items), tally

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], Tally]]:
        for batch, tally in make_loader(self, self.num_workers, itertools.count(self.batches_yielded)):
            self.batches_yielded += 1
            yield batch, tally

    def position(self) -> dict[str, Any]:
        """Where the walk stands after the last batch that was yielded."""
        return {"images": self.batches_yielded * self.batch_size * self.num_processes}

    def load_positions(self, positions: list[dict[str, Any]]) -> None:
        """Go to where [`~ShuffledBatches.position`] was, which is the same in all processes, however many they were."""
        images = positions[0]["images"]
        images_per_round = self.batch_size * self.num_processes
        if images % images_per_round:
            raise ValueError(
                f"The checkpoint was made after {images} images, which is no multiple of `train_batch_size` x processes "
                f"= {images_per_round}."
            )
        self.batches_yielded = images // images_per_round

    def first_items(self, number: int) -> tuple[dict[str, torch.Tensor], Tally]:
        """The first `number` items of all processes' walk as one batch."""
        items, tally = self.rows.read(range(number))
        return collate(items), tally
