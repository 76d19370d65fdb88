# SPDX-License-Identifier: Apache-2.0
"""Conditions that are texts or token ids: from a row of a data set to ids, or to embeddings that were made before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from .conditions import SizedCondition, TokenCondition, check_rows, first_length, holds_texts
from .sources import AnyDataset, check_column, features_of


# Fields of a column of stored embeddings of texts.
PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS = "prompt_embeds", "pooled_prompt_embeds"


@dataclass(frozen=True)
class TextCondition(SizedCondition):
    """The first `size` tokens of a text, `condition_ids`, filled up to that number."""

    tokenizer: PreTrainedTokenizerBase

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        text = row[self.column]
        if not isinstance(text, str):
            raise ValueError(f"`condition_column` = {self.column!r} must hold a text in every row, got {text!r}.")
        encoded: Any = self.tokenizer(text, padding="max_length", truncation=True, max_length=self.size)
        return {"condition_ids": np.asarray(encoded.input_ids, dtype=np.int64)}


@dataclass(frozen=True)
class CaptionCondition(SizedCondition):
    """
    The first `size` tokens of a text by each of several tokenizers, `caption_ids` `(tokenizers, size)`, filled up with
    -1. Rows of class labels have the `names` of these.
    """

    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    names: tuple[str, ...] | None = None

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        text = _caption(row[self.column], self.names)
        if not isinstance(text, str):
            raise ValueError(f"`caption_column` = {self.column!r} must hold a text in every row, got {text!r}.")
        ids = np.full((len(self.tokenizers), self.size), -1, dtype=np.int64)
        for place, tokenizer in zip(ids, self.tokenizers, strict=True):
            found: Any = tokenizer(text, truncation=True, max_length=self.size).input_ids
            place[: len(found)] = found
        return {"caption_ids": ids}


@dataclass(frozen=True)
class EmbeddedCaptionCondition(SizedCondition):
    """
    A text as its encoders see it, stored without padding (`data.embedded_caption_feature`): `encoder_hidden_states`
    `(size, width)`, filled up with zeros, `pooled_projections` and `encoder_attention_mask` `(size,)`.
    """

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        stored = row[self.column]
        found = np.stack([np.asarray(states, dtype=np.float32) for states in stored[PROMPT_EMBEDS]])
        states = np.zeros((self.size, found.shape[1]), dtype=np.float32)
        states[: len(found)] = found
        return {
            "encoder_hidden_states": states,
            "pooled_projections": np.asarray(stored[POOLED_PROMPT_EMBEDS], dtype=np.float32),
            "encoder_attention_mask": (np.arange(self.size) < len(found)).astype(np.int64),
        }


# --------------------------------------------------------------------------------------------------------------------
# Finding and checking


def token_condition(
    dataset: AnyDataset,
    column: str,
    num_ids: int,
    size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TokenCondition | TextCondition:
    """
    The condition that a column of lists of token ids below `num_ids` is, as many in every row, or with a `tokenizer` one
    of texts, of which the first `size` tokens count.
    """
    features = features_of(dataset)
    check_column("condition_column", column, features)
    feature: Any = features[column]
    if tokenizer is not None:
        if not holds_texts(feature):
            raise ValueError(f"`condition_column` = {column!r} must hold texts for `text_tokenizer`, got {feature}.")
        if size is None:
            raise ValueError("`condition_length` must say how many tokens of a text the prior reads.")
        return TextCondition(column, size, tokenizer)
    value = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else None
    if not isinstance(value, datasets.Value) or not value.dtype.startswith(("int", "uint")):
        hint = ": name its `text_tokenizer`" if holds_texts(feature) else ""
        raise ValueError(f"`condition_column` = {column!r} must hold lists of integers, got {feature}{hint}.")
    if size is None:
        size = first_length(dataset, column, "integer")
    condition = TokenCondition(column, size, num_ids)
    check_rows(dataset, condition)
    return condition


def embedded_caption_feature(hidden_width: int, pooled_width: int) -> dict[str, Any]:
    """The type of a column of texts as their encoders see them."""
    states = datasets.List(datasets.List(datasets.Value("float16"), length=hidden_width))
    return {PROMPT_EMBEDS: states, POOLED_PROMPT_EMBEDS: datasets.List(datasets.Value("float16"), length=pooled_width)}


def holds_embedded_captions(dataset: AnyDataset, column: str) -> bool:
    """Whether a column holds stored embeddings of texts."""
    features = features_of(dataset)
    check_column("caption_column", column, features)
    feature = features[column]
    return isinstance(feature, Mapping) and {PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS} <= feature.keys()


def first_captions(dataset: AnyDataset, column: str, number: int) -> list[str]:
    """The first captions of a data set."""
    names = _names(features_of(dataset)[column])
    return [_caption(cast(Any, row)[column], names) for row in dataset.select_columns([column]).take(number)]


def _names(feature: Any) -> tuple[str, ...] | None:
    """The texts that the class labels of a column stand for; `None` of other columns."""
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _caption(value: Any, names: Sequence[str] | None) -> Any:
    """The text of a row: itself, or the name of its class; what is neither is returned."""
    is_class = names is not None and isinstance(value, int) and 0 <= value < len(names)
    return cast(Any, names)[value] if is_class else value


def caption_condition(
    dataset: AnyDataset, column: str, tokenizers: Sequence[PreTrainedTokenizerBase], size: int
) -> CaptionCondition:
    """
    The condition that a column of captions is, for text encoders that read `size` tokens; of class labels, the names of the
    classes are the captions.
    """
    features = features_of(dataset)
    check_column("caption_column", column, features)
    names = _names(features[column])
    if not holds_texts(features[column]) and names is None:
        raise ValueError(f"`caption_column` = {column!r} must hold texts or class labels, got {features[column]}.")
    if names is None and isinstance(dataset, datasets.Dataset):
        texts: Any = cast(Any, dataset.select_columns([column]).with_format("arrow")[:])[column]
        if texts.null_count > 0:
            raise ValueError(
                f"`caption_column` = {column!r} must hold a text in every row, got {texts.null_count} of {len(texts)} rows "
                "without one."
            )
        if cast(Any, pyarrow.compute).max(cast(Any, pyarrow.compute).utf8_length(texts)).as_py() == 0:
            raise ValueError(
                f"`caption_column` = {column!r} must hold texts, got empty ones in all {len(texts)} rows."
            )
    return CaptionCondition(column, size, tuple(tokenizers), names)
