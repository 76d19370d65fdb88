# SPDX-License-Identifier: Apache-2.0
"""What the readers of all foreign checkpoints share."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..priors import TextVARConfig, VARConfig
from ..weight_files import StateDict, check_finite_weights, listing


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


def square_maps(levels: torch.Tensor, length: int) -> list[int] | None:
    """The sides of square token maps of `length` tokens in all, of the scales `levels`; `None` if there are none."""
    levels = levels.flatten()
    if levels.is_meta or len(levels) != length or length == 0:
        return None
    levels = levels.long()
    if int(levels.min()) < 0 or int(levels.max()) >= length:
        return None
    lengths = levels.bincount().tolist()
    sides = [math.isqrt(tokens) for tokens in lengths]
    return sides if 0 not in sides and [side**2 for side in sides] == lengths else None


def schedule_buffers(config: VARConfig | TextVARConfig, like: torch.Tensor) -> StateDict:
    """The buffers of the official code that follow from the schedule, in dtype and on the device of a weight."""
    device, lengths = like.device, torch.tensor(config.scale_lengths, device=like.device)
    scales = torch.arange(len(lengths), device=device)
    levels = scales.repeat_interleave(lengths, output_size=config.length)
    sees = levels.view(1, -1) <= levels.view(-1, 1) if config.is_causal else levels.view(1, -1) == levels.view(-1, 1)
    mask = torch.zeros(sees.shape, dtype=like.dtype, device=device).masked_fill(~sees, -torch.inf)
    return {"lvl_1L": levels.view(1, -1), "attn_bias_for_masking": mask[None, None]}


@dataclass(frozen=True)
class Part:
    """One of equal parts of the rows of an official weight, in which several of ours are fused."""

    name: str
    index: int
    number: int


# Where our weights are in the official code: each is a weight, a part of one, or several one below the other.
Names = Mapping[str, str | Part | tuple[str, ...]]
View = Callable[[str, torch.Tensor], torch.Tensor]


def fill(model: Any, names: Names, state_dict: StateDict, kind: str, view: View | None = None) -> Any:
    """
    Give a model on the meta device the weights of an official state dict, without a copy of those that are whole.

    Args:
        model (`PreTrainedModel`): The model, on the meta device.
        names (`dict`):
            Official name of each of our weights, a [`Part`] where it is a part of the official weight, or the names
            of the official weights whose rows it has, in this order. Buffers without a name become zero.
        state_dict (`dict`): Official weights, all of which must be used.
        kind (`str`): What the checkpoint should be, for messages.
        view (`Callable`, *optional*): Gives our weight, with its official name, the official dimensions.

    Returns:
        `model`, in evaluation mode.

    Raises:
        `ValueError`: If weights are missing, left over, of another shape, not floating-point or not finite.
    """
    expected = {official for source in names.values() for official in _official_names(source)}
    missing = sorted(expected - set(state_dict))
    left_over = [name for name in state_dict if name not in expected]
    if missing or left_over:
        raise ValueError(
            f"`checkpoint` is not an official {kind} that this package knows: missing keys {listing(missing)}, left over "
            f"{listing(left_over)}."
        )
    weights = {
        ours: _take(ours, target, names[ours], state_dict, kind, view)
        for ours, target in model.state_dict().items()
        if ours in names
    }
    for ours, buffer in model.named_buffers():
        if ours not in weights:
            weights[ours] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    check_finite_weights({official: state_dict[official] for official in expected}, "`checkpoint`")
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def official_weights(model: Any, names: Names, view: View | None = None) -> StateDict:
    """The official state dict of a model, in memory of its own: the opposite of [`fill`], with the same arguments."""
    weights, parts = model.state_dict(), {}
    for ours, source in names.items():
        official = _official_names(source)
        for name, part in zip(official, weights[ours].chunk(len(official)), strict=True):
            parts.setdefault(name, []).append(part)
    whole = {name: torch.cat(own) if len(own) > 1 else own[0].clone() for name, own in parts.items()}
    return whole if view is None else {name: view(name, tensor) for name, tensor in whole.items()}


def _official_names(source: str | Part | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(source, tuple):
        return source
    return (source.name if isinstance(source, Part) else source,)


def _take(
    ours: str,
    target: torch.Tensor,
    source: str | Part | tuple[str, ...],
    state_dict: StateDict,
    kind: str,
    view: View | None,
) -> torch.Tensor:
    """One of our weights, of the shape of `target`, from the official ones."""
    official = _official_names(source)
    shape = list((target if view is None else view(official[0], target)).shape)
    if isinstance(source, Part):
        shape[0] *= source.number
    elif len(official) > 1:
        shape[0] //= len(official)
    for name in official:
        tensor = state_dict[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"`checkpoint` must hold floating-point weights of 16 bits or more, got {name} of {tensor.dtype}."
            )
        if list(tensor.shape) != shape:
            raise ValueError(
                f"`checkpoint` does not fit its {kind} configuration: {name} has the shape {tuple(tensor.shape)}, "
                f"{ours} needs {tuple(target.shape)}."
            )
    if isinstance(source, Part):
        return state_dict[source.name].chunk(source.number)[source.index].view(target.shape)
    tensors = [state_dict[name] for name in official]
    return tensors[0].view(target.shape) if len(tensors) == 1 else torch.cat(tensors)
