# SPDX-License-Identifier: Apache-2.0
"""Settings beside the files that a run writes, so that it goes on only as it was begun."""

import json
import os
from pathlib import Path
from typing import Any


# Hidden: neither a glob nor datasets takes such files for data.
UNFINISHED = ".unfinished-"


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a file; none if there is no such file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def check_settings(folder: str | Path, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise a `ValueError` that names a setting which is another one than when the files in `folder` were `begun`."""
    for name in {**begun, **settings} if begun else ():
        if begun.get(name) != settings.get(name):
            raise ValueError(
                f"`{name}` was {begun.get(name)!r} when the files in {str(folder)!r} were begun, got "
                f"{settings.get(name)!r}. Go on with the same arguments, or take another `output_dir`."
            )


def write_settings(path: str | Path, settings: dict[str, Any]) -> None:
    """Make the folder, note the settings, and remove what an earlier run did not finish."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{UNFINISHED}*"):
        leftover.unlink()
    unfinished = path.with_name(f"{UNFINISHED}settings")
    unfinished.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    os.replace(unfinished, path)
