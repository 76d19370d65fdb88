# SPDX-License-Identifier: Apache-2.0
"""Checks of tensors that models are called with. They read attributes, and values only where nothing waits for them."""

from textwrap import shorten
from typing import Any

import torch


def check_floats(name: str, tensor: Any) -> None:
    """Raise a `ValueError` unless `tensor` is a tensor of floating-point numbers."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise ValueError(f"`{name}` must be floating-point numbers in a tensor, got {describe(tensor)}.")


def as_indices(name: str, tensor: Any) -> Any:
    """`tensor` in int64, as look-ups need it; a `ValueError` unless it is a tensor of integers."""
    is_tensor = isinstance(tensor, torch.Tensor)
    if not is_tensor or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers in a tensor, got {describe(tensor)}.")
    return tensor.long()


def check_range(name: str, indices: torch.Tensor, minimum: int, maximum: int, accepted: str) -> None:
    """Raise a `ValueError` if an index is not from `minimum` to `maximum`, `accepted` in words; only on the CPU."""
    if is_readable(indices):
        lowest, highest = int(indices.min()), int(indices.max())
        if lowest < minimum or highest > maximum:
            raise ValueError(f"`{name}` must be {accepted}, got values from {lowest} to {highest}.")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise a `ValueError` if a number is infinite or NaN; only on the CPU."""
    if is_readable(tensor) and not bool(tensor.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite values.")


def check_one_hot(name: str, tensor: torch.Tensor) -> None:
    """Raise a `ValueError` unless each position of each map has a single 1 over its channels; only on the CPU."""
    if not is_readable(tensor):
        return
    is_one = tensor == 1
    if not bool((is_one | (tensor == 0)).all()) or not bool((is_one.sum(dim=1) == 1).all()):
        raise ValueError(
            f"`{name}` must be one-hot over its {tensor.shape[1]} channels, 0 and a single 1, got values from "
            f"{float(tensor.min()):g} to {float(tensor.max()):g}, or another number of ones."
        )


def check_batch(**inputs: torch.Tensor | int | None) -> None:
    """Raise a `ValueError` unless all inputs that are not `None` have the same batch size; integers are sizes."""
    sizes = {
        name: (value.shape[0] if value.ndim > 0 else 1) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
        if value is not None
    }
    batch_size = next(iter(sizes.values()), 1)
    if any(size != batch_size for size in sizes.values()):
        raise ValueError(
            f"All arguments must have the same batch size, got {sizes}. A cache keeps that of its first call: pass a "
            "new one for another."
        )


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether reading values neither waits for a device nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel() > 0


def describe(value: Any) -> str:
    """What `value` is, for the end of an error message."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of the shape {tuple(value.shape)}"
    return f"{type(value).__name__} {shorten(repr(value), 80)}"
