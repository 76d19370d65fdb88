# SPDX-License-Identifier: Apache-2.0
"""
Conditions of images, such as classes, embeddings or texts: from a row of a data set to an argument of the prior.

A condition knows its column, and makes `class_labels`, `class_embeds` or `condition_ids` from a row. Row readers use it and
contain no code for labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from transformers.utils import logging

from .sources import AnyDataset, check_column, features_of


logger = logging.get_logger(__name__)

# More classes suggest numbers with another meaning, such as ids of images.
MOST_CLASSES = 2**20
ROWS_AT_ONCE = 4096
TEXT_TYPES = ("string", "large_string", "string_view")


@dataclass(frozen=True)
class LabelCondition:
    """The class of an image, `class_labels`; `json.label`, if it `is_nested`, is a field of the column `json`."""

    column: str
    num_labels: int | None = None
    names: tuple[str, ...] | None = None
    is_nested: bool = False

    @property
    def source_column(self) -> str:
        return self._path[0]

    @cached_property
    def _path(self) -> list[str]:
        return self.column.split(".") if self.is_nested else [self.column]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.names or ())}

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        label: Any = row
        for name in self._path:
            label = label[name]
        if self.names is not None and isinstance(label, str):
            if label not in self._ids:
                raise ValueError(
                    f"`label_column` = {self.column!r} must hold one of {list(self.names)}, got {label!r}."
                )
            return {"class_labels": self._ids[label]}
        if not isinstance(label, (int, np.integer)):
            raise ValueError(f"`label_column` = {self.column!r} must hold integers, got {label!r}.")
        if label < 0 or (self.num_labels is not None and label >= self.num_labels):
            limit = "at least 0" if self.num_labels is None else f"from 0 to {self.num_labels - 1}"
            raise ValueError(f"`label_column` = {self.column!r} must hold labels {limit}, got {label}.")
        return {"class_labels": int(label)}


@dataclass(frozen=True)
class SizedCondition:
    """A column of as many numbers, `size`, in every row."""

    column: str
    size: int

    @property
    def source_column(self) -> str:
        return self.column


@dataclass(frozen=True)
class EmbeddingCondition(SizedCondition):
    """A precomputed embedding of `size` numbers, `class_embeds`."""

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        value = row[self.column]
        embedding = np.asarray(np.nan if value is None else value, dtype=np.float32)
        if embedding.ndim != 1 or not self.fits(embedding):
            raise ValueError(
                f"`condition_column` = {self.column!r} must hold {self.size} finite numbers in every row, got {value!r}."
            )
        return {"class_embeds": embedding}

    def fits(self, values: np.ndarray) -> bool:
        """Whether all of `values` `(..., size)` are embeddings."""
        return values.shape[-1:] == (self.size,) and bool(np.isfinite(values).all())


@dataclass(frozen=True)
class TokenCondition(SizedCondition):
    """`size` token ids below `num_ids`, `condition_ids`: those of another tokenizer, or of a text."""

    num_ids: int

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        ids = np.asarray([] if row[self.column] is None else row[self.column])
        if ids.ndim != 1 or not self.fits(ids):
            raise ValueError(
                f"`condition_column` = {self.column!r} must hold {self.size} integers from 0 to {self.num_ids - 1} in every "
                f"row, got {row[self.column]!r}."
            )
        return {"condition_ids": ids.astype(np.int64)}

    def fits(self, values: np.ndarray) -> bool:
        """Whether all of `values` `(..., size)` are token ids."""
        if values.shape[-1:] != (self.size,) or not np.issubdtype(values.dtype, np.integer):
            return False
        return bool(values.min() >= 0 and values.max() < self.num_ids)


@dataclass(frozen=True)
class StoredCondition:
    """What another condition has read and a data set of codes has stored, in a column of the argument's name."""

    source_column: str

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        return {self.source_column: np.asarray(row[self.source_column])}


class Condition(Protocol):
    """Makes an argument of the prior from a column of a row."""

    @property
    def source_column(self) -> str: ...

    def read(self, row: dict[str, Any]) -> dict[str, Any]: ...


# --------------------------------------------------------------------------------------------------------------------
# Finding and checking


def embedding_condition(dataset: AnyDataset, column: str) -> EmbeddingCondition:
    """The condition that a column of lists or arrays of numbers is, as many in every row."""
    features = features_of(dataset)
    check_column("condition_column", column, features)
    feature: Any = features[column]
    value = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else None
    if not isinstance(value, datasets.Value) or not value.dtype.startswith("float"):
        raise ValueError(f"`condition_column` = {column!r} must hold lists of floating point numbers, got {feature}.")
    size = getattr(feature, "length", -1)
    if size < 0:
        size = first_length(dataset, column, "number")
    condition = EmbeddingCondition(column, size)
    check_rows(dataset, condition)
    return condition


def first_length(dataset: AnyDataset, column: str, kind: str) -> int:
    """Length of the list in the first row."""
    first = next(iter(dataset.select_columns([column])), {column: None})[column]
    if not first:
        raise ValueError(f"`condition_column` = {column!r} must hold at least one {kind}, got an empty first row.")
    return len(first)


def check_rows(dataset: AnyDataset, condition: EmbeddingCondition | TokenCondition) -> None:
    """Raise a `ValueError` that shows the first row without the condition; those of a stream are checked when read."""
    if not isinstance(dataset, datasets.Dataset):
        return
    rows = dataset.select_columns([condition.column])
    arrays = rows.with_format("numpy")
    for first in range(0, len(rows), ROWS_AT_ONCE):
        numbers = range(first, min(first + ROWS_AT_ONCE, len(rows)))
        values: Any = arrays[numbers.start : numbers.stop][condition.column]
        # Rows of several sizes are an array of arrays.
        if values.ndim == 2 and condition.fits(values):
            continue
        for number in numbers:
            condition.read(rows[number])


def find_label_column(dataset: AnyDataset, column: str | None) -> str:
    """The column of labels: `column`, or one that is called or typed like labels."""
    features = features_of(dataset)
    if column is not None:
        _feature(features, column)
        return column
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in ("label", "cls") if name in features]
    for found in (named, typed):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"Found no column of labels among the columns {list(features)}. Name it with `label_column`, or train without "
        "classes with `num_labels` 0."
    )


def label_feature(dataset: AnyDataset, column: str | None) -> Any:
    """The type of the column of labels, `ClassLabel` or `Value` of numbers; that of texts is `None`."""
    feature = _feature(features_of(dataset), find_label_column(dataset, column))
    return None if holds_texts(feature) else feature


def label_condition(dataset: AnyDataset, column: str, id2label: Mapping[int, str] | None = None) -> LabelCondition:
    """The condition that a column of labels is, with `id2label` if the classes are known."""
    features = features_of(dataset)
    holds_names = id2label is not None and holds_texts(_feature(features, column))
    names = tuple(id2label.values()) if id2label is not None and holds_names else None
    num_labels = None if id2label is None else len(id2label)
    return LabelCondition(column, num_labels, names, is_nested=column not in features)


def label_names(dataset: AnyDataset, column: str) -> dict[int, str]:
    """`id2label` of a column of labels: its names in order, texts by alphabet, otherwise its numbers."""
    feature = _feature(features_of(dataset), column)
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    if isinstance(dataset, datasets.IterableDataset):
        hint = "choose a column of numbers" if holds_texts(feature) else "set `num_labels`"
        raise ValueError(
            f"`label_column` = {column!r} of a stream does not tell how many labels there are: {hint}, or read the data "
            "without `streaming`."
        )
    labels = _labels(dataset, column)
    if holds_texts(feature):
        return dict(enumerate(sorted(labels.unique().to_pylist())))
    _, highest = _extremes(labels)
    if highest >= MOST_CLASSES:
        raise ValueError(
            f"`label_column` = {column!r} holds numbers up to {highest}, too many for classes, which count from 0. Store "
            "them as texts if each of them is a class, or name another column."
        )
    return {label: str(label) for label in range(highest + 1)}


def check_labels(dataset: AnyDataset, column: str, num_labels: int, names: Sequence[str] | None = None) -> None:
    """Check that labels are below `num_labels`, or among `names`; those of a stream are when they are read."""
    if isinstance(dataset, datasets.IterableDataset):
        return
    labels = _labels(dataset, column)
    if holds_texts(_feature(dataset.features, column)):
        unknown = sorted(set(labels.unique().to_pylist()) - set(names or ()))
        if unknown:
            raise ValueError(f"`label_column` = {column!r} holds {unknown}, which are not among {list(names or ())}.")
        return
    lowest, highest = _extremes(labels)
    if lowest < 0 or highest >= num_labels:
        raise ValueError(
            f"`label_column` = {column!r} must hold labels from 0 to {num_labels - 1}, got values from {lowest} to "
            f"{highest}."
        )


def _labels(dataset: datasets.Dataset, column: str) -> pyarrow.ChunkedArray:
    """A column of labels, none of which is missing, without a Python object for every row."""
    _feature(dataset.features, column)
    root, *fields = label_condition(dataset, column)._path
    labels: Any = cast(Any, dataset.select_columns([root]).with_format("arrow")[:])[root]
    for name in fields:
        labels = cast(Any, pyarrow.compute).struct_field(labels, name)
    if labels.null_count > 0:
        raise ValueError(
            f"`label_column` = {column!r} must hold a label in every row, got {labels.null_count} of {len(labels)} rows "
            "without one. Leave these rows out, or train without classes with `num_labels` 0."
        )
    return labels


def _extremes(labels: pyarrow.ChunkedArray) -> tuple[int, int]:
    return tuple(cast(Any, pyarrow.compute).min_max(labels).as_py().values())


def _feature(features: datasets.Features, column: str) -> Any:
    """The type of a column, or of a field of a column of structures."""
    feature: Any = features
    names = [column] if column in features else column.split(".")
    for name in names:
        if not isinstance(feature, Mapping) or name not in feature:
            check_column("label_column", column, features)
        feature = feature[name]
    if isinstance(feature, Mapping):
        raise ValueError(
            f"`label_column` = {column!r} holds structures. Name one of {[f'{column}.{name}' for name in feature]}."
        )
    is_integer = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    if not is_integer and not isinstance(feature, datasets.ClassLabel) and not holds_texts(feature):
        raise ValueError(
            f"`label_column` = {column!r} must hold integers or texts, got {feature}. Convert it, or name another column."
        )
    return feature


def holds_texts(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in TEXT_TYPES


# --------------------------------------------------------------------------------------------------------------------
# Training and validation


def training_labels(
    dataset: AnyDataset, label_column: str | None, num_labels: int | None, known: Mapping[int, str] | None = None
) -> tuple[LabelCondition | None, dict[int, str] | None]:
    """The classes of a training and their names, or neither; numbers without names are those of the `known` labels."""
    if num_labels == 0:
        return None, None
    column = find_label_column(dataset, label_column)
    feature = _feature(features_of(dataset), column)
    is_number = not isinstance(feature, datasets.ClassLabel) and not holds_texts(feature)
    is_unknown_stream = holds_texts(feature) and isinstance(dataset, datasets.IterableDataset)
    if (is_number or is_unknown_stream) and known and num_labels in (None, len(known)):
        id2label = dict(known)
    elif is_number and num_labels is not None:
        id2label = {label: str(label) for label in range(num_labels)}
    else:
        id2label = label_names(dataset, column)
    if num_labels not in (None, len(id2label)):
        raise ValueError(f"`num_labels` is {num_labels}, but the data names the labels {id2label}.")
    condition = label_condition(dataset, column, id2label)
    check_labels(dataset, column, len(id2label), condition.names)
    new = [name for name in id2label.values() if known and name not in known.values()]
    if new:
        logger.warning(f"The trained model does not know the labels {new}: they begin as the unconditional class.")
    return condition, id2label


def validation_labels(
    dataset: AnyDataset, label_column: str | None, id2label: Mapping[int, str], has_names: bool
) -> LabelCondition:
    """The classes of validation data, which must mean those of the training, named there if it `has_names`."""
    column = find_label_column(dataset, label_column)
    feature: Any = _feature(features_of(dataset), column)
    names = tuple(id2label.values())
    if has_names and isinstance(feature, datasets.ClassLabel) and feature.names != list(names):
        raise ValueError(
            f"`validation_data` has the labels {cast(list, feature.names)}, those of the training are {list(names)}."
        )
    check_labels(dataset, column, len(names), names)
    return label_condition(dataset, column, id2label)


def has_label_names(dataset: AnyDataset, condition: LabelCondition | None) -> bool:
    """Whether the data name the labels of a condition."""
    if condition is None:
        return False
    return condition.names is not None or isinstance(
        _feature(features_of(dataset), condition.column), datasets.ClassLabel
    )
