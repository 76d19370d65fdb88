# SPDX-License-Identifier: Apache-2.0
"""The batches of a validation."""

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .config import BatchArguments
from .rows import ItemReader, RowReader, Tally, collate, make_loader, rows_of
from .sources import AnyDataset
from .streamed import fit_readers, part_of_stream


Loaded = tuple[dict[str, torch.Tensor] | None, Tally]


class ValidationBatches:
    """
    All rows once, in their order, in batches that the processes take in turn: each row in one process, none twice, so that
    some processes may have a batch more than others, and the last batch may be smaller. Every iterator begins anew.

    A stream without `max_images` that several processes or workers read is split by shards instead.

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows.
        read_row ([`RowReader`]): How a row becomes an item: [`image_rows`] or [`codes_rows`].
        args ([`BatchArguments`]): `train_batch_size`, `dataloader_num_workers` and `max_broken_share`.
        process_index (`int`, *optional*, defaults to 0): This process.
        num_processes (`int`, *optional*, defaults to 1): Number of processes.
        max_images (`int`, *optional*): Only the first rows, so many in all processes together.

    Raises:
        `ValueError`: While iterating, if too many images cannot be read.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        read_row: RowReader,
        args: BatchArguments,
        process_index: int = 0,
        num_processes: int = 1,
        max_images: int | None = None,
    ):
        if max_images is not None and max_images < 1:
            raise ValueError(f"`max_images` must be at least 1, got {max_images}.")
        self.max_broken_share = args.max_broken_share
        self.num_workers = args.dataloader_num_workers
        if max_images is not None and not isinstance(dataset, datasets.Dataset):
            # Every reader of a stream's first rows reads them all.
            self.num_workers = min(self.num_workers, 1)
        self._tally = Tally()
        prepared: Any = read_row.prepare(dataset)
        self._numbers: range | None = None
        self._batches: Dataset
        if isinstance(dataset, datasets.Dataset):
            length = len(dataset) if max_images is None else min(max_images, len(dataset))
            self._batches = _IndexedBatches(prepared, read_row, args.train_batch_size, length)
            self._numbers = range(process_index, -(-length // args.train_batch_size), num_processes)
        else:
            if max_images is None:
                prepared, possible = fit_readers(prepared, self.num_workers, num_processes)
                self.num_workers = min(self.num_workers, possible)
            readers = max(self.num_workers, 1)
            first_reader, num_readers = process_index * readers, num_processes * readers
            self._batches = _StreamedBatches(
                prepared, read_row, args.train_batch_size, first_reader, num_readers, max_images
            )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._tally = Tally()
        for batch, tally in make_loader(self._batches, self.num_workers, self._numbers):
            self._tally.add(tally)
            self._tally.check(self.max_broken_share)
            if batch is not None:
                yield batch

    @property
    def images_seen(self) -> int:
        """Images that this process looked at in the last pass, the broken ones among them."""
        return self._tally.seen

    @property
    def broken_images(self) -> int:
        """Images among them that could not be read."""
        return self._tally.broken


class _IndexedBatches(Dataset):
    def __init__(self, dataset: datasets.Dataset, read_row: RowReader, batch_size: int, length: int):
        self.dataset = dataset
        self.read_row = read_row
        self.batch_size = batch_size
        self.length = length

    def __getitem__(self, number: int) -> Loaded:
        first = number * self.batch_size
        columns: Any = self.dataset[first : min(first + self.batch_size, self.length)]
        return _read_batch(columns, self.read_row)


class _StreamedBatches(IterableDataset):
    def __init__(
        self,
        dataset: datasets.IterableDataset,
        read_row: RowReader,
        batch_size: int,
        first_reader: int,
        num_readers: int,
        max_images: int | None,
    ):
        self.dataset = dataset
        self.read_row = read_row
        self.batch_size = batch_size
        self.first_reader = first_reader
        self.num_readers = num_readers
        self.max_images = max_images

    def __iter__(self) -> Iterator[Loaded]:
        info = get_worker_info()
        reader = self.first_reader + (0 if info is None else info.id)
        if self.max_images is None:
            # Not through iter(), which would split between the workers a second time.
            batches = part_of_stream(self.dataset, reader, self.num_readers).iter(self.batch_size)
        else:
            # The first rows are the same however many read them, at the price that all readers pass over them.
            whole = self.dataset.take(self.max_images).iter(self.batch_size)
            batches = itertools.islice(whole, reader, None, self.num_readers)
        for columns in batches:
            yield _read_batch(columns, self.read_row)


def _read_batch(columns: dict[str, Any], read_row: RowReader) -> Loaded:
    # Nothing is drawn: validation does not augment.
    reader = ItemReader(read_row, seed=())
    items = [reader.read(row, number=0) for row in rows_of(columns)]
    readable = [item for item in items if item is not None]
    return (collate(readable) if readable else None), reader.tally
