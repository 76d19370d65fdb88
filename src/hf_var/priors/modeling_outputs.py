# SPDX-License-Identifier: Apache-2.0
"""Outputs of the priors."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class VARTransformerOutput(ModelOutput):
    """
    Output of [`VARTransformer`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Mean cross-entropy in nats per token, with `labels`.
        logits (`torch.FloatTensor` of shape `(batch, length, codebook_size)`): In fp32.
        cache ([`VARCache`], *optional*): The cache, now with these blocks.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): Input of the first layer and output of every layer.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of every layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    # The old name of `cache`, which transformers 5.24 reads with a warning and releases before it do not know.
    @property
    def past_key_values(self) -> Cache | None:
        return self.cache

    def __getitem__(self, key):
        return super().__getitem__("cache" if key == "past_key_values" else key)


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
