# SPDX-License-Identifier: Apache-2.0
"""Checks of the values that the methods of a pipeline take."""

import math
from numbers import Integral, Real
from typing import Any

import torch

from ..autoencoders import TokenizerConfig
from ..priors import VARConfig


def is_number(value: Any, kind: type[Real] = Real) -> bool:
    """Whether `value` is a finite number, Python's or numpy's."""
    try:
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # the largest integers
        return False


def check_guidance(guidance_scale: Any) -> None:
    """Raise a `ValueError` unless it is a finite number or a callable."""
    if not callable(guidance_scale) and not is_number(guidance_scale):
        raise ValueError(
            f"`guidance_scale` must be a finite number, 1 for no guidance, or a callable of (k, K), got {guidance_scale!r}."
        )


def check_top_k(codebook_size: int, top_k: Any) -> None:
    """Raise a `ValueError` unless it is a number of codes."""
    if not is_number(top_k, Integral) or not 0 <= top_k <= codebook_size:
        raise ValueError(
            f"`top_k` must be from 1 to codebook_size={codebook_size}, 0 for all codes or `None` for the default, got "
            f"{top_k!r}."
        )


def check_top_p(top_p: Any) -> None:
    """Raise a `ValueError` unless it is a probability."""
    if not is_number(top_p) or not 0 <= top_p <= 1:
        raise ValueError(f"`top_p` must be in [0, 1], where 0 and 1 mean all codes, got {top_p!r}.")


def check_temperature(temperature: Any) -> None:
    """Raise a `ValueError` unless it is a positive number."""
    if not is_number(temperature) or temperature <= 0:
        raise ValueError(f"`temperature` must be a number above 0, got {temperature!r}; greedy choice is `top_k=1`.")


def check_count(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless it is an integer of at least 1."""
    if not is_number(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless it is a truth value."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless it is `None` or can be called."""
    if value is not None and not callable(value):
        raise ValueError(f"`{name}` must be a callable, got {value!r}.")


def checked_codes(name: str, codes: Any, config: TokenizerConfig | VARConfig) -> torch.Tensor:
    """Codes of whole images, `(batch, length)`; a `ValueError` that names the argument unless these are some."""
    length: int = sum(config.scale_lengths)
    found: Any = as_tensor(codes)
    if found is None or found.shape[1:] != (length,) or len(found) == 0:
        got = type(codes).__name__ if found is None else f"{found.dtype} of the shape {tuple(found.shape)}"
        raise ValueError(f"`{name}` must be integers of the shape (batch, {length}), got {got}.")
    return check_code_range(name, found, config.codebook_size)


def check_code_range(name: str, codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """`codes` in int64; a `ValueError` that names the argument unless they are integers in `[0, codebook_size)`."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(
            f"`{name}` must be integers of the shape (batch, {codes.shape[1]}), got {codes.dtype} of the shape "
            f"{tuple(codes.shape)}."
        )
    codes = codes.long()
    # The models look at the range on the CPU alone; elsewhere a wrong code ends the process.
    lowest, highest = int(codes.min()), int(codes.max())
    if lowest < 0 or highest >= codebook_size:
        raise ValueError(f"`{name}` must be in [0, {codebook_size}), got values from {lowest} to {highest}.")
    return codes


def as_tensor(value: Any) -> Any:
    """What torch makes of a user's numbers, `None` if it cannot read them."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def check_output(output_type: str, config: Any) -> None:
    """Raise a `ValueError` unless images of the tokenizer that `config` describes can be returned in this form."""
    if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    channels = config.num_output_channels
    if output_type == "pil" and channels not in (1, 3, 4) and config.num_pixel_classes is None:
        raise ValueError(f"`output_type` must be 'np', 'pt' or 'latent' for images of {channels} channels, got 'pil'.")


def check_generator(generator: Any, batch_size: int) -> None:
    """Raise a `ValueError` unless there is no generator, one, or a list with one for each image."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` must be one generator or {batch_size}, one per image, got {len(generator)}.")
    for single in generator if isinstance(generator, list) else [generator]:
        if not isinstance(single, torch.Generator) and (single is not None or isinstance(generator, list)):
            raise ValueError(
                "`generator` must be a `torch.Generator`, such as `torch.Generator().manual_seed(0)`, or a list of "
                f"them, got {single!r}."
            )


def check_num_scales(name: str, value: int, num_scales: int) -> None:
    """Raise a `ValueError` that names the argument unless it is a number of scales."""
    if not is_number(value, Integral) or not 0 <= value <= num_scales:
        raise ValueError(f"`{name}` must be a number of scales from 0 to {num_scales}, got {value!r}.")
