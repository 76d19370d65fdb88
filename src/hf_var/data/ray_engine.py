# SPDX-License-Identifier: Apache-2.0
"""
The engine "ray" of a tokenization: tasks of Ray Data read pieces of the units on all CPUs of a cluster, actors encode them,
and this process receives the rows of codes, which are small, and writes the files. A part depends on its numbers alone, so that
a task that is repeated gives the same one.
"""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import pyarrow
from accelerate import Accelerator
from safetensors.torch import load, save

from .encoding import EncodedPart, PartEncoder
from .ray_cluster import actor_device, cluster, run_in_actors
from .rows import Tally
from .work_units import IndexedUnits, Part, Piece, StreamedUnits


# A task reads as many: few enough that the units come to their ends one after the other, many enough that what it takes to
# start a task does not count.
PARTS_PER_TASK = 16
# How parts travel between processes, in plain values. Ray's own type of tensors cannot be read by `datasets`.
SCHEMA = pyarrow.schema(
    {
        "unit": pyarrow.int64(),
        "place": pyarrow.int64(),
        "content": pyarrow.large_binary(),
        "seen": pyarrow.int64(),
        "broken": pyarrow.int64(),
        "last_reason": pyarrow.string(),
        "is_last": pyarrow.bool_(),
        "error": pyarrow.string(),
    }
)


def encode_with_ray(
    encoder: PartEncoder, units: IndexedUnits | StreamedUnits, missing: list[int]
) -> Iterator[EncodedPart]:
    """All parts of `missing` units, those of each in their order, encoded by the cluster or by a new local one."""
    if not missing:
        return
    pieces = [
        {"unit": piece.unit, "first": piece.first, "number": piece.number}
        for piece in units.pieces(missing, PARTS_PER_TASK)
    ]
    with cluster():
        arguments = {"encoder": encoder, "use_cpu": actor_device().type == "cpu"}
        number = encoder.config.ray_actors
        with closing(run_in_actors(pieces, _Encoding, arguments, number, partial(_read, units))) as tables:
            yield from _in_order(tables)


def _read(units: IndexedUnits | StreamedUnits, table: pyarrow.Table) -> Iterator[pyarrow.Table]:
    """The parts of a piece, read in a task."""
    for row in table.to_pylist():
        piece = Piece(**row)
        try:
            for place, part in enumerate(units.read(piece), start=piece.first):
                yield _message(place, part, None if part.batch is None else save(part.batch))
        # What is wrong with the data, such as a label that is none, is said as it is. Ray would say it its own way.
        except ValueError as error:
            yield pyarrow.Table.from_pylist([{"error": str(error)}], schema=SCHEMA)


class _Encoding:
    """An actor that encodes parts."""

    def __init__(self, encoder: PartEncoder, use_cpu: bool):
        self.encoder = encoder
        self.accelerator = Accelerator(cpu=use_cpu, mixed_precision=encoder.config.mixed_precision)
        encoder.to(self.accelerator.device)

    def __call__(self, table: pyarrow.Table) -> Iterator[pyarrow.Table]:
        for row in table.to_pylist():
            if row["error"] is not None:
                yield table
                return
            batch = None if row["content"] is None else load(row["content"])
            part = Part(row["unit"], batch, _tally(row), row["is_last"])
            encoded = self.encoder.encode(part, self.accelerator)
            yield _message(row["place"], encoded, None if encoded.rows is None else _written(encoded.rows))


def _in_order(tables: Iterator[pyarrow.Table]) -> Iterator[EncodedPart]:
    """The encoded parts of each unit in their order, in which they need not come."""
    waiting: dict[tuple[int, int], EncodedPart] = {}
    following: dict[int, int] = {}
    for table in tables:
        for row in table.to_pylist():
            if row["error"] is not None:
                raise ValueError(row["error"])
            content = row["content"]
            rows = None if content is None else pyarrow.ipc.open_stream(content).read_all()
            unit = row["unit"]
            waiting[unit, row["place"]] = EncodedPart(unit, rows, _tally(row), row["is_last"])
            place = following.get(unit, 0)
            while (unit, place) in waiting:
                yield waiting.pop((unit, place))
                place += 1
            following[unit] = place


def _message(place: int, part: Part | EncodedPart, content: bytes | None) -> pyarrow.Table:
    values = {"unit": part.unit, "place": place, "content": content, "is_last": part.is_last}
    return pyarrow.Table.from_pylist([values | vars(part.tally)], schema=SCHEMA)


def _tally(row: dict[str, Any]) -> Tally:
    return Tally(row["seen"], row["broken"], row["last_reason"])


def _written(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
