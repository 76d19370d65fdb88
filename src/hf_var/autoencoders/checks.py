# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of the tokenizer's methods; errors name the argument and the shape that would fit."""

from typing import Any

import torch

from ..ranges import Interval, fitting
from ..tensor_checks import as_indices, check_finite, check_floats, check_one_hot, check_range, describe
from .class_maps import one_hot
from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig
from .configuration_vqvae import VQVAEConfig


Config = VQVAEConfig | HierarchicalVQVAEConfig


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], config: Config) -> None:
    """Raise a `ValueError` unless `tensor` holds a batch of floating-point numbers of the shape `expected`."""
    check_floats(name, tensor)
    if tuple(tensor.shape[1:]) != expected or tensor.ndim != len(expected) + 1:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(
            f"`{name}` must have the shape (batch, {shape}) for patch_nums={config.patch_nums} and "
            f"{config.downsampling_factor} times downsampling, got {tuple(tensor.shape)}."
        )


def check_pixels(pixel_values: torch.Tensor, config: Config) -> None:
    """Raise a `ValueError` unless `pixel_values` are images that fit; NaN, which has codes, is found on the CPU."""
    check_shape("pixel_values", pixel_values, (config.in_channels, *config.image_size), config)
    check_finite("pixel_values", pixel_values)


def as_pixels(pixel_values: Any, config: VQVAEConfig) -> torch.Tensor:
    """
    What a tokenizer's encoder reads of images or, with `sample_type="class_map"`, of maps of ids or one-hot maps. A
    `ValueError` unless they fit; values out of range are found on the CPU alone.
    """
    num_classes = config.num_pixel_classes
    if num_classes is None:
        check_pixels(pixel_values, config)
        return pixel_values
    if isinstance(pixel_values, torch.Tensor) and pixel_values.is_floating_point():
        check_shape("pixel_values", pixel_values, (num_classes, *config.image_size), config)
        check_one_hot("pixel_values", pixel_values)
        return pixel_values
    ids = as_indices("pixel_values", pixel_values)
    if ids.ndim != 3 or tuple(ids.shape[1:]) != config.image_size:
        height, width = config.image_size
        raise ValueError(
            f"`pixel_values` must have the shape (batch, {height}, {width}) if they are ids of {num_classes} classes, "
            f"got {tuple(ids.shape)}."
        )
    check_range("pixel_values", ids, 0, num_classes - 1, f"class ids in [0, {num_classes})")
    return one_hot(ids, num_classes)


def check_latents(name: str, tensor: torch.Tensor, config: VQVAEConfig) -> None:
    """Raise a `ValueError` unless `tensor` has the shape of features and latents."""
    check_shape(name, tensor, (config.latent_channels, *config.latent_size), config)


def as_codes(codes: Any, config: Config, lengths: list[int] | None = None) -> torch.Tensor:
    """`codes` in int64; a `ValueError` unless they are codes, of one of `lengths` if there are any."""
    codes = as_indices("codes", codes)
    if lengths is not None and (codes.ndim != 2 or codes.shape[1] not in lengths):
        raise ValueError(
            f"`codes` must have the shape (batch, {' or '.join(map(str, lengths))}) for "
            f"patch_nums={config.patch_nums}, got {tuple(codes.shape)}."
        )
    check_range("codes", codes, 0, config.codebook_size - 1, f"in [0, {config.codebook_size})")
    return codes


def check_weights(weights: Any, config: VQVAEConfig) -> None:
    """Raise a `ValueError` unless `weights` holds a real number for each code."""
    is_tensor = isinstance(weights, torch.Tensor)
    if not is_tensor or weights.is_complex() or weights.shape[-1:] != (config.codebook_size,):
        raise ValueError(
            f"`weights` must be real numbers in a tensor of the shape (..., {config.codebook_size}), got "
            f"{describe(weights)}."
        )


def as_scale(name: str, value: Any, minimum: int, maximum: int) -> int:
    """`value`, a scale or a number of scales, as Python's integer; a `ValueError` unless it is an integer from `minimum` to `maximum`."""
    return fitting(name, value, int, Interval(minimum=minimum, maximum=maximum))


def wants_dict(return_dict: Any, config: Config) -> bool:
    """Whether a call returns an output object and no tuple; a `ValueError` unless `return_dict` is a truth value."""
    return bool(config.return_dict) if return_dict is None else fitting("return_dict", return_dict, bool)
