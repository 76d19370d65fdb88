# SPDX-License-Identifier: Apache-2.0
"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021), which VAR uses unchanged."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vqvae import VQVAEConfig
from .tiling import map_tiles


# GroupNorm's epsilon is part of the released checkpoints' numerics; torch's default is ten times larger.
GROUP_NORM_EPSILON = 1e-6


# On CPUs, allocating a new full-size map (tens of megabytes) costs about ten times as much as these operations.
# With gradients they create new tensors, because hooks and autograd may keep them.


def silu(hidden_states: torch.Tensor) -> torch.Tensor:
    """SiLU, in place without gradients; use it only on the output of a normalisation."""
    return functional.silu(hidden_states, inplace=not torch.is_grad_enabled())


def add(hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The sum, written into `hidden_states` without gradients; use it only on the output of a convolution."""
    if torch.is_grad_enabled() or hidden_states.dtype != residual.dtype:
        return residual + hidden_states
    return hidden_states.add_(residual)


def fast_format(inputs: torch.Tensor, training: bool) -> torch.Tensor:
    """
    `inputs` in the memory format in which convolutions are fastest. Activations keep that of their input, so once is
    enough. In training the caller decides, because small groups of channels are normalised faster without it.
    """
    if training or inputs.device.type == "mps":
        return inputs
    return inputs.contiguous(memory_format=torch.channels_last)


def init_convolution(module: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """torch's own default, which must be spelled out for models that are built on the meta device."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if module.bias is not None:
        limit = 1 / math.sqrt(module.weight[0].numel())
        init.uniform_(module.bias, -limit, limit)


class ResnetBlock(nn.Module):
    """Two convolutions with pre-normalisation and a skip connection, 1x1-projected when the width changes."""

    def __init__(self, config: VQVAEConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=GROUP_NORM_EPSILON)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, eps=GROUP_NORM_EPSILON)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.shortcut is None else self.shortcut(hidden_states)
        hidden_states = self.conv1(silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(self.dropout(silu(self.norm2(hidden_states))))
        return add(hidden_states, residual)  # (batch, out_channels, height, width)


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions of a feature map."""

    def __init__(self, config: VQVAEConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=GROUP_NORM_EPSILON)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        height, width = hidden_states.shape[-2:]
        projected = self.qkv(self.norm(hidden_states)).flatten(2).transpose(1, 2)  # (batch, positions, 3 * channels)
        # ONNX's exporter needs the axis of heads; elsewhere it would choose other kernels, with other roundings.
        projected = projected.unsqueeze(1) if torch.compiler.is_exporting() else projected
        query, key, value = projected.chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value)
        attended = attended.flatten(0, -3).transpose(1, 2).unflatten(2, (height, width))
        return hidden_states + self.proj_out(attended)  # (batch, channels, height, width)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # One row below and one column to the right only: symmetric padding would shift the released weights' grid.
        return self.conv(functional.pad(hidden_states, (0, 1, 0, 1)))  # (batch, channels, height / 2, width / 2)


class Upsample(nn.Module):
    """Double height and width by repetition and smooth the result with a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return self.conv(hidden_states)  # (batch, channels, 2 * height, 2 * width)


class Level(GradientCheckpointingLayer):
    """The residual blocks of one resolution, each followed by attention where the level has it, then the resampling."""

    def __init__(
        self,
        config: VQVAEConfig,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool,
        resample: nn.Module | None,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.resnets = nn.ModuleList(ResnetBlock(config, width, out_channels) for width in widths)
        self.attentions = nn.ModuleList(AttentionBlock(config, out_channels) for _ in widths if attention)
        self.resample = resample

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for index, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states)
            if len(self.attentions) > 0:
                hidden_states = self.attentions[index](hidden_states)
        return hidden_states if self.resample is None else self.resample(hidden_states)


class MidBlock(GradientCheckpointingLayer):
    """Two residual blocks at the coarsest resolution, with attention between them."""

    def __init__(self, config: VQVAEConfig, channels: int):
        super().__init__()
        self.resnet1 = ResnetBlock(config, channels, channels)
        self.attention = AttentionBlock(config, channels) if config.mid_block_attention else None
        self.resnet2 = ResnetBlock(config, channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnet1(hidden_states)
        if self.attention is not None:
            hidden_states = self.attention(hidden_states)
        return self.resnet2(hidden_states)


class Encoder(nn.Module):
    """Images `(batch, in_channels, height, width)` to maps `(batch, encoder_out_channels, height / f, width / f)`."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        with_attention = config.levels_with_attention
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, kernel_size=3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                config,
                in_channels=config.base_channels if index == 0 else widths[index - 1],
                out_channels=width,
                num_blocks=config.num_res_blocks,
                attention=index in with_attention,
                resample=Downsample(width) if index < last else None,
            )
            for index, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config, widths[-1])
        self.norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=GROUP_NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.num_encoder_channels, kernel_size=3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(fast_format(pixel_values, self.training))
        for level in self.levels:
            hidden_states = level(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        return self.conv_out(silu(self.norm_out(hidden_states)))


class Decoder(nn.Module):
    """Maps `(batch, encoder_out_channels, height / f, width / f)` to images `(batch, out_channels, height, width)`."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        with_attention = config.levels_with_attention
        widths = [config.base_channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.num_encoder_channels, widths[0], kernel_size=3, padding=1)
        self.mid_block = MidBlock(config, widths[0])
        self.levels = nn.ModuleList(
            Level(
                config,
                in_channels=widths[0] if index == 0 else widths[index - 1],
                out_channels=width,
                num_blocks=config.num_res_blocks + 1,
                attention=last - index in with_attention,
                resample=Upsample(width) if index < last else None,
            )
            for index, width in enumerate(widths)
        )
        # Attention in tiles would see other positions: a level that has it is decoded whole, with all coarser ones.
        self.num_whole_levels = max([1, *(last - level + 1 for level in with_attention)])
        self.norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=GROUP_NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.num_output_channels, kernel_size=3, padding=1)

    def forward(self, latents: torch.Tensor, tile_size: int | None = None, tile_overlap: float = 0.0) -> torch.Tensor:
        """
        With a `tile_size`, in pixels, the levels after `num_whole_levels` work on tiles, of which neighbours overlap
        by the share `tile_overlap`.
        """
        hidden_states = self.mid_block(self.conv_in(fast_format(latents, self.training)))
        levels = list(self.levels)
        finer_levels = levels[self.num_whole_levels :]
        for level in levels[: self.num_whole_levels]:
            hidden_states = level(hidden_states)

        def finish(hidden_states: torch.Tensor) -> torch.Tensor:
            for level in finer_levels:
                hidden_states = level(hidden_states)
            return self.conv_out(silu(self.norm_out(hidden_states)))

        if tile_size is None:
            return finish(hidden_states)
        upsampling_factor = 2 ** max(len(finer_levels) - 1, 0)
        size = max(tile_size // upsampling_factor, 1)
        return map_tiles(finish, hidden_states, upsampling_factor, size, overlap=int(size * tile_overlap))
