# SPDX-License-Identifier: Apache-2.0
"""What images are drawn for: from the labels that users write to what a transformer reads, with its guidance half."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from ..priors import VARTransformer


Labels = int | str | None | torch.Tensor | np.ndarray | np.generic | Sequence


class Condition(Protocol):
    """What the images of a call are drawn for, one entry per image."""

    def __len__(self) -> int: ...

    @property
    def is_unconditional(self) -> bool:
        """Whether guidance would have nothing to contrast with."""
        ...

    @property
    def class_labels(self) -> torch.Tensor:
        """Ids `(batch,)` of the classes, for functions that score images; the number of labels where there is none."""
        ...

    def select(self, items: Sequence[int]) -> "Condition":
        """The condition whose image i has the entry `items[i]` of this one."""
        ...

    def arguments(self, transformer: VARTransformer, device: torch.device, guided: bool) -> dict[str, torch.Tensor]:
        """
        Arguments of the transformer's first call, each with the batch as its first dimension; if `guided`, with the
        unconditional half of the batch behind the conditional one.
        """
        ...


@dataclass(frozen=True)
class ClassIds:
    """Classes by their ids; `num_labels` stands for unconditional."""

    ids: list[int]
    num_labels: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_unconditional(self) -> bool:
        return all(label == self.num_labels for label in self.ids)

    @property
    def class_labels(self) -> torch.Tensor:
        return torch.tensor(self.ids)

    def select(self, items: Sequence[int]) -> "ClassIds":
        return replace(self, ids=[self.ids[item] for item in items])

    def arguments(self, transformer: VARTransformer, device: torch.device, guided: bool) -> dict[str, torch.Tensor]:
        unconditional = [self.num_labels] * len(self) if guided else []
        return {"class_labels": torch.tensor(self.ids + unconditional, device=device)}


@dataclass(frozen=True)
class ClassEmbeds:
    """Classes by their embeddings `(batch, hidden_size)`."""

    embeds: torch.Tensor
    num_labels: int

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def is_unconditional(self) -> bool:
        return False

    @property
    def class_labels(self) -> torch.Tensor:
        return torch.full((len(self),), self.num_labels)

    def select(self, items: Sequence[int]) -> "ClassEmbeds":
        return replace(self, embeds=self.embeds[list(items)])

    def arguments(self, transformer: VARTransformer, device: torch.device, guided: bool) -> dict[str, torch.Tensor]:
        embeds = self.embeds.to(device)
        if guided:
            unconditional: torch.Tensor = transformer.get_class_embeds(self.class_labels)  # pyright: ignore
            embeds = torch.cat([embeds, unconditional.to(embeds)])
        return {"class_embeds": embeds}


def class_condition(
    transformer: VARTransformer, class_labels: Labels, class_embeds: torch.Tensor | None = None
) -> ClassIds | ClassEmbeds:
    """The condition that is given by `class_labels` or `class_embeds`; a `ValueError` if they are out of range."""
    config = transformer.config
    num_labels = config.num_labels or 0
    if class_embeds is None:
        return ClassIds(label_ids(class_labels, config.id2label), num_labels)
    if class_labels is not None:
        raise ValueError("Pass one of `class_labels` and `class_embeds`, not both.")
    shape = tuple(class_embeds.shape) if isinstance(class_embeds, torch.Tensor) else type(class_embeds).__name__
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != config.hidden_size:
        raise ValueError(f"`class_embeds` must have the shape (batch, {config.hidden_size}), got {shape}.")
    return ClassEmbeds(class_embeds, num_labels)


def label_ids(labels: Labels, id2label: Mapping[Any, str] | None) -> list[int]:
    """
    Ids of labels as users write them; unconditional ones (`None`, -1 or the number of labels) become the number of labels.

    Args:
        labels (`int`, `str`, `None`, `torch.Tensor` or a list of these):
            A text is an entry of `id2label`, one of its comma-separated synonyms, or the digits of an id.
        id2label (`dict[int, str]`): Names of the labels.

    Raises:
        `ValueError`: If a label is out of range, of another type, unknown or ambiguous, or if there are none.
    """
    id2label = id2label or {}
    names = _ids_by_name(id2label)
    ids = [_label_id(label, len(id2label), names) for label in _flatten(labels)]
    if not ids:
        raise ValueError("`class_labels` must hold at least one label, got an empty list.")
    return ids


def _flatten(labels: Labels) -> list:
    if isinstance(labels, torch.Tensor):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"`class_labels` must be integers, got a tensor of {labels.dtype}.")
        return labels.flatten().tolist()
    if isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)):
        return [single for label in labels for single in _flatten(label)]
    if isinstance(labels, (np.ndarray, np.generic)):
        return _flatten(labels.tolist())
    return [labels]


def _ids_by_name(id2label: Mapping[Any, str]) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for label, text in id2label.items():
        # The whole text first, then its synonyms, as in "tench, Tinca tinca".
        for name in dict.fromkeys([text, *(synonym.strip() for synonym in text.split(","))]):
            ids.setdefault(name, []).append(int(label))
    return ids


def _label_id(label: int | str | None, num_labels: int, names: Mapping[str, list[int]]) -> int:
    if label is None:
        return num_labels
    if isinstance(label, str):
        return _id_of_text(label, num_labels, names)
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"`class_labels` must be ids, names or `None`, got {label!r} of type {type(label).__name__}.")
    if not -1 <= label <= num_labels:
        raise ValueError(
            f"`class_labels` must be in [0, {num_labels}), or -1, {num_labels} or `None` for unconditional, got {label}."
        )
    return num_labels if label == -1 else label


def _id_of_text(text: str, num_labels: int, names: Mapping[str, list[int]]) -> int:
    """The label that `text` names, or whose id it spells. On a command line everything is a text, so both must work."""
    found = names.get(text, [])
    spelled = int(text) if text.removeprefix("-").isdecimal() else None
    if len(found) > 1:
        raise ValueError(
            f"`class_labels` has the name {text!r}, which the labels {found} share: pass one of these ids."
        )
    if found and spelled is not None and spelled != found[0] and -1 <= spelled <= num_labels:
        raise ValueError(
            f"`class_labels` has {text!r}, which is both the name of label {found[0]} and the id of another: write "
            f"'name:{text}' or 'id:{text}'."
        )
    if found:
        return found[0]
    if spelled is not None:
        return _label_id(spelled, num_labels, names)
    kind, _, rest = text.partition(":")
    if kind == "name" and len(names.get(rest, [])) == 1:
        return names[rest][0]
    if kind == "id" and rest.removeprefix("-").isdecimal():
        return _label_id(int(rest), num_labels, names)
    lowered = {name.lower(): name for name in names}
    near = [lowered[name] for name in difflib.get_close_matches(text.lower(), lowered, n=3)]
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?" if near else "the names are in `transformer.config.id2label`."
    )
    raise ValueError(f"`class_labels` has the unknown name {text!r}; {hint}")
