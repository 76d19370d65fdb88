# SPDX-License-Identifier: Apache-2.0
"""
A data set cut into units, each of which is read by itself: what it holds depends on its number alone, not on the processes
that share the units, nor on the workers that load them.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import datasets
import torch

from .indexed import IndexedRows
from .rows import Loaded, RowReader, Tally, make_loader
from .streamed import StreamedRows


# Pieces that a stream with too few shards is cut into. With more of them an interrupted run loses less work.
UNITS_PER_PROCESS = 16


class Piece(NamedTuple):
    """What can be read of a unit by itself: its parts from the one with number `first` on, at most `number` of them."""

    unit: int
    first: int = 0
    number: int = sys.maxsize


class Part(NamedTuple):
    """Some rows of a unit, in their order: a batch, `None` if none can be read, and whether the unit ends here."""

    unit: int
    batch: dict[str, torch.Tensor] | None
    tally: Tally
    is_last: bool


class IndexedUnits:
    """Ranges of `rows_per_unit` rows of a data set with an index, read `rows_per_part` at a time."""

    def __init__(
        self, dataset: datasets.Dataset, read_row: RowReader, seed: int, rows_per_unit: int, rows_per_part: int
    ):
        self.rows = IndexedRows(dataset, read_row, seed)
        self.length = len(dataset)
        self.rows_per_unit = rows_per_unit
        self.rows_per_part = rows_per_part
        self.number = -(-self.length // rows_per_unit)
        self.settings = {"images": self.length}

    def rows_in(self, unit: int) -> range:
        """The rows of a unit."""
        return range(unit * self.rows_per_unit, min((unit + 1) * self.rows_per_unit, self.length))

    def num_rows(self, units: list[int]) -> int | None:
        """The rows of several units."""
        return sum(len(self.rows_in(unit)) for unit in units)

    def parts(self, units: list[int], num_workers: int) -> Iterator[Part]:
        """All parts of `units`, one unit after the other, loaded by `num_workers` processes."""
        keys = [(unit, *key) for unit in units for key in self._keys(Piece(unit))]
        loader = make_loader(self.rows, num_workers, [rows for _, rows, _ in keys])
        for (unit, _, is_last), (batch, tally) in zip(keys, loader, strict=True):
            yield Part(unit, batch, tally, is_last)

    def pieces(self, units: list[int], most_parts: int) -> list[Piece]:
        """`units` in pieces of at most `most_parts`, in their order."""
        size = self.rows_per_part * most_parts
        return [
            Piece(unit, number * most_parts, most_parts)
            for unit in units
            for number in range(-(-len(self.rows_in(unit)) // size))
        ]

    def read(self, piece: Piece) -> Iterator[Part]:
        """The parts of a piece, read by this process."""
        for rows, is_last in self._keys(piece):
            yield Part(piece.unit, *self.rows[rows], is_last)

    def _keys(self, piece: Piece) -> list[tuple[range, bool]]:
        """The rows of each part of a piece, and whether the unit ends with them."""
        rows, size = self.rows_in(piece.unit), self.rows_per_part
        keys = [(rows[first : first + size], first + size >= len(rows)) for first in range(0, len(rows), size)]
        return keys[piece.first : piece.first + piece.number]


class StreamedUnits:
    """
    The shards of a stream, or, where `num_processes` would have none, finer pieces of it, if its format can be cut;
    `number` are those of the run that is resumed, which keeps them however many processes it has now.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        read_row: RowReader,
        seed: int,
        rows_per_part: int,
        num_processes: int,
        number: int | None = None,
    ):
        prepared: Any = read_row.prepare(dataset)
        num_shards = prepared.num_shards
        if number is None:
            number = num_shards if num_shards >= num_processes else UNITS_PER_PROCESS * num_processes
        if number != num_shards:
            prepared = prepared.reshard()
        self.dataset: datasets.IterableDataset = prepared
        self.read_row = read_row
        self.seed = seed
        self.rows_per_part = rows_per_part
        self.number = min(number, prepared.num_shards)
        self.settings = {"shards": num_shards, "units": self.number}

    def num_rows(self, units: list[int]) -> int | None:
        """`None`: unknown before they are read."""
        return None

    def parts(self, units: list[int], num_workers: int) -> Iterator[Part]:
        """All parts of `units`. Each of `num_workers` processes loads its own units, so that their parts take turns."""
        return _streamed_parts(make_loader(self._rows(units), min(num_workers, len(units))))

    def pieces(self, units: list[int], most_parts: int) -> list[Piece]:
        """`units`, each in one piece: what comes later in a stream cannot be read without what comes before."""
        return [Piece(unit) for unit in units]

    def read(self, piece: Piece) -> Iterator[Part]:
        """The parts of a piece, read by this process."""
        return _streamed_parts(self._rows([piece.unit]))

    def _rows(self, units: list[int]) -> StreamedRows:
        # Not through iter(), which would split the shards between the workers a second time.
        opened = {unit: partial(_batches_of, self.dataset, self.number, unit, self.rows_per_part) for unit in units}
        return StreamedRows(opened, self.read_row, self.seed)


def _streamed_parts(rows: Iterable[tuple[int, Loaded | None]]) -> Iterator[Part]:
    for unit, loaded in rows:
        yield Part(unit, None, Tally(), True) if loaded is None else Part(unit, loaded.batch, loaded.tally, False)


def _batches_of(dataset: Any, number: int, unit: int, batch_size: int) -> Iterator[dict[str, Any]]:
    return dataset.shard(number, unit).iter(batch_size)
