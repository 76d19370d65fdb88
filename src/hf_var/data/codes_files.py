# SPDX-License-Identifier: Apache-2.0
"""A folder of parquet files of codes, written atomically, so that an interrupted run can be resumed."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet
import torch

from ..files import unfinished
from .codes import CODES_COLUMN
from .resumable_settings import read_settings
from .rows import Tally


FILES = "codes-*.parquet"
SETTINGS_FILE = ".tokenization.json"
# In a file's metadata: how many images were read for it, and how many of them were broken.
IMAGES_KEY = b"hf_var.images"
# Rows that a stream of codes reads at a time.
ROWS_PER_GROUP = 4096


def codes_path(folder: str | Path, unit: int, number: int) -> Path:
    """The file of one of `number` units."""
    return Path(folder) / f"codes-{unit:05d}-of-{number:05d}.parquet"


def codes_table(schema: pyarrow.Schema, codes: torch.Tensor, *others: pyarrow.Array) -> pyarrow.Table:
    """Rows of a file with this `schema`: codes of shape `(batch, length)` and the other columns."""
    kind: Any = schema.field(CODES_COLUMN).type
    flat = pyarrow.array(codes.numpy().astype(kind.value_type.to_pandas_dtype()).ravel())
    columns: list[Any] = [pyarrow.FixedSizeListArray.from_arrays(flat, type=kind), *others]
    return pyarrow.Table.from_arrays(columns, schema=schema)


class CodesFile:
    """A parquet file of codes with the columns and metadata of `schema`, written atomically."""

    def __init__(self, path: Path, schema: pyarrow.Schema):
        self.path = path
        self.tally = Tally()
        self._writer = pyarrow.parquet.ParquetWriter(unfinished(path), schema)
        self._rows = schema.empty_table()

    def add(self, rows: pyarrow.Table) -> None:
        """Add rows of [`codes_table`]."""
        self._rows = pyarrow.concat_tables([self._rows, rows])
        # Groups of one size, so that the file does not depend on that of the batches.
        while len(self._rows) >= ROWS_PER_GROUP:
            self._writer.write_table(self._rows.slice(0, ROWS_PER_GROUP))
            self._rows = self._rows.slice(ROWS_PER_GROUP)

    def finish(self) -> None:
        """Write what is left, and give the file its name."""
        if len(self._rows) > 0:
            self._writer.write_table(self._rows)
        self._writer.add_key_value_metadata({IMAGES_KEY: json.dumps([self.tally.seen, self.tally.broken])})
        self._writer.close()
        os.replace(unfinished(self.path), self.path)


@dataclass
class CodesCount:
    """Counts of files of codes: rows, images that were read, and broken ones among these."""

    rows: int = 0
    images: int = 0
    broken_images: int = 0


def count_codes(paths: Sequence[Path]) -> CodesCount:
    """The counts of complete files, from their metadata."""
    count = CodesCount()
    for path in paths:
        metadata = pyarrow.parquet.read_metadata(path)
        images, broken_images = json.loads(cast(dict[bytes, bytes], metadata.metadata)[IMAGES_KEY])
        count.rows += metadata.num_rows
        count.images += images
        count.broken_images += broken_images
    return count


def read_codes_settings(folder: str | Path) -> dict[str, Any]:
    """The settings with which the files in `folder` were begun; none if it is new. Files of others are refused."""
    settings = read_settings(Path(folder) / SETTINGS_FILE)
    files = [] if settings else sorted(file.name for file in Path(folder).glob("*.parquet"))
    if files:
        raise ValueError(
            f"`output_dir` = {str(folder)!r} has parquet files of something else, such as {files[0]!r}. Take another folder."
        )
    return settings
