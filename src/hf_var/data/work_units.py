# SPDX-License-Identifier: Apache-2.0
"""
A data set cut into units, each of which is read by itself: what it holds depends on its number alone, not on the processes
that share the units, nor on the workers that load them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import datasets
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .rows import ItemReader, RowReader, Tally, collate, make_loader, rows_of


# Rows of a stream are numbered within their unit; so far apart are the first ones of two units.
MOST_ROWS_OF_UNIT = 2**40
# Where a stream has too few shards and is cut smaller. More of them cost less work when a run is killed.
UNITS_PER_PROCESS = 16


class Part(NamedTuple):
    """
    Some rows of a unit, in their order.

    Attributes:
        unit (`int`): The unit.
        batch (`dict[str, torch.Tensor]`, *optional*): The items, `None` if there are none that can be read.
        tally ([`Tally`]): Images that were looked at.
        is_last (`bool`): Whether the unit ends here.
    """

    unit: int
    batch: dict[str, torch.Tensor] | None
    tally: Tally
    is_last: bool


class IndexedUnits(Dataset):
    """
    Fixed ranges of rows of a data set with an index. What is drawn for a row depends on `seed` and its index.

    Args:
        dataset (`datasets.Dataset`): The rows.
        read_row ([`RowReader`]): How a row becomes an item.
        seed (`int`): Seed of all draws.
        rows_per_unit (`int`): Rows of a unit.
        rows_per_part (`int`): Rows that are read at a time.
    """

    def __init__(
        self, dataset: datasets.Dataset, read_row: RowReader, seed: int, rows_per_unit: int, rows_per_part: int
    ):
        self.dataset: Any = read_row.prepare(dataset)
        self.read_row = read_row
        self.seed = seed
        self.rows_per_unit = rows_per_unit
        self.rows_per_part = rows_per_part
        self.number = -(-len(dataset) // rows_per_unit)
        self.settings = {"images": len(dataset)}

    def rows_in(self, unit: int) -> range:
        """The rows of a unit."""
        first = unit * self.rows_per_unit
        return range(first, min(first + self.rows_per_unit, len(self.dataset)))

    def num_rows(self, units: list[int]) -> int | None:
        """The rows of several units."""
        return sum(len(self.rows_in(unit)) for unit in units)

    def parts(self, units: list[int], num_workers: int) -> Iterator[Part]:
        """All parts of `units`, one unit after the other, loaded by `num_workers` processes."""
        keys = [(unit, first) for unit in units for first in self.rows_in(unit)[:: self.rows_per_part]]
        return iter(make_loader(self, num_workers, cast(Any, keys)))

    def __getitem__(self, key: tuple[int, int]) -> Part:
        unit, first = key
        end = self.rows_in(unit).stop
        stop = min(first + self.rows_per_part, end)
        columns: Any = self.dataset[first:stop]
        return _read_part(unit, columns, first, self.read_row, self.seed, is_last=stop == end)


class StreamedUnits(IterableDataset):
    """
    The shards of a stream, or, where processes would have none, finer pieces of it, as far as its format can be cut. What
    is drawn for a row depends on `seed` and its place in the unit.

    Args:
        dataset (`datasets.IterableDataset`): The rows.
        read_row ([`RowReader`]): How a row becomes an item.
        seed (`int`): Seed of all draws.
        rows_per_part (`int`): Rows that are read at a time.
        num_processes (`int`): Processes that share the units.
        number (`int`, *optional*):
            Units into which the stream was cut before; a run that goes on keeps them, however many processes it has now.
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
        self._units: list[int] = []

    def num_rows(self, units: list[int]) -> int | None:
        """`None`: nobody knows before they are read."""
        return None

    def parts(self, units: list[int], num_workers: int) -> Iterator[Part]:
        """All parts of `units`. Each of `num_workers` processes loads its own units, so that their parts take turns."""
        self._units = units
        return iter(make_loader(self, min(num_workers, len(units))))

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        for unit in self._units if info is None else self._units[info.id :: info.num_workers]:
            number = unit * MOST_ROWS_OF_UNIT
            # Not through iter(), which would split the shards between the workers a second time.
            for columns in self.dataset.shard(self.number, unit).iter(self.rows_per_part):
                part = _read_part(unit, columns, number, self.read_row, self.seed, is_last=False)
                number += part.tally.seen
                yield part
            yield Part(unit, None, Tally(), is_last=True)


def _read_part(unit: int, columns: dict[str, Any], first: int, read_row: RowReader, seed: int, is_last: bool) -> Part:
    reader = ItemReader(read_row, (seed,))
    items = [reader.read(row, number) for number, row in enumerate(rows_of(columns), start=first)]
    readable = [item for item in items if item is not None]
    return Part(unit, collate(readable) if readable else None, reader.tally, is_last)
