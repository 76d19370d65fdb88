# SPDX-License-Identifier: Apache-2.0
"""Condition tokens of an RQ-Transformer, from what users have: texts, codes and coordinates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ..text_encoders import tokenize
from .checks import as_tensor, check_code_range


def as_texts(name: str, value: Any) -> list[str]:
    """The texts of an argument, one or several; a `ValueError` unless they are some."""
    texts: Any = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be a text or a list of texts, got {value!r}.")
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[str], length: int) -> torch.Tensor:
    """Ids `(batch, length)` of the texts of `prompt`."""
    return tokenize(tokenizer, as_texts("prompt", prompt), length)["input_ids"].long()  # pyright: ignore


def given_ids(condition_codes: Any, lengths: Sequence[int], num_ids: int) -> torch.Tensor:
    """`condition_codes` as a tensor `(batch, n)` in int64, n one of `lengths`; a `ValueError` unless they are ids."""
    found: Any = as_tensor(condition_codes)
    accepted = " or ".join(map(str, dict.fromkeys(lengths)))
    if found is None or found.ndim != 2 or found.shape[1] not in lengths or len(found) == 0:
        got = type(condition_codes).__name__ if found is None else tuple(found.shape)
        raise ValueError(f"`condition_codes` must be integers of the shape (batch, {accepted}), got {got}.")
    return check_code_range("condition_codes", found, num_ids)


def coordinate_codes(coordinates: torch.Tensor, codebook_size: int, downsampling_factor: int) -> torch.Tensor:
    r"""
    Condition tokens of a model that is conditioned on where in a larger picture its window is, as VQGAN's GPT of faces
    (Esser et al. 2021, section 4.3; `CoordStage` of its code).

    Args:
        coordinates (`torch.FloatTensor` of shape `(batch, 1, height, width)`): A map of coordinates in [0, 1].
        codebook_size (`int`): Codes of the table that embeds them.
        downsampling_factor (`int`): Pixels of the map for a token, in each direction.

    Returns:
        `torch.LongTensor` of shape `(batch, height * width / downsampling_factor**2)`: coordinate 0 is code 0, 1 the last.

    Raises:
        `ValueError`: If the map has another shape or holds other values.
    """
    if coordinates.ndim != 4 or coordinates.shape[1] != 1 or not ((coordinates >= 0) & (coordinates <= 1)).all():
        raise ValueError(
            f"`coordinates` must have the shape (batch, 1, height, width) and values in [0, 1], got "
            f"{tuple(coordinates.shape)}."
        )
    height, width = (side // downsampling_factor for side in coordinates.shape[2:])
    reduced = functional.interpolate(coordinates.float(), size=(height, width), mode="area")
    # The public code gives 1 an index past the table.
    return (reduced * codebook_size).round().long().clamp(max=codebook_size - 1).flatten(1)


__all__ = ["coordinate_codes"]
