# SPDX-License-Identifier: Apache-2.0
"""Class labels as users write them: ids, names, `None` for unconditional, alone or in (nested) lists."""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


Labels = int | str | None | torch.Tensor | np.ndarray | np.generic | Sequence


def label_ids(labels: Labels, id2label: Mapping[int, str]) -> list[int]:
    """
    Ids of `labels`; unconditional ones (`None`, -1 or the number of labels) become the number of labels.

    Args:
        labels (`int`, `str`, `None`, `torch.Tensor` or a list of these):
            A name is an entry of `id2label` or one of its comma-separated synonyms.
        id2label (`dict[int, str]`): Names of the labels.

    Raises:
        `ValueError`: If a label is out of range, of another type, unknown, or names several labels, or if there are
            none.
    """
    num_labels = len(id2label)
    names = _ids_by_name(id2label)
    ids = [_label_id(label, num_labels, names) for label in _flatten(labels)]
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


def _ids_by_name(id2label: Mapping[int, str]) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for label, text in id2label.items():
        # The whole text first, then its synonyms, as in "tench, Tinca tinca".
        for name in dict.fromkeys([text, *(synonym.strip() for synonym in text.split(","))]):
            ids.setdefault(name, []).append(int(label))
    return ids


def _label_id(label: int | str | None, num_labels: int, names: dict[str, list[int]]) -> int:
    if label is None:
        return num_labels
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"`class_labels` must be ids, names or `None`, got {label!r} of type {type(label).__name__}.")
    if isinstance(label, int):
        if not -1 <= label <= num_labels:
            raise ValueError(
                f"`class_labels` must be in [0, {num_labels}), or -1, {num_labels} or `None` for unconditional, got "
                f"{label}."
            )
        return num_labels if label == -1 else label
    found = names.get(label, [])
    if len(found) > 1:
        raise ValueError(
            f"`class_labels` has the name {label!r}, which the labels {found} share: pass one of these ids."
        )
    if not found:
        lowered = {name.lower(): name for name in names}
        near = [lowered[name] for name in difflib.get_close_matches(label.lower(), lowered, n=3)]
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else "the names are in `transformer.config.id2label`."
        )
        raise ValueError(f"`class_labels` has the unknown name {label!r}; {hint}")
    return found[0]
