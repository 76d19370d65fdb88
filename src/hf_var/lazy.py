# SPDX-License-Identifier: Apache-2.0
"""Packages that import what is behind their public names when one of these is first used (PEP 562)."""

import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any


def names_on_use(
    package: str, names: Collection[str], load: Callable[[], ModuleType]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public `names` are those of a module, which the first of them loads."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(load(), name)

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return find, list_names
