# SPDX-License-Identifier: Apache-2.0
"""Reading a data set with an index: a place in it, or in the endless shuffled walk through it, is a number."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset

from .config import DataConfig
from .rows import ItemReader, Loaded, RowReader, Tally, collate, make_loader, rows_of


# This many broken images in a row, chosen at random, indicate a fault of the data set.
MOST_REPLACEMENTS = 100


class IndexedRows(Dataset):
    """Batches by the range of their rows, in order, without broken ones; random numbers follow from seed and row."""

    def __init__(self, dataset: datasets.Dataset, read_row: RowReader, seed: int = 0):
        self.dataset: Any = read_row.prepare(dataset)
        self.seed = seed
        self.reader = ItemReader(read_row, seed)

    def __getitem__(self, rows: range) -> Loaded:
        return self.reader.read_batch(self.dataset[rows.start : rows.stop], rows.start)


class ShuffledRows(IndexedRows):
    """Batches by the range of their positions in an endless shuffled walk, of which `seed` and position decide all."""

    _epoch = -1
    _order = np.empty(0, dtype=np.int64)

    def __getitem__(self, positions: Sequence[int]) -> Loaded:
        self.reader.tally = tally = Tally()
        rows = rows_of(self.dataset[[self._row_index(position) for position in positions]])
        items = []
        for row, position in zip(rows, positions, strict=True):
            item = self.reader.read(row, position)
            items.append(self._replacement(position) if item is None else item)
        return Loaded(collate(items), tally)

    def _row_index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return int(self._order[place])

    def _replacement(self, position: int) -> dict[str, Any]:
        generator = np.random.default_rng((self.seed, position, 1))
        for index in generator.integers(len(self.dataset), size=MOST_REPLACEMENTS).tolist():
            item = self.reader.read(self.dataset[index], position)
            if item is not None:
                return item
        raise ValueError(
            f"{MOST_REPLACEMENTS} images chosen one after the other cannot be read. The last one: "
            f"{self.reader.tally.last_reason}"
        )


class IndexedBatches:
    """The endless batches of one process; two processes see in one step what one process sees in two."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        read_row: RowReader,
        config: DataConfig,
        seed: int,
        process_index: int,
        num_processes: int,
    ):
        self.rows = ShuffledRows(dataset, read_row, seed)
        self.batch_size = config.train_batch_size
        self.num_workers = config.dataloader_num_workers
        self.process_index = process_index
        self.num_processes = num_processes
        self.batches_yielded = 0

    def __iter__(self) -> Iterator[Loaded]:
        numbers = itertools.count(self.batches_yielded * self.num_processes + self.process_index, self.num_processes)
        batches = (range(number * self.batch_size, (number + 1) * self.batch_size) for number in numbers)
        for loaded in make_loader(self.rows, self.num_workers, batches):
            self.batches_yielded += 1
            yield loaded

    def position(self) -> dict[str, Any]:
        """Position of the walk after the last batch that was yielded."""
        return {"images": self.batches_yielded * self.batch_size * self.num_processes}

    def load_positions(self, positions: list[dict[str, Any]]) -> None:
        """Go to where [`~IndexedBatches.position`] was, which is the same in all processes, however many they were."""
        images = positions[0]["images"]
        images_per_round = self.batch_size * self.num_processes
        if images % images_per_round:
            raise ValueError(
                f"The checkpoint was made after {images} images, which is not a multiple of `train_batch_size` x processes "
                f"= {images_per_round}."
            )
        self.batches_yielded = images // images_per_round

    def first_items(self, number: int) -> Loaded:
        """The first `number` items of all processes' walk as one batch."""
        return self.rows[range(number)]
