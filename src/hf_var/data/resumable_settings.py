# SPDX-License-Identifier: Apache-2.0
"""Settings saved next to a run's files, checked when the run is resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import remove_unfinished, whole_file


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a file; none if there is no such file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def first_difference(begun: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that is another one now, dotted where it is nested, with its values then and now."""
    # JSON has lists in place of tuples, and texts in place of the integers that name entries.
    begun, settings = json.loads(json.dumps([begun, settings]))
    for name in {**begun, **settings}:
        before, now = begun.get(name), settings.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            difference = first_difference(before, now)
            if difference is not None:
                return f"{name}.{difference[0]}", *difference[1:]
        elif before != now:
            return name, before, now
    return None


def check_settings(folder: str | Path, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a setting differs from those that the files in `folder` were `begun` with."""
    difference = first_difference(begun, settings) if begun else None
    if difference is not None:
        name, before, now = difference
        raise ValueError(
            f"`{name}` was {before!r} when the files in {str(folder)!r} were begun, got {now!r}. Go on with the same "
            "arguments, or take another `output_dir`."
        )


def write_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, note the settings, and remove what an earlier run did not finish."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    with whole_file(path) as place:
        place.write_text(json.dumps(settings, indent=2), encoding="utf-8")
