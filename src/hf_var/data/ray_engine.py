# SPDX-License-Identifier: Apache-2.0
"""
The engine "ray" of a tokenization: tasks of Ray Data read pieces of the units on all CPUs of a cluster, actors encode them,
and this process receives the rows of codes, which are small, and writes the files. Ray Data replaces workers that die and
repeats their tasks, without a limit; a part depends on its numbers alone, so that the repetition gives the same one. No worker
writes, so that one that is thought lost cannot write into the file of its successor.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, cast

import pyarrow
import ray  # pyright: ignore[reportMissingImports]
import ray.data  # pyright: ignore[reportMissingImports]
from accelerate import Accelerator
from safetensors.torch import load, save

from .encoding import EncodedPart, PartEncoder
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
    with _cluster():
        pieces = [
            {"unit": piece.unit, "first": piece.first, "number": piece.number}
            for piece in units.pieces(missing, PARTS_PER_TASK)
        ]
        dataset = ray.data.from_items(pieces, override_num_blocks=len(pieces))
        # That of this data set alone; the progress that counts is that of the images.
        dataset.context.enable_progress_bars = False
        batches: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
        dataset = dataset.map_batches(partial(_read, units), **batches)
        num_gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
        dataset = dataset.map_batches(
            _Encoding,
            fn_constructor_kwargs={"encoder": encoder, "use_cpu": num_gpus == 0},
            compute=ray.data.ActorPoolStrategy(size=encoder.config.ray_actors),
            num_gpus=num_gpus,
            # Not counted, so that readers and encoders never wait for each other's CPUs.
            num_cpus=0,
            **batches,
        )
        with closing(cast(Any, iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow")))) as tables:
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


@contextmanager
def _cluster() -> Iterator[None]:
    """The cluster that this process is connected to, or else the one that RAY_ADDRESS names, or else a new local one."""
    is_connected = ray.is_initialized()
    if not is_connected:
        ray.init()
    try:
        yield
    finally:
        if not is_connected:
            ray.shutdown()
