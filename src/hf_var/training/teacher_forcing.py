# SPDX-License-Identifier: Apache-2.0
"""What a transformer reads and predicts in training."""

from typing import Any, cast

import torch

from ..autoencoders import VQVAEModel


@torch.no_grad()
def teacher_forcing(vqvae: VQVAEModel, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    The arguments of a [`VARTransformer`] for a batch of images or codes: every scale reads the image's own coarser scales.

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer.
        batch (`dict[str, torch.Tensor]`):
            `codes` of shape `(batch, length)` or `pixel_values` in [-1, 1], and the condition, which is passed on:
            `class_labels` of shape `(batch,)`, `class_embeds` of shape `(batch, channels)` or neither.
    """
    inputs: dict[str, Any] = {name: values.to(vqvae.device, non_blocking=True) for name, values in batch.items()}
    codes = inputs.pop("codes") if "codes" in inputs else cast(Any, vqvae.encode(inputs.pop("pixel_values"))).codes
    return {**inputs, "scale_inputs": vqvae.teacher_forcing(codes), "labels": codes}
