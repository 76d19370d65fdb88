# SPDX-License-Identifier: Apache-2.0
"""Images or codes from any source that `datasets` reads, in an order that resumed runs reproduce exactly."""

from .batches import TrainingBatches, ValidationBatches
from .codes import (
    CODES_COLUMN,
    TEXT_ENCODER_KEY,
    CodesRows,
    check_codes_column,
    codes_fingerprint,
    codes_schema,
    encode_codes,
    is_codes_dataset,
    tokenized_copies,
    tokenizer_fingerprint,
)
from .conditions import (
    Condition,
    EmbeddingCondition,
    LabelCondition,
    StoredCondition,
    TokenCondition,
    check_labels,
    embedding_condition,
    find_label_column,
    has_label_names,
    label_names,
    training_labels,
    validation_labels,
)
from .config import AugmentConfig, DataConfig, ReadingConfig
from .images import ImageCondition, ImageRows, ImageTransform, OrderedImages, image_condition, image_rows
from .rows import collate
from .sources import AnyDataset, find_image_column, load_source
from .text_conditions import (
    CaptionCondition,
    EmbeddedCaptionCondition,
    TextCondition,
    caption_condition,
    embedded_caption_feature,
    first_captions,
    holds_embedded_captions,
    token_condition,
)


__all__ = [
    "CODES_COLUMN",
    "TEXT_ENCODER_KEY",
    "AnyDataset",
    "AugmentConfig",
    "CaptionCondition",
    "CodesRows",
    "Condition",
    "DataConfig",
    "EmbeddedCaptionCondition",
    "EmbeddingCondition",
    "ImageCondition",
    "ImageRows",
    "ImageTransform",
    "LabelCondition",
    "OrderedImages",
    "ReadingConfig",
    "StoredCondition",
    "TextCondition",
    "TokenCondition",
    "TrainingBatches",
    "ValidationBatches",
    "caption_condition",
    "check_codes_column",
    "check_labels",
    "codes_fingerprint",
    "codes_schema",
    "collate",
    "embedded_caption_feature",
    "embedding_condition",
    "encode_codes",
    "find_image_column",
    "find_label_column",
    "first_captions",
    "has_label_names",
    "holds_embedded_captions",
    "image_condition",
    "image_rows",
    "is_codes_dataset",
    "label_names",
    "load_source",
    "token_condition",
    "tokenized_copies",
    "tokenizer_fingerprint",
    "training_labels",
    "validation_labels",
]
