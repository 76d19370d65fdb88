# SPDX-License-Identifier: Apache-2.0
"""What the readers of all foreign checkpoints share."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..weight_files import StateDict, check_finite, listing


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def count(state_dict: StateDict, pattern: str, first: int = 0) -> int:
    """How many consecutive numbers from `first` on `pattern` captures in the names; a gap raises a `ValueError`."""
    found = {match.group(1) for name in state_dict if (match := re.match(pattern, name))}
    expected = set(map(str, range(first, first + len(found))))
    if found != expected:
        raise ValueError(
            f"`checkpoint` must number its keys {pattern!r} from {first} on without a gap, got {listing(list(found - expected))} "
            f"among {len(found)}."
        )
    return len(found)


def rename(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def fill(
    model: Any,
    names: Mapping[str, str | tuple[str, int | None]],
    state_dict: StateDict,
    kind: str,
    view: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    """
    Give a model on the meta device the weights of an official state dict, without a copy of them.

    Args:
        model (`PreTrainedModel`): The model, on the meta device.
        names (`dict`):
            Official name of each of our weights, or the pair of name and index where it is a third of the official
            weight's rows.
        state_dict (`dict`): Official weights, all of which must be used.
        kind (`str`): What the checkpoint should be, for messages.
        view (`Callable`, *optional*): Gives our weight, with its official name, the official dimensions.

    Returns:
        `model`, in evaluation mode.

    Raises:
        `ValueError`: If weights are missing, left over, of another shape, not floating-point or not finite.
    """
    sources = {ours: (source, None) if isinstance(source, str) else source for ours, source in names.items()}
    expected = {official for official, _ in sources.values()}
    missing = sorted(expected - set(state_dict))
    left_over = [name for name in state_dict if name not in expected]
    if missing or left_over:
        raise ValueError(
            f"`checkpoint` is not an official {kind} that this package knows: missing keys {listing(missing)}, left over "
            f"{listing(left_over)}."
        )
    weights = {}
    for ours, target in model.state_dict().items():
        official, row_part = sources[ours]
        whole = source = state_dict[official]
        if whole.dtype not in DTYPES:
            raise ValueError(
                f"`checkpoint` must hold floating-point weights of 16 bits or more, got {official} of {whole.dtype}."
            )
        if row_part is not None and whole.ndim > 0 and len(whole) % 3 == 0:
            source = whole.chunk(3)[row_part]
        if source.shape != (target if view is None else view(official, target)).shape:
            raise ValueError(
                f"`checkpoint` does not fit its {kind} configuration: {official} has the shape {tuple(whole.shape)}, {ours} "
                f"needs {tuple(target.shape)}."
            )
        weights[ours] = source.view(target.shape)
    check_finite({official: state_dict[official] for official in expected}, "`checkpoint`")
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()
