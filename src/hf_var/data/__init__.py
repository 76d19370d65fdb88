# SPDX-License-Identifier: Apache-2.0
"""Images or codes from any source that `datasets` reads, in an order that a resumed run continues exactly."""

from .batches import TrainingBatches
from .codes import (
    CODES_COLUMN,
    CodesRows,
    check_codes,
    codes_fingerprint,
    codes_rows,
    codes_schema,
    encode_codes,
    is_codes_dataset,
    tokenized_copies,
    tokenizer_fingerprint,
)
from .config import AugmentConfig, BatchArguments, DataArguments, DataConfig, ImageArguments
from .images import ImageRows, ImageTransform, image_rows, image_transform
from .labels import has_label_names, training_labels, validation_labels
from .rows import collate
from .sources import (
    AnyDataset,
    check_labels,
    find_image_column,
    find_label_column,
    label_names,
    load_source,
)
from .validation import ValidationBatches


__all__ = [
    "CODES_COLUMN",
    "AnyDataset",
    "AugmentConfig",
    "BatchArguments",
    "CodesRows",
    "DataArguments",
    "DataConfig",
    "ImageArguments",
    "ImageRows",
    "ImageTransform",
    "TrainingBatches",
    "ValidationBatches",
    "check_codes",
    "check_labels",
    "codes_fingerprint",
    "codes_rows",
    "codes_schema",
    "collate",
    "encode_codes",
    "find_image_column",
    "find_label_column",
    "has_label_names",
    "image_rows",
    "image_transform",
    "is_codes_dataset",
    "label_names",
    "load_source",
    "tokenized_copies",
    "tokenizer_fingerprint",
    "training_labels",
    "validation_labels",
]
