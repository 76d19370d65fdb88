# SPDX-License-Identifier: Apache-2.0
"""The data of a prior: images or their codes, and what they are conditioned on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers.utils import logging

from .. import data
from ..autoencoders import Tokenizer
from ..ranges import CheckedFields, NonNegativeInt, argument
from .run import RunConfig
from .setup import Rows, load_splits


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class ConditionConfig(CheckedFields):
    """What a prior is conditioned on: by default, the classes that the data has."""

    num_labels: NonNegativeInt | None = argument(None, help="0: without classes; default: as many as in the data")
    condition_column: str | None = argument(
        None, help="column of embeddings that the images are conditioned on in place of classes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition_column is not None and self.num_labels not in (None, 0):
            raise ValueError(
                f"`num_labels` must be 0 with `condition_column` = {self.condition_column!r}, got {self.num_labels}."
            )


class PriorData(NamedTuple):
    """Rows of a training and of its validation; the classes' names, or the size of the condition, or neither."""

    train: Rows
    validation: Rows | None
    id2label: dict[int, str] | None
    condition_size: int | None


# Makes the condition of a column, of images that are changed at random or not.
ConditionMaker = Callable[[data.AnyDataset, str, data.AugmentConfig | None], Any]


def read_embeddings(dataset: data.AnyDataset, column: str, augment: data.AugmentConfig | None) -> data.Condition:
    """A column as embeddings."""
    return data.embedding_condition(dataset, column)


def load_prior_data(
    config: data.DataConfig,
    augment: data.AugmentConfig,
    conditions: ConditionConfig,
    run: RunConfig,
    vqvae: Tokenizer,
    known_labels: dict[int, str] | None = None,
    make_condition: ConditionMaker = read_embeddings,
) -> PriorData:
    """
    Load images, or codes of `vqvae`, with their conditions; `known_labels` are those of a trained prior, and a
    `condition_column` is what `make_condition` makes of it.
    """
    column = conditions.condition_column
    if column is not None and config.label_column is not None:
        raise ValueError(
            f"`label_column` = {config.label_column!r} and `condition_column` = {column!r} exclude each other."
        )
    train, validation = load_splits(config, run)
    check_tokenizer("train_data", config.train_data, train, vqvae)
    if validation is not None:
        check_tokenizer("validation_data", str(config.validation_data), validation, vqvae)
    id2label, size, for_validation = None, None, None
    if column is not None:
        for_training = make_condition(train, column, augment)
        size = for_training.size
        if validation is not None:
            for_validation = make_condition(validation, column, None)
            if for_validation.size != size:
                raise ValueError(
                    f"`condition_column` = {column!r} must hold {size} numbers in `validation_data` as in `train_data`, "
                    f"got {for_validation.size}."
                )
    else:
        for_training, id2label = data.training_labels(train, config.label_column, conditions.num_labels, known_labels)
        if validation is not None and id2label is not None:
            has_names = data.has_label_names(train, for_training)
            for_validation = data.validation_labels(validation, config.label_column, id2label, has_names)
    rows = Rows(train, make_row_reader(config, augment, train, vqvae, for_training))
    if validation is None:
        return PriorData(rows, None, id2label, size)
    reader = make_row_reader(config, None, validation, vqvae, for_validation)
    return PriorData(rows, Rows(validation, reader), id2label, size)


def adopt_fields(given: dict[str, Any], known: Mapping[str, Any], source: str) -> None:
    """Add the fields of a configuration that `source` settles to those that are `given`, which must not differ."""
    for name, value in known.items():
        if given.setdefault(name, value) != value:
            raise ValueError(f"`{name}` is {value} in {source}, got {given[name]}.")


def check_tokenizer(argument: str, source: str, dataset: data.AnyDataset, vqvae: Tokenizer) -> None:
    """Raise a `ValueError` if the data set that an argument names holds codes of another tokenizer."""
    if not data.is_codes_dataset(dataset):
        return
    data.check_codes_column(dataset, sum(vqvae.config.scale_lengths), vqvae.config.codebook_size)
    made_by = data.codes_fingerprint(source)
    if made_by is None:
        logger.warning(f"`{argument}` does not say which tokenizer made its codes: it should be `vqvae`.")
    elif made_by != data.tokenizer_fingerprint(vqvae):
        raise ValueError(f"The codes in `{argument}` = {source!r} were made by another tokenizer than `vqvae`.")


def make_row_reader(
    config: data.DataConfig,
    augment: data.AugmentConfig | None,
    dataset: data.AnyDataset,
    vqvae: Tokenizer,
    condition: data.Condition | None,
) -> data.CodesRows | data.ImageRows:
    """How a row becomes an item: from codes as they are, or from an image."""
    if data.is_codes_dataset(dataset):
        if isinstance(condition, data.ImageCondition):
            raise ValueError(
                f"`condition_column` = {condition.source_column!r} must hold codes where the data set holds codes, got images."
            )
        return data.CodesRows(condition)
    sizes = vqvae.config.image_size, vqvae.config.in_channels
    return data.image_rows(config, augment, dataset, *sizes, condition, vqvae.config.num_pixel_classes)


def tokenize_copies(
    rows: Rows,
    copies: int,
    config: data.DataConfig,
    seed: int,
    vqvae: Tokenizer,
    show_progress: bool,
    condition_vqvae: Tokenizer | None = None,
) -> Rows:
    """
    The codes of `copies` augmented copies of every image, and of the image that is its condition, in place of the images,
    unless there are none.
    """
    if copies == 0 or data.is_codes_dataset(rows.dataset):
        return rows
    codes = data.tokenized_copies(
        rows.dataset, rows.reader, config, seed, vqvae, copies, show_progress, condition_vqvae
    )
    names = [name for name in codes.column_names if name != data.CODES_COLUMN]
    return Rows(codes, data.CodesRows(data.StoredCondition(names[0]) if names else None))
