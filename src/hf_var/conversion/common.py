# SPDX-License-Identifier: Apache-2.0
"""What the readers of all foreign checkpoints share."""

import dataclasses
import difflib
import re

from ..weight_files import StateDict, listing


def check_overrides(config_class: type, overrides: dict) -> None:
    known = {"num_labels", *(field.name for field in dataclasses.fields(config_class))}
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`{name}` is not a field of {config_class.__name__}.{hint}")


def require_keys(state_dict: StateDict, kind: str, required: dict[str, int]) -> None:
    """Raise a `ValueError` unless the tensors are there that tell the configuration, with these dimensions."""
    missing = [name for name in required if name not in state_dict]
    if missing:
        present = [name for name in state_dict if name not in required]
        raise ValueError(
            f"`checkpoint` is not an official {kind}: the keys {missing} are missing, and it holds {listing(present)}."
        )
    for name, num_dimensions in required.items():
        if state_dict[name].ndim != num_dimensions:
            raise ValueError(
                f"`checkpoint` is not an official {kind}: {name} has {state_dict[name].ndim} instead of {num_dimensions} "
                "dimensions."
            )


def count(state_dict: StateDict, pattern: str) -> int:
    """One more than the largest number which `pattern` captures in the names, 0 without any."""
    found = [int(match.group(1)) for name in state_dict if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def rename(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
