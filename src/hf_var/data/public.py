# SPDX-License-Identifier: Apache-2.0
"""The public names of `hf_var.data`, to which they belong."""

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
