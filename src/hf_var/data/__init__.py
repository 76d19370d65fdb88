# SPDX-License-Identifier: Apache-2.0
"""Images or codes from any source that `datasets` reads, in an order that resumed runs reproduce exactly."""

from importlib import import_module
from typing import TYPE_CHECKING

from ..lazy import names_on_use


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

# The command line needs the configurations alone, without torch.
if TYPE_CHECKING:
    from .public import *
else:
    __getattr__ = names_on_use(__name__, __all__, lambda: import_module("hf_var.data.public"))

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
