# SPDX-License-Identifier: Apache-2.0
"""Inputs and targets of a transformer in training."""

from typing import Any, cast

import torch

from ..autoencoders import VQVAEModel
from ..priors import VARConfig


@torch.no_grad()
def teacher_forcing(vqvae: VQVAEModel, batch: dict[str, torch.Tensor], is_raster: bool = False) -> dict[str, Any]:
    """
    The arguments of a [`VARTransformer`] for a batch of `codes` `(batch, length)` or `pixel_values` in [-1, 1] and of
    a condition, which is passed on. Every scale reads the image's own coarser scales or, in raster order, every token
    the code vector of the token before (Esser et al. 2021, section 3.2).
    """
    inputs: dict[str, Any] = {name: values.to(vqvae.device, non_blocking=True) for name, values in batch.items()}
    codes = inputs.pop("codes") if "codes" in inputs else cast(Any, vqvae.encode(inputs.pop("pixel_values"))).codes
    scale_inputs = vqvae.teacher_forcing(codes, is_raster)
    return {**inputs, "scale_inputs": scale_inputs, "labels": codes}


def check_blocks(config: VARConfig) -> None:
    """Raise a `ValueError` unless a transformer predicts single tokens or whole scales."""
    if not config.has_known_inputs:
        raise ValueError(
            f"`block_sizes` must be one block per scale, {config.scale_lengths}, or all ones for raster order, got "
            f"{config.block_sizes}."
        )
