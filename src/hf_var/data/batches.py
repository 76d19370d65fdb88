# SPDX-License-Identifier: Apache-2.0
"""The batches of a training and of its validation."""

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from .config import DataConfig
from .indexed import IndexedBatches, IndexedRows
from .rows import RowReader, Tally, make_loader
from .sources import AnyDataset
from .streamed import StreamedBatches, StreamedRows, fit_readers, part_of_stream


logger = logging.get_logger(__name__)


class _CountedBatches:
    def __init__(self, config: DataConfig):
        self.max_broken_share = config.max_broken_share
        self._tally = Tally()

    @property
    def images_seen(self) -> int:
        """Number of images that this process has read in the training so far or in the last pass, including broken ones."""
        return self._tally.seen

    @property
    def broken_images(self) -> int:
        """Number of these images that could not be read."""
        return self._tally.broken


class TrainingBatches(_CountedBatches):
    """
    The endless batches of this process, on the CPU, whose state a checkpoint continues exactly. An iterator begins
    after the last batch that was yielded, or at the loaded state; what workers prefetched beyond it is ignored. Images
    that cannot be read are skipped and counted.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        read_row: RowReader,
        config: DataConfig,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        super().__init__(config)
        self.process_index = process_index
        self.num_processes = num_processes
        place = (seed, process_index, num_processes)
        self._batches: IndexedBatches | StreamedBatches
        if isinstance(dataset, datasets.Dataset):
            self._batches = IndexedBatches(dataset, read_row, config, *place)
        else:
            self._batches = StreamedBatches(dataset, read_row, config, *place)
        self._warned = False

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch, tally in self._batches:
            self._tally.add(tally)
            self._tally.check(self.max_broken_share)
            if self._tally.last_reason is not None and not self._warned:
                self._warned = True
                warn_of_broken(self._tally)
            if batch is not None:
                yield batch

    def first_items(self, number: int) -> dict[str, torch.Tensor]:
        """The first `number` items of the training as one batch, the same in all processes; the position stays."""
        batch, tally = self._batches.first_items(number)
        tally.check(self.max_broken_share)
        return batch or {}

    def state_dict(self) -> dict[str, Any]:
        """The positions of all processes after their last batch. All of them have to call it together."""
        own = {
            "process_index": self.process_index,
            "streaming": isinstance(self._batches, StreamedBatches),
            "seen": self._tally.seen,
            "broken": self._tally.broken,
        } | self._batches.position()
        is_alone = self.num_processes == 1 or not torch.distributed.is_initialized()
        return {"processes": [own] if is_alone else gather_object([own])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; a stream must have as many processes, workers and buffered rows."""
        processes = state["processes"]
        streaming = isinstance(self._batches, StreamedBatches)
        if processes[0]["streaming"] != streaming:
            raise ValueError(f"`streaming` must be {not streaming}, as it was when the checkpoint was made.")
        self._batches.load_positions(processes)
        self._tally = Tally()
        for process in processes:
            if process["process_index"] % self.num_processes == self.process_index:
                self._tally.add(Tally(process["seen"], process["broken"]))


class ValidationBatches(_CountedBatches):
    """
    All rows once, or the first `validation_images`, in order. The processes take the batches in turn, so that some may
    have one more than others. A stream without `validation_images` is split by shards instead. Every iterator begins
    anew.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        read_row: RowReader,
        config: DataConfig,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        super().__init__(config)
        self.num_workers = config.dataloader_num_workers
        self._keys: list[range] | None = None
        self._rows: IndexedRows | StreamedRows
        size, most = config.train_batch_size, config.validation_images
        if isinstance(dataset, datasets.Dataset):
            length = len(dataset) if most is None else min(most, len(dataset))
            self._rows = IndexedRows(dataset, read_row)
            numbers = range(process_index, -(-length // size), num_processes)
            self._keys = [range(number * size, min((number + 1) * size, length)) for number in numbers]
            return
        prepared: Any = read_row.prepare(dataset)
        if most is None:
            prepared, possible = fit_readers(prepared, self.num_workers, num_processes)
            self.num_workers = min(self.num_workers, possible)
        else:
            # All readers of a stream's first rows read all of them.
            self.num_workers = min(self.num_workers, 1)
        readers = max(self.num_workers, 1)
        parts = {}
        for own in range(readers):
            share = (process_index * readers + own, num_processes * readers)
            if most is None:
                parts[own] = partial(part_of_stream(prepared, *share).iter, size)
            else:
                parts[own] = partial(_some_batches, prepared.take(most), size, *share)
        self._rows = StreamedRows(parts, read_row)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._tally = Tally()
        loader = make_loader(self._rows, self.num_workers, self._keys)
        for loaded in loader if self._keys is not None else (loaded for _, loaded in loader):
            # A part of a stream ends with an empty batch.
            if loaded is not None:
                self._tally.add(loaded.tally)
                self._tally.check(self.max_broken_share)
                if loaded.batch is not None:
                    yield loaded.batch


def warn_of_broken(tally: Tally) -> None:
    """Name the first image that cannot be read."""
    logger.warning(
        f"An image cannot be read: {tally.last_reason}. It is left out, as are further ones, which are only counted."
    )


def _some_batches(dataset: Any, batch_size: int, reader: int, num_readers: int) -> Iterable[dict[str, Any]]:
    # The same batches for any number of readers; the cost is that every reader reads all of them.
    return itertools.islice(dataset.iter(batch_size), reader, None, num_readers)
