# SPDX-License-Identifier: Apache-2.0
"""The data of a prior: images or their codes, and what they are conditioned on."""

from dataclasses import dataclass
from typing import NamedTuple

from transformers.utils import logging

from .. import data
from ..autoencoders import VQVAEModel
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
    """Rows of a training and of its validation; the classes' names, or the width of the embeddings, or neither."""

    train: Rows
    validation: Rows | None
    id2label: dict[int, str] | None
    condition_channels: int | None


def load_prior_data(
    config: data.DataConfig,
    augment: data.AugmentConfig,
    conditions: ConditionConfig,
    run: RunConfig,
    vqvae: VQVAEModel,
    known_labels: dict[int, str] | None = None,
) -> PriorData:
    """Load images, or codes of `vqvae`, with their conditions; `known_labels` are those of a trained prior."""
    column = conditions.condition_column
    if column is not None and config.label_column is not None:
        raise ValueError(
            f"`label_column` = {config.label_column!r} and `condition_column` = {column!r} exclude each other."
        )
    train, validation = load_splits(config, run)
    check_tokenizer("train_data", config.train_data, train, vqvae)
    if validation is not None:
        check_tokenizer("validation_data", str(config.validation_data), validation, vqvae)
    id2label, width, for_validation = None, None, None
    if column is not None:
        for_training = data.embedding_condition(train, column)
        width = for_training.size
        if validation is not None:
            for_validation = data.embedding_condition(validation, column)
            if for_validation.size != width:
                raise ValueError(
                    f"`condition_column` = {column!r} must hold {width} numbers in `validation_data` as in `train_data`, "
                    f"got {for_validation.size}."
                )
    else:
        for_training, id2label = data.training_labels(train, config.label_column, conditions.num_labels, known_labels)
        if validation is not None and id2label is not None:
            has_names = data.has_label_names(train, for_training)
            for_validation = data.validation_labels(validation, config.label_column, id2label, has_names)
    rows = Rows(train, make_row_reader(config, augment, train, vqvae, for_training))
    if validation is None:
        return PriorData(rows, None, id2label, width)
    reader = make_row_reader(config, None, validation, vqvae, for_validation)
    return PriorData(rows, Rows(validation, reader), id2label, width)


def check_tokenizer(argument: str, source: str, dataset: data.AnyDataset, vqvae: VQVAEModel) -> None:
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
    vqvae: VQVAEModel,
    condition: data.Condition | None,
) -> data.CodesRows | data.ImageRows:
    """How a row becomes an item: from codes as they are, or from an image."""
    if data.is_codes_dataset(dataset):
        return data.CodesRows(condition)
    return data.image_rows(config, augment, dataset, vqvae.config.image_size, vqvae.config.in_channels, condition)


def tokenize_copies(
    rows: Rows, copies: int, config: data.DataConfig, seed: int, vqvae: VQVAEModel, show_progress: bool
) -> Rows:
    """The codes of `copies` augmented copies of every image, in place of the images; the rows themselves if there are none."""
    if copies == 0 or data.is_codes_dataset(rows.dataset):
        return rows
    codes = data.tokenized_copies(rows.dataset, rows.reader, config, seed, vqvae, copies, show_progress)
    condition = data.LabelCondition("class_labels") if "class_labels" in codes.features else None
    if "class_embeds" in codes.features:
        condition = data.embedding_condition(codes, "class_embeds")
    return Rows(codes, data.CodesRows(condition))
