# SPDX-License-Identifier: Apache-2.0
"""Inputs and targets of a transformer in training."""

from typing import Any, cast

import torch

from ..autoencoders import Tokenizer, VQVAEModel
from ..priors import VARConfig


@torch.no_grad()
def prior_inputs(vqvae: VQVAEModel, batch: dict[str, torch.Tensor], is_raster: bool = False) -> dict[str, Any]:
    """
    The arguments of a [`VARTransformer`] for a batch of `codes` `(batch, length)` or `pixel_values` in [-1, 1] and of
    a condition, which is passed on. Every scale reads the image's own coarser scales or, in raster order, every token
    the code vector of the token before (Esser et al. 2021, section 3.2).
    """
    inputs = _codes_of(vqvae, batch)
    codes = inputs.pop("codes")
    scale_inputs = vqvae.teacher_forcing(codes, is_raster)
    return {**inputs, "scale_inputs": scale_inputs, "labels": codes}


def check_blocks(config: VARConfig) -> None:
    """Raise a `ValueError` unless a transformer predicts single tokens or whole scales."""
    if not config.has_known_inputs:
        raise ValueError(
            f"`block_sizes` must be one block per scale, {config.scale_lengths}, or all ones for raster order, got "
            f"{config.block_sizes}."
        )


@torch.no_grad()
def level_inputs(vqvae: Tokenizer, level: int, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    The arguments of a prior of one level (a [`PixelCNN`] or [`PixelSNAIL`]) for a batch as above: the codes of the level,
    which are also the targets, and those of the coarser one as its condition (Razavi et al. 2019, section 3.2).
    """
    inputs = _codes_of(vqvae, batch)
    levels = inputs.pop("codes").split(vqvae.config.scale_lengths, dim=1)
    condition = {"condition_codes": levels[level - 1]} if level > 0 else {}
    return {**inputs, **condition, "codes": levels[level], "labels": levels[level]}


def _codes_of(vqvae: Tokenizer, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The batch on the tokenizer's device, with codes in place of images."""
    inputs: dict[str, Any] = {name: values.to(vqvae.device, non_blocking=True) for name, values in batch.items()}
    if "codes" not in inputs:
        inputs["codes"] = cast(Any, vqvae.encode(inputs.pop("pixel_values"))).codes
    return inputs
