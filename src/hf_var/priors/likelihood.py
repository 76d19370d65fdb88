# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced log-probabilities of codes, for scoring and for the validation of a training."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from .modeling_rq import RQTransformer
from .stacks import stack_codes, unstack_codes


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


def stack_log_probs(
    transformer: RQTransformer,
    codes: torch.Tensor,
    code_vectors: torch.Tensor | None,
    **condition: torch.Tensor | None,
) -> torch.Tensor:
    """
    The same of an [`RQTransformer`], for `codes` `(batch, length)` one depth after the other, each given the positions before
    it and the coarser depths of its own (Lee et al. 2022, equation 6); `code_vectors` `(batch, length, latent_channels)` if
    it reads these.
    """
    depth = transformer.config.depth
    inputs = {"codes": codes} if code_vectors is None else {"code_vectors": code_vectors}
    stacks = {name: stack_codes(values, depth) for name, values in inputs.items()}
    return log_probs(unstack_codes(transformer(**condition, **stacks, use_cache=False).logits), codes)


def level_log_probs(
    priors: Sequence[nn.Module], levels: Sequence[torch.Tensor], condition: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """
    The same of a hierarchy: each of the `levels` `(batch, length of the level)`, coarse to fine, under its prior, given the
    next coarser one and, if it knows classes, the condition.
    """
    found = []
    for prior, coarser, level in zip(priors, [None, *levels], levels, strict=False):
        arguments: dict[str, Any] = dict(condition) if cast(Any, prior).config.num_labels else {}
        if coarser is not None:
            arguments["condition_codes"] = coarser
        found.append(log_probs(prior(codes=level, **arguments).logits, level))
    return torch.cat(found, dim=1)


def log_probs(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(batch, length)` of `codes` under `logits` `(batch, length, codebook_size)`, in fp32."""
    losses = functional.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
    return -losses.view(codes.shape)
