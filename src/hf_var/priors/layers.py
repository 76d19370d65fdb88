# SPDX-License-Identifier: Apache-2.0
"""Layers of the VAR transformer (Tian et al. 2024, section 4.2 and figure 4)."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend
from .cache import VARCache, cached
from .configuration_blocks import BlocksMixin
from .configuration_rq import RQTransformerConfig
from .configuration_var import VARConfig


# The learned scale of normalised queries is capped at 100, which keeps the softmax in half precision's range.
MAX_LOG_QUERY_SCALE = math.log(100)


class DropPath(nn.Module):
    """Skip a residual branch for a random part of the batch in training (Huang et al. 2016)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0 or not self.training:
            return hidden_states
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        kept = hidden_states.new_empty(shape).bernoulli_(1 - self.rate)
        return hidden_states * kept / (1 - self.rate)


class AdaLN(nn.Module):
    """`num_vectors` modulation vectors from the condition: a projection of its SiLU."""

    def __init__(self, config: BlocksMixin, num_vectors: int):
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(config.hidden_size, num_vectors * config.hidden_size)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.silu(condition)).unflatten(
            -1, (self.num_vectors, -1)
        )  # (batch, vectors, hidden)


class AdaLNOffset(nn.Module):
    """A layer's own offset to the modulation vectors that all layers share (VAR-d36)."""

    def __init__(self, config: VARConfig, num_vectors: int):
        super().__init__()
        self.offset = nn.Parameter(torch.empty(num_vectors, config.hidden_size))

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return condition + self.offset  # (batch, vectors, hidden)


class VARAttention(nn.Module):
    """Multi-head self-attention; with `qk_norm` on unit queries and keys, at a learned scale per head."""

    def __init__(self, config: VARConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        # The cosine attention carries its scale in the queries; 0.25 is the released models' for plain attention.
        self.scaling = 1.0 if config.qk_norm else 0.25 / math.sqrt(config.head_dim)
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.log_query_scale = nn.Parameter(torch.empty(config.num_attention_heads)) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (batch, heads, length, head_dim)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if self.log_query_scale is not None:
            # In fp32: half precision cannot hold the normalisation's epsilon.
            scale = self.log_query_scale.float().clamp(max=MAX_LOG_QUERY_SCALE).exp().view(-1, 1, 1)
            query = (functional.normalize(query.float(), dim=-1) * scale).to(value.dtype)
            key = functional.normalize(key.float(), dim=-1).to(value.dtype)
        key, value = cached(cache, self, query, key, value)
        # `is_causal` must be passed: transformers takes a missing one for True where there is no mask.
        attended, weights = attend(self, query, key, value, attention_mask, is_causal=False, **kwargs)
        return self.o_proj(attended), weights  # (batch, length, hidden)


class VARMLP(nn.Module):
    """Feed-forward layer, by default with the tanh form of GELU."""

    def __init__(self, config: VARConfig | RQTransformerConfig, activation: str = "gelu_pytorch_tanh"):
        super().__init__()
        width = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.activation = ACT2FN[activation]
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class VARBlock(GradientCheckpointingLayer):
    """A transformer layer whose normalisations and branches are modulated by the class (AdaLN)."""

    def __init__(self, config: VARConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.adaln = AdaLNOffset(config, 6) if config.shared_adaln else AdaLN(config, 6)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.attention = VARAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.mlp = VARMLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path_rates[layer_idx])

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        modulation = modulate(self.adaln, condition, cache, self.layer_idx)
        attention_gate, mlp_gate, attention_scale, mlp_scale, attention_shift, mlp_shift = modulation.split(1, dim=1)
        normed = self.attention_norm(hidden_states) * (1 + attention_scale) + attention_shift
        attended, _ = self.attention(normed, attention_mask, cache, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended) * attention_gate)
        normed = self.mlp_norm(hidden_states) * (1 + mlp_scale) + mlp_shift
        return hidden_states + self.drop_path(self.dropout(self.mlp(normed)) * mlp_gate)  # (batch, length, hidden)


class VARHeadNorm(nn.Module):
    """The normalisation before the output projection, modulated by the condition."""

    def __init__(self, config: BlocksMixin):
        super().__init__()
        self.layer_idx = config.num_hidden_layers
        self.adaln = AdaLN(config, 2)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)

    def forward(
        self, hidden_states: torch.Tensor, condition: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        scale, shift = modulate(self.adaln, condition, cache, self.layer_idx).split(1, dim=1)
        return self.norm(hidden_states) * (1 + scale) + shift  # (batch, length, hidden)


def modulate(adaln: nn.Module, condition: torch.Tensor | None, cache: Cache | None, layer_idx: int) -> torch.Tensor:
    """The modulation vectors `(batch, vectors, hidden)` of a layer; those of a `condition` not given are in the cache."""
    if condition is None and isinstance(cache, VARCache):
        return cache.modulations[layer_idx]
    vectors = adaln(condition)
    if isinstance(cache, VARCache):
        # As a copy, and no view of a projection's output: graphs compiled with one would not do for the other.
        cache.modulations[layer_idx] = vectors.clone()
    return vectors


class BlockEmbeddings(nn.Module):
    """
    Inputs of the tokens: the condition for the first block, the image so far for the later ones; all get the embedding
    of their scale.
    """

    def __init__(self, config: BlocksMixin):
        super().__init__()
        self.scale_lengths = config.scale_lengths
        self.scale_ends = [sum(config.scale_lengths[: scale + 1]) for scale in range(len(config.scale_lengths))]
        # Before the others, as in the files: optimizers and averages know parameters by their order.
        self._add_condition(config)
        self.input_proj = nn.Linear(config.latent_channels, config.hidden_size)
        self.start_position = nn.Parameter(torch.empty(config.block_lengths[0], config.hidden_size))
        self.level_embedding = nn.Parameter(torch.empty(len(config.scale_lengths), config.hidden_size))

    def _add_condition(self, config: Any) -> None:
        """Make the modules that embed the condition."""
        raise NotImplementedError

    def forward(self, condition: torch.Tensor | None, scale_inputs: torch.Tensor | None, begin: int) -> torch.Tensor:
        tokens = []
        if begin == 0 and condition is not None:
            tokens.append(condition.unsqueeze(1) + self.start_position)
        if scale_inputs is not None:
            tokens.append(self.input_proj(scale_inputs.to(self.start_position.dtype)))
        tokens = torch.cat(tokens, dim=1)
        end = begin + tokens.shape[1]
        levels = [
            self.level_embedding[scale].expand(min(end, scale_end) - max(begin, scale_end - length), -1)
            for scale, (scale_end, length) in enumerate(zip(self.scale_ends, self.scale_lengths, strict=True))
            if scale_end > begin and scale_end - length < end
        ]
        return tokens + torch.cat(levels)  # (batch, length, hidden)


class VAREmbeddings(BlockEmbeddings):
    """Tokens of a class and its image; all get the embedding of their position, too (Tian et al. 2024, figure 4)."""

    def __init__(self, config: VARConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.position_embedding = nn.Parameter(torch.empty(config.length, config.hidden_size))

    def _add_condition(self, config: VARConfig) -> None:
        # The last row is the unconditional class.
        self.class_embedding = nn.Embedding((config.num_labels or 0) + 1, config.condition_size)
        has_projection = config.condition_channels is not None
        self.condition_proj = nn.Linear(config.condition_size, config.hidden_size) if has_projection else None

    @torch.no_grad()
    def choose_labels(self, rows: list[int]) -> None:
        """Make the rows `rows` of the class embedding its labels; the unconditional row stays the last one."""
        weight = self.class_embedding.weight
        chosen = weight[torch.tensor([*rows, self.num_labels], device=weight.device)]
        self.class_embedding.weight = nn.Parameter(chosen, requires_grad=weight.requires_grad)
        self.class_embedding.num_embeddings = len(chosen)
        self.num_labels = len(rows)

    def embed_labels(self, class_labels: torch.Tensor) -> torch.Tensor:
        labels = torch.where(class_labels < 0, self.num_labels, class_labels)
        return self.class_embedding(labels)  # (batch, condition_size)

    def project_condition(self, class_embeds: torch.Tensor) -> torch.Tensor:
        """Class embeddings in the width of the transformer, `(batch, hidden)`."""
        return class_embeds if self.condition_proj is None else self.condition_proj(class_embeds)

    def forward(self, condition: torch.Tensor | None, scale_inputs: torch.Tensor | None, begin: int) -> torch.Tensor:
        tokens = super().forward(condition, scale_inputs, begin)
        return tokens + self.position_embedding[begin : begin + tokens.shape[1]]  # (batch, length, hidden)
