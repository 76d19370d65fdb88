# SPDX-License-Identifier: Apache-2.0
"""Which labels a transformer is trained on."""

from collections.abc import Mapping
from typing import Any, cast

import datasets
from transformers.utils import logging

from .sources import AnyDataset, check_labels, features_of, find_label_column, label_names


logger = logging.get_logger(__name__)


def training_labels(
    dataset: AnyDataset, label_column: str | None, num_labels: int | None, known: Mapping[int, str] | None = None
) -> tuple[str | None, dict[int, str] | None]:
    """
    The column of labels and their names; neither where `num_labels` is 0.

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows.
        label_column (`str`, *optional*): Name of the column.
        num_labels (`int`, *optional*): Number of classes; by default as many as in the data.
        known (`dict[int, str]`, *optional*):
            Names of a trained model's labels. Labels of the data that are numbers without names are these.

    Raises:
        `ValueError`: If there is no column of labels, or their number is another than `num_labels`.
    """
    if num_labels == 0:
        return None, None
    column = find_label_column(dataset, label_column)
    has_names = isinstance(features_of(dataset)[column], datasets.ClassLabel)
    if not has_names and known and num_labels in (None, len(known)):
        id2label = dict(known)
    elif not has_names and num_labels is not None:
        id2label = {label: str(label) for label in range(num_labels)}
    else:
        id2label = label_names(dataset, column)
    if num_labels not in (None, len(id2label)):
        raise ValueError(f"`num_labels` is {num_labels}, but the data names the labels {id2label}.")
    check_labels(dataset, column, len(id2label))
    new = [name for name in id2label.values() if known and name not in known.values()]
    if new:
        logger.warning(f"The trained model does not know the labels {new}: they begin as the unconditional class.")
    return column, id2label


def validation_labels(
    dataset: AnyDataset, label_column: str | None, id2label: Mapping[int, str], has_names: bool
) -> str:
    """
    The column of labels of validation data, which must mean the same as those of the training.

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows.
        label_column (`str`, *optional*): Name of the column.
        id2label (`dict[int, str]`): Labels of the training.
        has_names (`bool`): Whether the training data name them.

    Raises:
        `ValueError`: If labels have other names or are out of range.
    """
    column = find_label_column(dataset, label_column)
    feature: Any = features_of(dataset)[column]
    if has_names and isinstance(feature, datasets.ClassLabel) and feature.names != list(id2label.values()):
        raise ValueError(
            f"`validation_data` has the labels {cast(list, feature.names)}, those of the training are "
            f"{list(id2label.values())}."
        )
    check_labels(dataset, column, len(id2label))
    return column


def has_label_names(dataset: AnyDataset, column: str | None) -> bool:
    """Whether a data set names the labels of a column."""
    return column is not None and isinstance(features_of(dataset)[column], datasets.ClassLabel)
