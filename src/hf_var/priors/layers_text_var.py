# SPDX-License-Identifier: Apache-2.0
"""Layers of the VAR transformer that reads texts (Switti: Voronov et al. 2024, section 3 and figure 3)."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .attention import attend
from .cache import VARCache, cached
from .configuration_text_var import TextVARConfig
from .layers import AdaLN, BlockEmbeddings, modulate
from .rotary import rotate


# The side that the crop of a training image is given in, whatever the resolution of the model.
CROP_BASE = 512


class NormalizedAttention(nn.Module):
    """Projections of an attention that normalises queries and keys over the whole width, before it splits heads."""

    def __init__(self, config: TextVARConfig, layer_idx: int, key_channels: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(key_channels, config.hidden_size)
        self.v_proj = nn.Linear(key_channels, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.k_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch, heads, length, head_dim)` of `(batch, length, hidden)`."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class TextVARAttention(NormalizedAttention):
    """Self-attention of the image's tokens, with rotary positions."""

    def __init__(self, config: TextVARConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.q_norm(self.q_proj(hidden_states)))
        key = self.split_heads(self.k_norm(self.k_proj(hidden_states)))
        value = self.split_heads(self.v_proj(hidden_states))
        # Under autocast, normalisations return fp32.
        query = rotate(query, *position_embeddings).to(value.dtype)
        key = rotate(key, *position_embeddings).to(value.dtype)
        key, value = cached(cache, self, query, key, value)
        attended, weights = attend(self, query, key, value, attention_mask, is_causal=False, **kwargs)
        return self.o_proj(attended), weights  # (batch, length, hidden)


class TextVARCrossAttention(NormalizedAttention):
    """Attention to the text, whose keys and values are computed once for an image."""

    def __init__(self, config: TextVARConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.cross_attention_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        context_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.q_norm(self.q_proj(hidden_states)))
        if context is None and isinstance(cache, VARCache):
            key, value = cache.cross_attention[self.layer_idx]
        else:
            key = self.split_heads(self.k_norm(self.k_proj(context)))
            value = self.split_heads(self.v_proj(context))
            key = key.to(value.dtype)
            if isinstance(cache, VARCache):
                # As copies, and no views of a projection's output, see `modulate`.
                cache.cross_attention[self.layer_idx] = key.clone(), value.clone()
        # Texts are short, so that the other implementations, some of which know no mask of this form, would gain
        # nothing.
        attended, weights = attend(
            self,
            query.to(value.dtype),
            key,
            value,
            context_mask,
            implementation=context_implementation(self.config),
            is_causal=False,
            **kwargs,
        )
        return self.o_proj(attended), weights  # (batch, length, hidden)


def context_implementation(config: TextVARConfig) -> str:
    """The implementation of the attention to the text."""
    return "eager" if str(config._attn_implementation) == "eager" else "sdpa"


class TextVARMLP(nn.Module):
    """Gated feed-forward layer, SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TextVARConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class TextVARBlock(GradientCheckpointingLayer):
    """
    A transformer layer with attention to the image, attention to the text and a feed-forward layer, each between two
    normalisations. The first and the last are modulated by the pooled text and the crop (AdaLN).
    """

    def __init__(self, config: TextVARConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        width, eps = config.hidden_size, config.rms_norm_eps
        self.crop_scale = nn.Parameter(torch.empty(width)) if config.crop_conditioning else None
        self.adaln = AdaLN(config, 6)
        self.attention_norm = LlamaRMSNorm(width, eps)
        self.attention = TextVARAttention(config, layer_idx)
        self.attention_out_norm = LlamaRMSNorm(width, eps)
        self.cross_attention_norm = LlamaRMSNorm(width, eps)
        self.context_norm = LlamaRMSNorm(config.cross_attention_dim, eps)
        self.cross_attention = TextVARCrossAttention(config, layer_idx)
        self.cross_attention_out_norm = LlamaRMSNorm(width, eps)
        self.mlp_norm = LlamaRMSNorm(width, eps)
        self.mlp = TextVARMLP(config)
        self.mlp_out_norm = LlamaRMSNorm(width, eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor | None,
        crop_condition: torch.Tensor | None,
        context: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        context_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if condition is not None and crop_condition is not None and self.crop_scale is not None:
            condition = condition + self.crop_scale * crop_condition
        modulation = modulate(self.adaln, condition, cache, self.layer_idx)
        attention_gate, mlp_gate, attention_scale, mlp_scale, attention_shift, mlp_shift = modulation.split(1, dim=1)
        normed = self.attention_norm(hidden_states) * (1 + attention_scale) + attention_shift
        attended, _ = self.attention(normed, position_embeddings, attention_mask, cache, **kwargs)
        hidden_states = hidden_states + self.attention_out_norm(self.dropout(attended)) * attention_gate
        normed = self.cross_attention_norm(hidden_states)
        context = None if context is None else self.context_norm(context)
        attended, _ = self.cross_attention(normed, context, context_mask, cache, **kwargs)
        hidden_states = hidden_states + self.cross_attention_out_norm(self.dropout(attended))
        normed = self.mlp_norm(hidden_states) * (1 + mlp_scale) + mlp_shift
        return hidden_states + self.mlp_out_norm(self.dropout(self.mlp(normed))) * mlp_gate  # (batch, length, hidden)


class CropEmbedding(nn.Module):
    """Fourier features of the size and place of the crop that an image is, projected."""

    frequencies: torch.Tensor

    def __init__(self, config: TextVARConfig):
        super().__init__()
        # Random numbers, which are never trained.
        self.register_buffer("frequencies", torch.empty(config.hidden_size // 8))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, crop_sizes: torch.Tensor) -> torch.Tensor:
        return self.proj(fourier_features(crop_coordinates(crop_sizes), self.frequencies))  # (batch, hidden)


def crop_coordinates(sizes: torch.Tensor) -> torch.Tensor:
    """
    Height and width of pictures that are resized to a short side of 512, and top and left of the square in their
    middle, `(batch, 4)`, of the pictures' own heights and widths `(batch, 2)`.
    """
    sizes = sizes.float()
    # Rounded towards zero, as in the official code, where a side of 512 may become 511.
    resized = (sizes * (CROP_BASE / sizes.amin(dim=1, keepdim=True))).int()
    offsets = ((resized - CROP_BASE) // 2).clamp(min=0)
    return torch.cat([resized, offsets], dim=1)


def fourier_features(coordinates: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of each coordinate `(batch, n)`: `(batch, 2 * n * frequencies)`, in the frequencies' dtype."""
    # In the official order: another order of the products would change them visibly, since coordinates are large.
    angles = coordinates.unsqueeze(-1) * frequencies * 2 * math.pi
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class EmptyText(nn.Module):
    """Learned vectors in place of texts without tokens."""

    def __init__(self, config: TextVARConfig):
        super().__init__()
        self.hidden_state = nn.Parameter(torch.zeros(config.cross_attention_dim))
        self.pooled = nn.Parameter(torch.zeros(config.pooled_projection_dim))

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(batch, length, width)`, `(batch, length)` and `(batch, width)`; the vector of a text without tokens is its first."""
        is_empty = ~mask.any(dim=1, keepdim=True)  # (batch, 1)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        hidden_states = torch.where(is_empty[..., None], self.hidden_state.to(hidden_states), hidden_states)
        return hidden_states, mask | (is_empty & first), torch.where(is_empty, self.pooled.to(pooled), pooled)


class TextVAREmbeddings(BlockEmbeddings):
    """Tokens of a text and its image; positions are rotary, in the attention."""

    def _add_condition(self, config: TextVARConfig) -> None:
        self.condition_proj = nn.Linear(config.pooled_projection_dim, config.hidden_size)
        self.crop_embedding = CropEmbedding(config) if config.crop_conditioning else None
        self.empty_text = EmptyText(config) if config.learned_empty_text else None


__all__ = ["TextVARAttention", "TextVARBlock", "TextVAREmbeddings"]
