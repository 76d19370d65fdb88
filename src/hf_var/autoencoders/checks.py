# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of the tokenizer's methods; errors name the argument and the shape that would fit."""

import torch

from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig
from .configuration_vqvae import VQVAEConfig


Config = VQVAEConfig | HierarchicalVQVAEConfig


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], config: Config) -> None:
    """Raise a `ValueError` unless `tensor` is a batch of the shape `expected`."""
    if tuple(tensor.shape[1:]) != expected or tensor.ndim != len(expected) + 1:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(
            f"`{name}` must have the shape (batch, {shape}) for patch_nums={config.patch_nums} and "
            f"{config.downsampling_factor} times downsampling, got {tuple(tensor.shape)}."
        )


def check_latents(name: str, tensor: torch.Tensor, config: VQVAEConfig) -> None:
    """Raise a `ValueError` unless `tensor` has the shape of features and latents."""
    check_shape(name, tensor, (config.latent_channels, *config.latent_size), config)


def check_codes(codes: torch.Tensor, lengths: list[int], config: Config) -> None:
    """Raise a `ValueError` unless `codes` is a batch of codes, of one of `lengths`."""
    if codes.is_floating_point() or codes.ndim != 2 or codes.shape[1] not in lengths:
        raise ValueError(
            f"`codes` must be integers of the shape (batch, {' or '.join(map(str, lengths))}) for "
            f"patch_nums={config.patch_nums}, got {codes.dtype} of the shape {tuple(codes.shape)}."
        )
    check_range(codes, config)


def check_range(codes: torch.Tensor, config: Config) -> None:
    """Raise a `ValueError` if a code is out of range; checked only on the CPU, without waiting for a device."""
    if codes.device.type == "cpu" and not torch.compiler.is_compiling() and codes.numel() > 0:
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= config.codebook_size:
            raise ValueError(f"`codes` must be in [0, {config.codebook_size}), got values from {lowest} to {highest}.")
