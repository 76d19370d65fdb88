# SPDX-License-Identifier: Apache-2.0
"""Packages that import what is behind their public names when one of these is first used (PEP 562)."""

from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any


def names_on_use(package: str, names: Collection[str], load: Callable[[], ModuleType]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public `names` are those of a module, which the first of them loads."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(load(), name)

    return find
