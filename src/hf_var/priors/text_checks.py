# SPDX-License-Identifier: Apache-2.0
"""Checks of what a transformer is told of a text, before any work; errors name the argument and what would fit."""

from collections.abc import Mapping
from typing import Any

import torch

from ..tensor_checks import as_indices, check_floats, check_range, describe, is_readable
from .configuration_text_var import TextVARConfig


MAX_SIDE = 2**20


def check_text(config: TextVARConfig, is_remembered: bool, text: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless the text is there exactly where it is needed, in the widths of the model."""
    given = [name for name, value in text.items() if value is not None]
    if is_remembered:
        if given:
            raise ValueError(f"`{given[0]}` must be passed with an image's first scale only: the cache keeps it.")
        return
    widths = {
        "encoder_hidden_states": ("batch", "text length", config.cross_attention_dim),
        "pooled_projections": ("batch", config.pooled_projection_dim),
    }
    for name, shape in widths.items():
        value = text[name]
        if value is None:
            raise ValueError(
                f"`{name}` must be passed with an image's first scale, and at every call with a cache which is not a "
                "`VARCache`, because only that one remembers the text."
            )
        check_floats(name, value)
        if value.ndim != len(shape) or value.shape[-1] != shape[-1] or 0 in value.shape[1:]:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"`{name}` must have the shape ({expected}), got {tuple(value.shape)}.")


def as_text_mask(mask: Any, states: Any, config: TextVARConfig) -> Any:
    """`encoder_attention_mask` as truth values; a `ValueError` unless it is one for the tokens of `states`."""
    if mask is None:
        return None
    is_tensor = isinstance(mask, torch.Tensor)
    if not is_tensor or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"`encoder_attention_mask` must be 0 and 1, or truth values, in a tensor, got {describe(mask)}."
        )
    if isinstance(states, torch.Tensor) and states.ndim == 3 and mask.shape[1:] != states.shape[1:2]:
        raise ValueError(
            f"`encoder_attention_mask` must have the shape (batch, {states.shape[1]}) of the text's tokens, got "
            f"{tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool:
        check_range("encoder_attention_mask", mask, 0, 1, "0 or 1")
    mask = mask.bool()
    if not config.learned_empty_text and is_readable(mask) and not bool(mask.any(dim=-1).all()):
        raise ValueError(
            "`encoder_attention_mask` must leave each text a token, got a row of zeros, which needs a model with "
            "learned_empty_text=True."
        )
    return mask


def as_crop_sizes(crop_sizes: Any, config: TextVARConfig) -> Any:
    """`crop_sizes` in int64; a `ValueError` unless they are heights and widths for a model that reads them."""
    if crop_sizes is None:
        return None
    if not config.crop_conditioning:
        raise ValueError("`crop_sizes` need a model with crop_conditioning=True: leave them out.")
    crop_sizes = as_indices("crop_sizes", crop_sizes)
    if crop_sizes.ndim != 2 or crop_sizes.shape[1] != 2:
        raise ValueError(f"`crop_sizes` must have the shape (batch, 2), got {tuple(crop_sizes.shape)}.")
    check_range("crop_sizes", crop_sizes, 1, MAX_SIDE, f"heights and widths from 1 to {MAX_SIDE}")
    return crop_sizes
