# SPDX-License-Identifier: Apache-2.0
"""Outputs of the priors."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


class CacheByBothNames:
    """Outputs whose `cache` also has its old name, which transformers 5.24 reads with a warning and releases before need."""

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache  # pyright: ignore[reportAttributeAccessIssue]

    def __getitem__(self, key):
        return super().__getitem__("cache" if key == "past_key_values" else key)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class VARTransformerOutput(CacheByBothNames, ModelOutput):
    """
    Output of [`VARTransformer`] and [`TextVARTransformer`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Mean cross-entropy in nats per token, with `labels`.
        logits (`torch.FloatTensor` of shape `(batch, length, codebook_size)`): In fp32.
        cache ([`VARCache`], *optional*): The cache, now with these blocks.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): Input of the first layer and output of every layer.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of every layer.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*): Those of the attention to a text.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class PixelPriorOutput(ModelOutput):
    """
    Output of [`PixelCNN`] and [`PixelSNAIL`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Mean cross-entropy in nats per code, with `labels`.
        logits (`torch.FloatTensor` of shape `(batch, n, codebook_size)`): Of the codes that were given, in fp32.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass
class RQTransformerOutput(CacheByBothNames, ModelOutput):
    """
    Output of [`RQTransformer`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Mean cross-entropy in nats per code, with `labels`.
        logits (`torch.FloatTensor` of shape `(batch, positions, depth, codebook_size)`, *optional*):
            In fp32, of the codes that were passed without a cache; `(batch, codebook_size)` with `context`.
        context (`torch.FloatTensor` of shape `(batch, positions, hidden_size)`, *optional*):
            What the positions say of the next ones: the last is the input of [`RQTransformer.predict_depth`].
        condition_logits (`torch.FloatTensor` of shape `(batch, condition_length - 1, num_condition_ids)`, *optional*):
            In fp32, of the condition tokens after the first, if `condition_loss_weight` is above 0.
        cache (`Cache`, *optional*): The cache, now with these tokens.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): Input of the first layer and output of every layer.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of every layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    context: torch.Tensor | None = None
    condition_logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
