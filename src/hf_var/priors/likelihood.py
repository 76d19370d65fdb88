# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced log-probabilities of codes, for scoring and for the validation of a training."""

import torch
from torch import nn
from torch.nn import functional


def token_log_probs(
    transformer: nn.Module, codes: torch.Tensor, scale_inputs: torch.Tensor, **condition: torch.Tensor | None
) -> torch.Tensor:
    """
    Log-probabilities `(batch, length)` in nats, in fp32, of `codes` `(batch, length)`, each given the coarser scales and
    the condition (Tian et al. 2024, equation 2).

    Args:
        transformer ([`VARTransformer`]): The model, in evaluation mode.
        codes (`torch.LongTensor` of shape `(batch, length)`): Token maps of all scales.
        scale_inputs (`torch.FloatTensor`): [`VQVAEModel.teacher_forcing`] of these codes.
        condition (`torch.Tensor`, *optional*): `class_labels` or `class_embeds` of the transformer.
    """
    return log_probs(transformer(scale_inputs=scale_inputs, use_cache=False, **condition).logits, codes)


def log_probs(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(batch, length)` of `codes` under `logits` `(batch, length, codebook_size)`, in fp32."""
    losses = functional.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
    return -losses.view(codes.shape)
