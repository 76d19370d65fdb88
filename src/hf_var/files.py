# SPDX-License-Identifier: Apache-2.0
"""Files: those that get their names only when they are whole, so that an interrupted run leaves none in part, and data."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Files that datasets reads, of images or of codes.
DATA_ENDINGS = (".parquet", ".tar")
# Hidden, and without the suffix: neither a glob nor datasets takes such files for data.
UNFINISHED = ".unfinished-"


def unfinished(path: str | Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    path = Path(path)
    return path.with_name(f"{UNFINISHED}{path.stem}")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write a file inside the block. It gets its name afterwards, or is removed if there was an error."""
    place = unfinished(path)
    try:
        yield place
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def remove_unfinished(folder: str | Path, kind: str = "") -> None:
    """Remove what interrupted runs left in a folder, of a name that begins with `kind`."""
    for leftover in Path(folder).glob(f"{UNFINISHED}{kind}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
