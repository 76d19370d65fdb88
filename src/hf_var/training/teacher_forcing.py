# SPDX-License-Identifier: Apache-2.0
"""What a transformer reads and predicts in training."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from ..autoencoders import VQVAEConfig, VQVAEModel


@torch.no_grad()
def teacher_forcing(
    vqvae: VQVAEModel, batch: dict[str, torch.Tensor], block_sizes: Sequence[int] | None = None
) -> dict[str, Any]:
    """
    The arguments of a [`VARTransformer`] for a batch of images or codes. Every scale reads the image's own coarser scales
    or, in raster order, every token the code vector of the token before (Esser et al. 2021, section 3.2).

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer.
        block_sizes (`list[int]`, *optional*): That of the transformer: one block per scale, or all ones.
        batch (`dict[str, torch.Tensor]`):
            `codes` of shape `(batch, length)` or `pixel_values` in [-1, 1], and the condition, which is passed on:
            `class_labels` of shape `(batch,)`, `class_embeds` of shape `(batch, channels)` or neither.
    """
    inputs: dict[str, Any] = {name: values.to(vqvae.device, non_blocking=True) for name, values in batch.items()}
    codes = inputs.pop("codes") if "codes" in inputs else cast(Any, vqvae.encode(inputs.pop("pixel_values"))).codes
    if is_raster(vqvae.config, block_sizes):
        scale_inputs = vqvae.code_vectors(codes[:, :-1])
    else:
        scale_inputs = vqvae.teacher_forcing(codes)
    return {**inputs, "scale_inputs": scale_inputs, "labels": codes}


def is_raster(tokenizer: VQVAEConfig, block_sizes: Sequence[int] | None) -> bool:
    """
    Whether a transformer with these blocks predicts one token after the other.

    Raises:
        `ValueError`: If it predicts neither single tokens nor whole scales, for which there are no inputs.
    """
    if block_sizes is None or list(block_sizes) == tokenizer.scale_lengths:
        return False
    if set(block_sizes) != {1}:
        raise ValueError(
            f"`block_sizes` must be one block per scale, {tokenizer.scale_lengths}, or all ones for raster order, got "
            f"{list(block_sizes)}."
        )
    return True
