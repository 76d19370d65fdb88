# SPDX-License-Identifier: Apache-2.0
"""From the parts of units, as they are read, to rows of codes."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from accelerate import Accelerator

from ..autoencoders import Tokenizer
from ..text_encoders import TextEncoders, encode_ids
from .codes import encode_codes
from .codes_files import codes_table
from .rows import Tally
from .text_conditions import POOLED_PROMPT_EMBEDS, PROMPT_EMBEDS
from .tokenization_config import TokenizationConfig
from .work_units import Part


# Column of stored embeddings of texts.
CAPTIONS_COLUMN = "caption_embeds"


class EncodedPart(NamedTuple):
    """A [`Part`] with the rows of the file in place of the batch."""

    unit: int
    rows: pyarrow.Table | None
    tally: Tally
    is_last: bool


@dataclass
class PartEncoder:
    """Encodes parts into rows with the columns of `schema`."""

    config: TokenizationConfig
    vqvae: Tokenizer
    encoders: TextEncoders | None
    schema: pyarrow.Schema

    def to(self, device: torch.device) -> None:
        """Move the models."""
        for model in [self.vqvae, *(self.encoders.models if self.encoders is not None else [])]:
            model.to(device)

    def encode(self, part: Part, accelerator: Accelerator) -> EncodedPart:
        """The same part, encoded on the device of this process, where the models are."""
        rows = None if part.batch is None else self._rows(part.batch, accelerator)
        return EncodedPart(part.unit, rows, part.tally, part.is_last)

    @torch.no_grad()
    def _rows(self, batch: dict[str, torch.Tensor], accelerator: Accelerator) -> pyarrow.Table:
        crops = batch["pixel_values"].flatten(0, 1)  # (images * rows per image, channels, height, width)
        with accelerator.autocast():
            codes = torch.cat([encode_codes(self.vqvae, images) for images in crops.split(self.config.batch_size)])
        others = []
        if "class_labels" in batch:
            others.append(pyarrow.array(batch["class_labels"].numpy()))
        elif self.encoders is not None:
            embedded = embed_captions(self.encoders, batch["caption_ids"])
            others.append(pyarrow.array(embedded, type=self.schema.field(CAPTIONS_COLUMN).type))
        numbers = np.arange(len(codes)) // self.config.rows_per_image
        return codes_table(self.schema, codes, *(values.take(pyarrow.array(numbers)) for values in others))


def embed_captions(encoders: TextEncoders, ids: torch.Tensor) -> list[dict[str, np.ndarray | list[np.ndarray]]]:
    """Rows of stored embeddings, without padding, of the ids `(batch, encoders, length)` of texts."""
    text = encode_ids(encoders.pairs, ids.to(encoders.models[0].device))
    states, pooled, mask = (values.cpu() for values in text)
    return [
        {
            PROMPT_EMBEDS: list(states[row][mask[row] > 0].half().numpy()),
            POOLED_PROMPT_EMBEDS: pooled[row].half().numpy(),
        }
        for row in range(len(ids))
    ]
