# SPDX-License-Identifier: Apache-2.0
"""Conditions of a call: from the user's labels or embeddings to the transformer's arguments, with the guidance half."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..priors import RQTransformerConfig, VARConfig, VARTransformer
from .condition_inputs import as_texts


Labels = int | str | None | torch.Tensor | np.ndarray | np.generic | Sequence


@dataclass(frozen=True)
class Condition:
    """
    The condition of the images of a call.

    Args:
        entries (`dict[str, torch.Tensor]`): Arguments of the transformer's first call, with one entry for each image.
        nothing (`Callable`):
            Returns the entry of an unconditional image, or one for each image, which guidance contrasts with.
        class_labels (`torch.LongTensor` of shape `(batch,)`):
            Ids of the classes, for functions that score images; the number of labels where there is none.
        is_unconditional (`bool`): Whether guidance has nothing to contrast with.
        name (`str`): The argument that gave it.
    """

    entries: Mapping[str, torch.Tensor]
    nothing: Callable[[], Mapping[str, torch.Tensor]]
    class_labels: torch.Tensor
    is_unconditional: bool = False
    name: str = "class_labels"

    def __len__(self) -> int:
        return len(self.class_labels)

    def is_lacking(self, num_labels: int | None) -> bool:
        """Whether an image has no condition."""
        has_labels = "class_labels" in self.entries
        return self.is_unconditional or (has_labels and bool((self.class_labels == num_labels).any()))

    def select(self, items: Sequence[int]) -> "Condition":
        """The condition whose image i has the entry `items[i]` of this one."""
        chosen = list(items)

        def nothing() -> Mapping[str, torch.Tensor]:
            entries = self.nothing()
            return {name: values if len(values) == 1 else values[chosen] for name, values in entries.items()}

        entries = {name: values[chosen] for name, values in self.entries.items()}
        return replace(self, entries=entries, nothing=nothing, class_labels=self.class_labels[chosen])

    def arguments(self, device: torch.device, guided: bool) -> dict[str, torch.Tensor]:
        """Arguments of the transformer's first call; if `guided`, with the unconditional half of the batch at the end."""
        entries = {name: values.to(device) for name, values in self.entries.items()}
        if not guided:
            return entries
        nothing = self.nothing()
        return {
            name: torch.cat([values, nothing[name].to(values).expand_as(values)]) for name, values in entries.items()
        }


def class_condition(
    transformer: VARTransformer,
    class_labels: Labels,
    class_embeds: torch.Tensor | None = None,
    prompt: str | Sequence[str] | None = None,
) -> Condition:
    """
    The condition that is given by `class_labels`, by `prompt`, which holds labels as texts, or by `class_embeds`; a
    `ValueError` if they are out of range.
    """
    config = transformer.config
    if class_embeds is not None and not isinstance(config, VARConfig):
        raise ValueError(f"`class_embeds` need a VARTransformer, got a {type(transformer).__name__}.")
    given = {"class_labels": class_labels, "prompt": prompt, "class_embeds": class_embeds}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"Pass one of {' and '.join(f'`{name}`' for name in names)}, not both.")
    unconditional = torch.tensor([config.num_labels or 0])
    if class_embeds is None:
        name = "class_labels" if prompt is None else "prompt"
        # As for a model that reads texts, the empty one is no condition.
        labels = class_labels if prompt is None else [text or None for text in as_texts(name, prompt)]
        ids = torch.tensor(label_ids(labels, config.id2label, name))
        is_unconditional = bool((ids == unconditional).all())
        return Condition({"class_labels": ids}, lambda: {"class_labels": unconditional}, ids, is_unconditional, name)
    if not isinstance(class_embeds, torch.Tensor) or not class_embeds.is_floating_point():
        kind = class_embeds.dtype if isinstance(class_embeds, torch.Tensor) else type(class_embeds).__name__
        raise ValueError(f"`class_embeds` must be a tensor of floating-point numbers, got {kind}.")
    shape = tuple(class_embeds.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] != config.condition_size:
        raise ValueError(f"`class_embeds` must have the shape (batch, {config.condition_size}), got {shape}.")
    if not class_embeds.isfinite().all():
        raise ValueError("`class_embeds` must be finite, got NaN or infinity among them.")
    return Condition(
        {"class_embeds": class_embeds},
        lambda: {"class_embeds": transformer.get_class_embeds(unconditional)},  # pyright: ignore
        unconditional.expand(len(class_embeds)),
        name="class_embeds",
    )


def knows_unconditional(config: Any) -> bool:
    """Whether a prior can do without its condition."""
    if isinstance(config, RQTransformerConfig):
        return config.unconditional_id is not None
    return not config.num_labels or config.class_dropout_prob > 0


def ids_condition(config: RQTransformerConfig, ids: torch.Tensor | None, name: str, number: int = 1) -> Condition:
    """
    The condition of condition tokens `(batch, condition_length)`, the argument `name`; if there are none, `number` images
    without a condition.
    """
    nothing = torch.full((1, 1), -1)
    given = nothing.expand(number, config.condition_length) if ids is None else ids
    no_classes = torch.full((len(given),), config.num_labels or 0)
    return Condition({"condition_ids": given}, lambda: {"condition_ids": nothing}, no_classes, ids is None, name=name)


def label_ids(labels: Labels, id2label: Mapping[Any, str] | None, argument: str = "class_labels") -> list[int]:
    """
    Ids of labels as users write them, see [`~VARPipeline.get_label_ids`]; `num_labels` means unconditional. `argument` is
    where they come from, for messages.
    """
    names: dict[str, list[int]] = {}
    for label, text in (id2label or {}).items():
        # The whole text first, then its synonyms, as in "tench, Tinca tinca".
        for name in dict.fromkeys([text, *(synonym.strip() for synonym in text.split(","))]):
            names.setdefault(name, []).append(int(label))
    ids = [_label_id(label, len(id2label or {}), names, argument) for label in _flatten(labels, argument)]
    if not ids:
        raise ValueError(f"`{argument}` must hold at least one label, got an empty list.")
    return ids


def _flatten(labels: Labels, argument: str) -> list:
    if isinstance(labels, torch.Tensor):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"`{argument}` must be integers, got a tensor of {labels.dtype}.")
        return labels.flatten().tolist()
    if isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)):
        return [single for label in labels for single in _flatten(label, argument)]
    if isinstance(labels, (np.ndarray, np.generic)):
        return _flatten(labels.tolist(), argument)
    return [labels]


def _label_id(label: int | str | None, num_labels: int, names: Mapping[str, list[int]], argument: str) -> int:
    if label is None:
        return num_labels
    if isinstance(label, str):
        return _id_of_text(label, num_labels, names, argument)
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"`{argument}` must be ids, names or `None`, got {label!r} of type {type(label).__name__}.")
    if not num_labels and label not in (-1, 0):
        raise ValueError(f"`{argument}` must be left out, since the model has no classes, got {label!r}.")
    if not -1 <= label <= num_labels:
        raise ValueError(
            f"`{argument}` must be in [0, {num_labels}), or -1, {num_labels} or `None` for unconditional, got {label}."
        )
    return num_labels if label == -1 else label


def _id_of_text(text: str, num_labels: int, names: Mapping[str, list[int]], argument: str) -> int:
    """The label that `text` names, or whose id it spells. On a command line everything is a text, so both must work."""
    found = names.get(text, [])
    spelled = int(text) if text.removeprefix("-").isdecimal() else None
    if len(found) > 1:
        raise ValueError(f"`{argument}` has the name {text!r}, which the labels {found} share: pass one of these ids.")
    if found and spelled is not None and spelled != found[0] and -1 <= spelled <= num_labels:
        raise ValueError(
            f"`{argument}` has {text!r}, which is both the name of label {found[0]} and the id of another: write "
            f"'name:{text}' or 'id:{text}'."
        )
    if found:
        return found[0]
    if spelled is not None:
        return _label_id(spelled, num_labels, names, argument)
    kind, _, rest = text.partition(":")
    if kind == "name" and len(names.get(rest, [])) == 1:
        return names[rest][0]
    if kind == "id" and rest.removeprefix("-").isdecimal():
        return _label_id(int(rest), num_labels, names, argument)
    lowered = {name.lower(): name for name in names}
    near = [lowered[name] for name in difflib.get_close_matches(text.lower(), lowered, n=3)]
    hint = "the names are in `pipe.id2label`." if names else "the model has no classes."
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else hint
    raise ValueError(f"`{argument}` has the unknown name {text!r}; {hint}")
