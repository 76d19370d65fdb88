# SPDX-License-Identifier: Apache-2.0
"""
Reading a data set without an index.

A shuffle buffer that is refilled row by row cannot be resumed without saving its rows. Here a block of rows is read,
shuffled and used up before the next one, so that a position is the beginning of a block and a place in it, and resuming
reads one block again. The shards that the blocks come from are shuffled at the beginning of every epoch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from .config import DataConfig
from .rows import ItemReader, Loaded, RowReader, Tally, collate, make_loader, rows_of


logger = logging.get_logger(__name__)

# Beginning of a reader's walk. `stream`: state of the data set at the beginning of the block, `None` for the first block
# of an epoch. `readable`: images read in earlier epochs.
BEGINNING = {"epoch": 0, "block": 0, "place": 0, "stream": None, "seen": 0, "broken": 0, "readable": 0}
# Rows of a stream are numbered within their part; the first ones of two parts are this far apart.
MOST_ROWS_OF_PART = 2**40


def fit_readers(
    dataset: datasets.IterableDataset, num_workers: int, num_processes: int
) -> tuple[datasets.IterableDataset, int]:
    """The stream, cut finer if there are few shards, and the workers per process that can load it, at least 1."""
    num_workers = max(num_workers, 1)
    if dataset.num_shards < num_workers * num_processes:
        dataset = dataset.reshard()
    possible = max(1, dataset.num_shards // num_processes)
    if possible < num_workers:
        logger.warning(
            f"`dataloader_num_workers` is {possible} instead of {num_workers}: the data set has {dataset.num_shards} "
            f"shards for {num_processes} process(es)."
        )
    return dataset, min(num_workers, possible)


def part_of_stream(dataset: datasets.IterableDataset, reader: int, num_readers: int) -> datasets.IterableDataset:
    """What one of `num_readers` reads: some of the shards, or every `num_readers`-th row where there are too few."""
    strategy = "shards" if dataset.num_shards >= num_readers else "examples"
    return split_dataset_by_node(dataset, reader, num_readers, strategy=strategy)


class StreamedRows(IterableDataset):
    """Batches of parts of a stream, which `parts` open; random numbers follow from `seed`, part and row."""

    def __init__(
        self, parts: Mapping[int, Callable[[], Iterable[dict[str, Any]]]], read_row: RowReader, seed: int = 0
    ):
        self.parts = parts
        self.reader = ItemReader(read_row, seed)

    def __iter__(self) -> Iterator[tuple[int, Loaded | None]]:
        """Pairs of a part and a batch of it, `None` when it has ended."""
        info = get_worker_info()
        parts = list(self.parts.items())
        for part, open_batches in parts if info is None else parts[info.id :: info.num_workers]:
            number = part * MOST_ROWS_OF_PART
            for columns in open_batches():
                loaded = self.reader.read_batch(columns, number)
                number += loaded.tally.seen
                yield part, loaded
            yield part, None


class StreamedBatches:
    """
    The endless batches of one process out of several, each of which has its own part of the stream and begins it anew, in
    another order, whenever it ends.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        read_row: RowReader,
        config: DataConfig,
        seed: int,
        process_index: int,
        num_processes: int,
    ):
        self.read_row = read_row
        self.config = config
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        prepared: Any = read_row.prepare(dataset)
        self.dataset, self.num_workers = fit_readers(prepared, config.dataloader_num_workers, num_processes)
        self.readers: list[dict[str, Any]] = [BEGINNING for _ in range(self.num_workers)]
        self.next_worker = 0

    def __iter__(self) -> Iterator[Loaded]:
        num_workers = self.num_workers if self.config.dataloader_num_workers > 0 else 0
        for element in make_loader(_Readers(self), num_workers):
            if element is None:
                continue
            loaded, reader = element
            self.readers[self.next_worker] = reader
            self.next_worker = (self.next_worker + 1) % self.num_workers
            yield loaded

    def read(self, worker: int) -> Iterator[tuple[Loaded, dict[str, Any]]]:
        """The batches that one worker of this process loads from its position on, each with the position after it."""
        config = self.config
        index = self.process_index * self.num_workers + worker
        dataset = part_of_stream(self.dataset, index, self.num_processes * self.num_workers)
        state = copy(self.readers[worker])
        reader = ItemReader(self.read_row, self.seed, 1 + index)
        reader.tally = Tally(state["seen"], state["broken"])
        reported = copy(reader.tally)
        items = []
        while True:
            # datasets shuffles the shards by this number, the seed's only way in.
            dataset.set_epoch(1 + int(np.random.SeedSequence((self.seed, state["epoch"])).generate_state(1)[0]))
            dataset.load_state_dict(state["stream"])
            num_rows = 0
            for columns in dataset.iter(batch_size=config.shuffle_buffer_size):
                rows = rows_of(columns)
                num_rows += len(rows)
                generator = np.random.default_rng((self.seed, state["epoch"], state["block"], index))
                order = generator.permutation(len(rows))
                while state["place"] < len(rows):
                    item = reader.read(rows[order[state["place"]]], reader.tally.seen)
                    state["place"] += 1
                    if item is None:
                        # A worker that finds only broken images never finishes a batch for others to count.
                        reader.tally.check(config.max_broken_share)
                        continue
                    items.append(item)
                    if len(items) == config.train_batch_size:
                        tally = reader.tally
                        state |= {"seen": tally.seen, "broken": tally.broken}
                        new = Tally(tally.seen - reported.seen, tally.broken - reported.broken, tally.last_reason)
                        yield Loaded(collate(items), new), copy(state)
                        reported, items = copy(tally), []
                state |= {"block": state["block"] + 1, "place": 0, "stream": dataset.state_dict()}
            self._check_epoch(num_rows, state["readable"], reader.tally)
            readable = reader.tally.seen - reader.tally.broken
            state |= {"epoch": state["epoch"] + 1, "block": 0, "stream": None, "readable": readable}

    def _check_epoch(self, num_rows: int, readable_before: int, tally: Tally) -> None:
        if num_rows == 0 and tally.seen == 0:
            raise ValueError(
                f"The stream has no rows for process {self.process_index} of {self.num_processes}: it has "
                f"{self.dataset.num_shards} shard(s), and too few rows in one."
            )
        # A part may be empty in a later epoch, when it is other shards.
        if num_rows > 0 and tally.seen - tally.broken == readable_before:
            raise ValueError(f"No image of the stream can be read. The last one: {tally.last_reason}")

    def position(self) -> dict[str, Any]:
        """The positions of the readers after the last batch that was yielded."""
        return {"readers": list(self.readers), "next_worker": self.next_worker} | self._topology()

    def load_positions(self, positions: list[dict[str, Any]]) -> None:
        """Go to where [`~StreamedBatches.position`] was in each process."""
        mine = next((entry for entry in positions if entry["process_index"] == self.process_index), positions[0])
        for name, value in self._topology().items():
            if mine[name] != value:
                raise ValueError(
                    f"A stream is resumed as it was begun: the checkpoint was made with {name} {mine[name]}, got {value}."
                )
        self.readers = list(mine["readers"])
        self.next_worker = mine["next_worker"]

    def _topology(self) -> dict[str, int]:
        return {
            "num_processes": self.num_processes,
            "dataloader_num_workers": self.num_workers,
            "shuffle_buffer_size": self.config.shuffle_buffer_size,
        }

    def first_items(self, number: int) -> Loaded:
        """The first `number` items that one process without workers reads, as one batch: the same in all processes."""
        config = replace(self.config, train_batch_size=number, dataloader_num_workers=0)
        whole = StreamedBatches(self.dataset, self.read_row, config, self.seed, process_index=0, num_processes=1)
        return next(whole.read(worker=0))[0]


class _Readers(IterableDataset):
    """The batches of the worker that this runs in."""

    def __init__(self, batches: StreamedBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Loaded, dict[str, Any]] | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        # A loader always begins with its first worker. Workers that already had their turn skip it.
        if worker < self.batches.next_worker:
            yield None
        yield from self.batches.read(worker)
