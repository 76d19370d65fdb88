# SPDX-License-Identifier: Apache-2.0
"""Data sets of codes, in place of the images they come from."""

import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from ..autoencoders import Tokenizer
from ..fingerprints import fingerprint
from ..progress import progress_bar
from ..ranges import own_annotations
from .conditions import Condition
from .config import DataConfig
from .indexed import ShuffledRows
from .rows import RowReader, Tally
from .sources import AnyDataset, expand_home, features_of, glob_files


CODES_COLUMN = "codes"
TOKENIZER_KEY = "hf_var.tokenizer"
TEXT_ENCODER_KEY = "hf_var.text_encoder"
# Fields of a tokenizer's configuration that do not affect its codes.
INDIFFERENT_FIELDS = ("out_channels", "dropout", "codebook_averages", "codebook_loss_weight", "commitment_loss_weight")
# Weights that only decoding needs, and statistics.
INDIFFERENT_WEIGHTS = re.compile(r"(post_quant_conv|decoder)\..*|.*\.(running_hits|average_hits|average_sums)")
# Fields that were added later, with the value that means the earlier behaviour.
LATER_FIELDS = {"quantizer": "vq", "fsq_levels": None, "attention_levels": None, "encoder_out_channels": None}
LATER_FIELDS |= {"sample_type": "image"}


def is_codes_dataset(dataset: AnyDataset) -> bool:
    """Whether the rows are token maps instead of images."""
    return CODES_COLUMN in features_of(dataset)


def check_codes_column(dataset: AnyDataset, length: int, codebook_size: int) -> None:
    """Raise a `ValueError` if the first rows are not token maps of the tokenizer."""
    rows = dataset[:64] if isinstance(dataset, datasets.Dataset) else next(dataset.iter(64), {CODES_COLUMN: []})
    lengths = {len(codes or ()) for codes in cast(Any, rows)[CODES_COLUMN]}
    codes: Any = np.asarray(rows[CODES_COLUMN]) if len(lengths) == 1 else np.empty(0)
    if codes.ndim != 2 or codes.shape[1] != length or not np.issubdtype(codes.dtype, np.integer):
        found = (
            f"{codes.dtype} of length {lengths.pop()}" if len(lengths) == 1 else f"lists of lengths {sorted(lengths)}"
        )
        raise ValueError(
            f"The column {CODES_COLUMN!r} must hold {length} integers in every row, as the tokenizer's maps, got {found}."
        )
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(
            f"The column {CODES_COLUMN!r} must hold codes from 0 to {codebook_size - 1}, got values from {codes.min()} to "
            f"{codes.max()}."
        )


def tokenizer_fingerprint(vqvae: Tokenizer) -> str:
    """A digest of everything that affects the codes of a tokenizer."""
    fields = {name: getattr(vqvae.config, name) for name in own_annotations(type(vqvae.config))}
    deciding = {name: value for name, value in fields.items() if name not in INDIFFERENT_FIELDS}
    # Codes that were made before there were these fields keep their fingerprint.
    deciding = {name: value for name, value in deciding.items() if (name, value) not in LATER_FIELDS.items()}
    weights = {name: tensor for name, tensor in vqvae.state_dict().items() if not INDIFFERENT_WEIGHTS.fullmatch(name)}
    return fingerprint(deciding, weights)


def codes_fingerprint(source: str, key: str = TOKENIZER_KEY) -> str | None:
    """
    The tokenizer, or with another key the text encoder, that local parquet files of codes, or the first one on the Hub,
    name; `None` of other data.
    """
    source = expand_home(source)
    files = glob_files(source)
    if files is None:
        splits = datasets.load_dataset_builder(source).config.data_files or {}
        files = [str(file) for split in cast(dict[Any, list[str]], splits).values() for file in split]
    files = [file for file in files if file.endswith(".parquet")]
    found = {_fingerprint_in(file, key) for file in (files if all(map(os.path.exists, files)) else files[:1])}
    if len(found) > 1:
        models = "tokenizers" if key == TOKENIZER_KEY else "text encoders"
        raise ValueError(f"The codes in {source!r} were made by several {models}: {sorted(map(str, found))}.")
    return next(iter(found), None)


def _fingerprint_in(file: str, key: str) -> str | None:
    with cast(Any, fsspec.open(file, "rb")) as opened:
        metadata = pyarrow.parquet.read_schema(opened).metadata or {}
    value = metadata.get(key.encode())
    return None if value is None else json.loads(value)


def codes_schema(
    vqvae: Tokenizer, others: Mapping[str, Any] | None = None, text_fingerprint: str | None = None
) -> pyarrow.Schema:
    """
    Columns of a parquet file of codes and the types of `others`, as `datasets` restores them, with the fingerprints of
    the tokenizer and of the text encoders.
    """
    codes_type = "uint16" if vqvae.config.codebook_size <= 2**16 else "uint32"
    length = sum(vqvae.config.scale_lengths)
    features = datasets.Features({CODES_COLUMN: datasets.List(datasets.Value(codes_type), length=length)})
    features.update(others or {})
    schema = features.arrow_schema
    made_by = {TOKENIZER_KEY: json.dumps(tokenizer_fingerprint(vqvae))}
    if text_fingerprint is not None:
        made_by[TEXT_ENCODER_KEY] = json.dumps(text_fingerprint)
    return schema.with_metadata(schema.metadata | made_by)


def encode_codes(vqvae: Tokenizer, pixel_values: torch.Tensor) -> torch.Tensor:
    """The codes `(batch, length)` of images in `[-1, 1]` or class maps. Both are on the CPU, whatever `vqvae` is on."""
    *_, codes = vqvae.encode(pixel_values.to(vqvae.device, non_blocking=True), return_dict=False)
    return codes.cpu()


@dataclass
class CodesRows:
    """Turns a row into `codes` and, with a condition, `class_labels` or `class_embeds`."""

    condition: Condition | None = None

    @property
    def is_random(self) -> bool:
        return False

    def prepare(self, dataset: AnyDataset) -> AnyDataset:
        """The columns that are needed, as arrays: lists of Python's integers take three times as long."""
        columns = [CODES_COLUMN] + ([self.condition.source_column] if self.condition else [])
        return dataset.select_columns(columns).with_format("numpy")

    def __call__(self, row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
        """The item of a row."""
        codes = np.asarray(row[CODES_COLUMN], dtype=np.int64)
        return {"codes": codes} | (self.condition.read(row) if self.condition else {})


@torch.no_grad()
def tokenized_copies(
    dataset: AnyDataset,
    read_row: RowReader,
    config: DataConfig,
    seed: int,
    vqvae: Tokenizer,
    copies: int,
    show_progress: bool,
    condition_vqvae: Tokenizer | None = None,
) -> datasets.Dataset:
    """
    Codes, and conditions, of `copies` augmented copies of every image: the same ones in a resumed run. Images that are
    conditions become the codes of `condition_vqvae`.
    """
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError("`augmented_copies` must be 0 for a data set that is streamed.")
    rows = ShuffledRows(dataset, read_row, seed)
    tally = Tally()
    columns: dict[str, list[torch.Tensor]] = {}
    number = copies * len(dataset)
    starts = range(0, number, config.train_batch_size)
    for first in progress_bar(starts, is_shown=show_progress, desc="tokenize"):
        batch, found = rows[range(first, min(first + config.train_batch_size, number))]
        tally.add(found)
        tally.check(config.max_broken_share)
        batch = cast(dict[str, torch.Tensor], batch)
        batch[CODES_COLUMN] = encode_codes(vqvae, batch.pop("pixel_values"))
        if condition_vqvae is not None:
            batch["condition_ids"] = encode_codes(condition_vqvae, batch.pop("condition_pixel_values"))
        for name, values in batch.items():
            columns.setdefault(name, []).append(values)
    return datasets.Dataset.from_dict({name: torch.cat(values).numpy() for name, values in columns.items()})
