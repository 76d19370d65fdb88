# SPDX-License-Identifier: Apache-2.0
"""Names on the Hub and paths on this machine, which are not to be published."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..files import DATA_ENDINGS


HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_name(value: str) -> bool:
    """Whether an argument that may be a path or a name on the Hub is the latter: paths that exist take precedence."""
    return HUB_NAME.fullmatch(value) is not None and not value.endswith(DATA_ENDINGS) and not _exists(value)


def public_recipe(recipe: Mapping[str, Any]) -> str:
    """Arguments by name as YAML that a script takes as a recipe: none that is `None`, and no folders of paths."""
    public = {name: without_folders(value) for name, value in recipe.items() if value is not None}
    return yaml.safe_dump(public, sort_keys=False, allow_unicode=True).rstrip()


def without_folders(value: Any) -> Any:
    """`value`, or the entries of a list, with paths, which may reveal names, reduced to their last component."""
    if isinstance(value, (list, tuple)):
        return [without_folders(entry) for entry in value]
    if isinstance(value, Path) or (isinstance(value, str) and _is_path(value)):
        return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]
    return value


def _is_path(value: str) -> bool:
    return re.search(r"[/\\]", value) is not None and not is_hub_name(value)


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except OSError:  # too long for a path
        return False
