# SPDX-License-Identifier: Apache-2.0
"""PixelSNAIL: p(codes | class, coarser codes) by causal convolutions and attention."""

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..tensor_checks import check_range
from .causal_layers import WeightNormConv2d, norm_per_channel
from .configuration_pixelsnail import PixelSNAILConfig
from .modeling_pixel_prior import PixelPrior
from .row_cache import RowCache


def pointwise_conv(in_channels: int, out_channels: int, bias: bool = True) -> WeightNormConv2d:
    return WeightNormConv2d(in_channels, out_channels, (1, 1), bias=bias)


def causal_conv(in_channels: int, out_channels: int, size: int) -> WeightNormConv2d:
    """Reads `size - 1` rows above and, in its own row, the places to the left."""
    side = size // 2
    return WeightNormConv2d(in_channels, out_channels, (size, size), (side, side, size - 1, 0), num_masked=size - side)


def centred_conv(in_channels: int, out_channels: int, size: int = 3) -> WeightNormConv2d:
    return WeightNormConv2d(in_channels, out_channels, (size, size), (size // 2, size // 2, size // 2, size // 2))


class GatedResBlock(nn.Module):
    """A residual block of two convolutions and a gate, with inputs beside its first and its second one."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module, dropout: float, aux_conv=None, condition_conv=None):
        super().__init__()
        self.conv1 = conv1
        self.aux_conv = aux_conv
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv2
        self.condition_conv = condition_conv

    def forward(
        self,
        states: torch.Tensor,
        aux_states: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        cache: RowCache | None = None,
    ) -> torch.Tensor:
        hidden = self.conv1(functional.elu(states), cache)
        if self.aux_conv is not None and aux_states is not None:
            hidden = hidden + self.aux_conv(functional.elu(aux_states), cache)
        hidden = self.conv2(self.dropout(functional.elu(hidden)), cache)
        if self.condition_conv is not None and condition is not None:
            hidden = hidden + self.condition_conv(condition, cache)
        return states + functional.glu(hidden, dim=1)


def pointwise_block(channels: int, hidden: int, dropout: float, aux_channels: int = 0) -> GatedResBlock:
    aux_conv = pointwise_conv(aux_channels, hidden) if aux_channels else None
    return GatedResBlock(pointwise_conv(channels, hidden), pointwise_conv(hidden, 2 * channels), dropout, aux_conv)


class PixelSNAILAttention(nn.Module):
    """Attention of each position to those strictly before it; the first one gets zeros."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        width = config.hidden_size // 2
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.query = pointwise_conv(config.hidden_size + 2, width)
        self.key = pointwise_conv(2 * config.hidden_size + 2, width)
        self.value = pointwise_conv(2 * config.hidden_size + 2, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, cache: RowCache | None = None) -> torch.Tensor:
        projections = self.query(queries, cache), self.key(keys, cache), self.value(keys, cache)
        query, key, value = (
            projection.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3) for projection in projections
        )  # (batch, heads, positions, head_dim)
        if cache is not None:
            key, value = cache.extend(self, torch.cat([key, value], dim=-1)).chunk(2, dim=-1)
        num_new, num_all = query.shape[2], key.shape[2]
        begin = num_all - num_new
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=query.device).tril(begin - 1)
        # A row without anything visible is not a number to some kernels: the first position sees itself, in vain.
        mask[0, 0] = True
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        if begin == 0:
            attended = functional.pad(attended[:, :, 1:], (0, 0, 1, 0))
        return attended.transpose(2, 3).flatten(1, 2).unflatten(2, queries.shape[2:])  # (batch, width, rows, columns)


class PixelSNAILBlock(GradientCheckpointingLayer):
    """Causal residual blocks, then attention to everything before (Chen et al. 2018, figure 3) or a projection."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        width, dropout = config.hidden_size, config.dropout

        def causal_block() -> GatedResBlock:
            condition_conv = None
            if config.has_condition:
                condition_conv = pointwise_conv(config.condition_hidden_size, 2 * width, bias=False)
            return GatedResBlock(
                causal_conv(width, config.residual_size, config.kernel_size),
                causal_conv(config.residual_size, 2 * width, config.kernel_size),
                dropout,
                condition_conv=condition_conv,
            )

        self.res_blocks = nn.ModuleList(causal_block() for _ in range(config.num_res_blocks))
        if config.attention:
            self.key_block = pointwise_block(2 * width + 2, width, dropout)
            self.query_block = pointwise_block(width + 2, width, dropout)
            self.attention = PixelSNAILAttention(config)
            self.output_block = pointwise_block(width, width, dropout, aux_channels=width // 2)
        else:
            self.attention = None
            self.output_conv = pointwise_conv(width + 2, width)

    def forward(
        self,
        states: torch.Tensor,
        positions: torch.Tensor,
        condition: torch.Tensor | None,
        cache: RowCache | None = None,
    ) -> torch.Tensor:
        hidden = states
        for block in self.res_blocks:
            hidden = block(hidden, condition=condition, cache=cache)
        if self.attention is None:
            return self.output_conv(torch.cat([hidden, positions], dim=1), cache)
        keys = self.key_block(torch.cat([states, hidden, positions], dim=1), cache=cache)
        queries = self.query_block(torch.cat([hidden, positions], dim=1), cache=cache)
        attended = self.attention(queries, keys, cache)
        return self.output_block(hidden, attended, cache=cache)  # (batch, hidden, rows, width)


class PixelSNAILConditionStack(nn.Module):
    """Features of the coarser codes on the grid of the map, `(batch, condition_hidden, height, width)`."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        self.map_sizes = (config.condition_map_size, config.map_size)
        self.num_codes = config.num_condition_codes
        width = config.condition_hidden_size
        self.conv = centred_conv(config.num_condition_codes, width)
        self.blocks = nn.ModuleList(
            GatedResBlock(centred_conv(width, width), centred_conv(width, 2 * width), config.dropout)
            for _ in range(config.num_condition_res_blocks)
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        coarse_map = codes.unflatten(1, self.map_sizes[0])  # pyright: ignore[reportArgumentType]
        states = self.conv(encode_one_hot(coarse_map, self.num_codes, self.conv.weight_v.dtype))
        for block in self.blocks:
            states = block(states)
        return functional.interpolate(states, size=self.map_sizes[1], mode="nearest")


def encode_one_hot(codes: torch.Tensor, num_codes: int, dtype: torch.dtype) -> torch.Tensor:
    """A map of codes `(batch, rows, width)` as channels, `(batch, num_codes, rows, width)`."""
    return functional.one_hot(codes, num_codes).permute(0, 3, 1, 2).to(dtype)


class PixelSNAIL(PixelPrior):
    r"""
    PixelSNAIL (Chen et al. 2018) over a map of codes, as the priors of a VQ-VAE-2 (Razavi et al. 2019): causal
    convolutions and attention, given the codes of a coarser map, a class or both.

    Args:
        config ([`PixelSNAILConfig`]): Sizes.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import PixelSNAIL, PixelSNAILConfig

    >>> sizes = {"codebook_size": 32, "hidden_size": 32, "residual_size": 16, "num_blocks": 1, "num_res_blocks": 1}
    >>> model = PixelSNAIL(PixelSNAILConfig(map_size=4, condition_map_size=2, condition_hidden_size=16, **sizes))
    >>> coarse, codes = torch.randint(0, 32, (3, 4)), torch.randint(0, 32, (3, 16))
    >>> output = model(codes, condition_codes=coarse, labels=codes)
    >>> output.logits.shape
    torch.Size([3, 16, 32])
    ```
    """

    config: PixelSNAILConfig
    config_class = PixelSNAILConfig
    base_model_prefix = "pixelsnail"
    _no_split_modules = ["PixelSNAILBlock"]

    def __init__(self, config: PixelSNAILConfig):
        super().__init__(config)
        width, size, reach = config.hidden_size, config.kernel_size, config.kernel_size // 2
        # Their paddings of -1 cut off the own row and the own column.
        self.above_conv = WeightNormConv2d(config.codebook_size, width, (reach, size), (reach, reach, reach, -1))
        self.left_conv = WeightNormConv2d(config.codebook_size, width, (reach + 1, reach), (reach, -1, reach, 0))
        self.condition_stack = None
        if config.condition_map_size is not None:
            self.condition_stack = PixelSNAILConditionStack(config)
        num_classes = config.num_class_embeddings
        self.class_embedding = nn.Embedding(num_classes, config.condition_hidden_size) if num_classes else None
        self.blocks = nn.ModuleList(PixelSNAILBlock(config) for _ in range(config.num_blocks))
        self.output_blocks = nn.ModuleList(
            pointwise_block(width, config.residual_size, config.dropout) for _ in range(config.num_output_res_blocks)
        )
        self.head = pointwise_conv(width, config.codebook_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, WeightNormConv2d):
            init.kaiming_uniform_(module.weight_v, a=5**0.5)  # torch's own initialisation of convolutions
            init.copy_(module.weight_g, norm_per_channel(module.direction()))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    def positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Row and column of every position as fractions around 0, `(1, 2, height, width)` in fp32."""
        sides = (self.config.height, self.config.width)
        rows, columns = ((torch.arange(side, device=device).float() - side / 2) / side for side in sides)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]

    def embed_condition(
        self, class_labels: torch.Tensor | None, condition_codes: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The coarser codes on the grid of the map plus the class, or the class alone, for which one position does."""
        condition = None
        if self.condition_stack is not None:
            condition = self.condition_stack(self._check_condition_codes(condition_codes))
        elif condition_codes is not None:
            raise ValueError("`condition_codes` must be None: the model was made without `condition_map_size`.")
        if self.class_embedding is not None:
            embedding = self.class_embedding(class_labels)[:, :, None, None]
            condition = embedding if condition is None else condition + embedding
        return condition  # (batch, condition_hidden, height, width)

    def predict(
        self, rows: torch.Tensor, condition: torch.Tensor | None, begin: int, cache: RowCache | None = None
    ) -> torch.Tensor:
        end = begin + rows.shape[1]
        one_hot = encode_one_hot(rows, self.config.codebook_size, self.dtype)
        above, left = self.above_conv(one_hot, cache), self.left_conv(one_hot, cache)
        if begin == 0:
            # Where there is nothing above or to the left, not even the bias is added.
            above = functional.pad(above[:, :, 1:], (0, 0, 1, 0))
        states = above + functional.pad(left[..., 1:], (1, 0))  # (batch, hidden, rows, width)
        positions = self.positions(rows.device)[:, :, begin:end].to(states.dtype).expand(states.shape[0], -1, -1, -1)
        if condition is not None and condition.shape[2] > 1:
            condition = condition[:, :, begin:end]
        for block in self.blocks:
            states = block(states, positions, condition, cache=cache)
        for block in self.output_blocks:
            states = block(states, cache=cache)
        return self.head(functional.elu(states), cache)

    def _check_condition_codes(self, condition_codes: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        found = None if condition_codes is None else tuple(condition_codes.shape)
        if condition_codes is None or condition_codes.ndim != 2 or condition_codes.shape[1] != config.condition_length:
            raise ValueError(
                f"`condition_codes` must have the shape (batch, {config.condition_length}), all codes of the coarser map of "
                f"{config.condition_map_size} for map_size={config.map_size}, got {found}."
            )
        size = config.num_condition_codes
        check_range("condition_codes", condition_codes, 0, size - 1, f"in [0, {size})")
        return condition_codes


__all__ = ["PixelSNAIL"]
