# SPDX-License-Identifier: Apache-2.0
"""Layers of the RQ-Transformer (Lee et al. 2022, section 3.2), which are also those of VQGAN's GPT."""

from typing import cast

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend
from .configuration_rq import RQTransformerConfig
from .layers import VARMLP


class RQAttention(nn.Module):
    """Causal multi-head self-attention; a mask, where one is passed, takes the place of the causal one."""

    def __init__(self, config: RQTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

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
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(attended), weights  # (batch, length, hidden)


class RQLayer(GradientCheckpointingLayer):
    """A layer of GPT-2: attention and a feed-forward layer, each after a normalisation."""

    def __init__(self, config: RQTransformerConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = RQAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VARMLP(config, config.hidden_act)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, cache, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))  # (batch, length, hidden)


class RQHead(nn.Module):
    """A normalisation and the output projection, one for all depths or one for each."""

    def __init__(self, config: RQTransformerConfig, num_codes: int, num_projections: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projections = nn.ModuleList(
            nn.Linear(config.hidden_size, num_codes, bias=config.head_bias) for _ in range(num_projections)
        )

    def forward(self, hidden_states: torch.Tensor, depth: int = 0) -> torch.Tensor:
        """Logits, in fp32, of `(..., length, hidden)`; with several projections `depth` is the depth of the first."""
        normed = self.norm(hidden_states)
        if len(self.projections) == 1:
            return self.projections[0](normed).float()
        parts = enumerate(normed.unbind(dim=-2), start=depth)
        return torch.stack([self.projections[index](part) for index, part in parts], dim=-2).float()


class RQEmbeddings(nn.Module):
    """Inputs of both transformers: condition tokens, stacks of codes, and the codes of one position."""

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        width, self.depth = config.hidden_size, config.depth
        self.is_cumulative = config.cumulative_depth_inputs
        self.unconditional_id = config.unconditional_id or 0
        # Numbers of the codes of each depth in a table for all of them.
        self.table_step = config.codebook_size if config.separate_depth_embeddings else 0
        num_conditions = config.num_condition_ids + (config.unconditional_id is not None)
        self.condition_embedding = None if config.shared_embedding else nn.Embedding(num_conditions, width)
        reads_vectors, has_depth_layers = config.code_inputs == "vectors", config.num_depth_layers > 0
        num_tables = config.depth if config.separate_depth_embeddings else 1
        self.code_embedding = None if reads_vectors else nn.Embedding(num_tables * config.codebook_size, width)
        self.input_proj = nn.Linear(config.latent_channels, width) if reads_vectors else None
        self.depth_proj = nn.Linear(config.latent_channels, width) if reads_vectors and has_depth_layers else None
        num_read = config.condition_length + config.num_positions - 1
        self.position_embedding = nn.Embedding(config.max_position_embeddings or num_read, width)
        self.depth_position_embedding = nn.Embedding(config.depth, width) if has_depth_layers else None
        self.dropout = nn.Dropout(config.embedding_dropout)

    def _embed(self, stacks: torch.Tensor, projection: nn.Module | None) -> torch.Tensor:
        """Codes `(..., depths)` or code vectors `(..., depths, channels)`, beginning with the first depth."""
        if projection is not None:
            return projection(stacks.to(self.position_embedding.weight.dtype))
        offsets = torch.arange(stacks.shape[-1], device=stacks.device) * self.table_step
        return cast(nn.Embedding, self.code_embedding)(stacks + offsets)  # (..., depths, hidden)

    def forward(
        self, condition_ids: torch.Tensor | None, stacks: torch.Tensor | None, begin: int | torch.Tensor
    ) -> torch.Tensor:
        """Inputs of the tokens from `begin` on: of the condition, then of whole stacks of codes."""
        tokens = []
        if condition_ids is not None:
            rows = torch.where(condition_ids < 0, self.unconditional_id, condition_ids)
            table = self.code_embedding if self.condition_embedding is None else self.condition_embedding
            tokens.append(cast(nn.Embedding, table)(rows))
        if stacks is not None:
            tokens.append(self._embed(stacks, self.input_proj).sum(dim=2))
        tokens = torch.cat(tokens, dim=1)
        positions = torch.arange(tokens.shape[1], device=tokens.device) + begin
        return self.dropout(tokens + self.position_embedding(positions))  # (batch, length, hidden)

    def depth_inputs(self, context: torch.Tensor, stacks: torch.Tensor | None) -> torch.Tensor:
        """Inputs of the depths of a position, its `context` `(batch, hidden)` and the codes before each depth."""
        tokens = context.unsqueeze(1)
        if stacks is not None:
            if self.depth_proj is not None:
                # The sum before the projection, whose bias then counts once.
                stacks = stacks.cumsum(dim=1) if self.is_cumulative else stacks
                embedded = self._embed(stacks, self.depth_proj)
            else:
                embedded = self._embed(stacks, None)
                embedded = embedded.cumsum(dim=1) if self.is_cumulative else embedded
            tokens = torch.cat([tokens, embedded], dim=1)
        if self.depth_position_embedding is not None:
            depths = torch.arange(tokens.shape[1], device=tokens.device)
            tokens = tokens + self.depth_position_embedding(depths)
        return tokens  # (batch, depths, hidden)


__all__ = ["RQAttention", "RQEmbeddings", "RQHead", "RQLayer"]
