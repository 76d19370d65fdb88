# SPDX-License-Identifier: Apache-2.0
"""The convolutional encoder and decoder of VQ-VAE (van den Oord et al. 2017, section 4.1), which VQ-VAE-2 stacks."""

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig


class ResidualBlock(nn.Module):
    """A 3x3 and a 1x1 convolution, each after a ReLU, with a skip connection."""

    def __init__(self, config: HierarchicalVQVAEConfig):
        super().__init__()
        channels, inner = config.base_channels, config.residual_channels
        self.conv1 = nn.Conv2d(channels, inner, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(inner, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.conv1(functional.relu(hidden_states))
        return residual + self.conv2(functional.relu(hidden_states))  # (batch, base_channels, height, width)


class PlainEncoder(GradientCheckpointingLayer):
    """Maps `(batch, in_channels, height, width)` to `(batch, base_channels, height / stride, width / stride)`."""

    def __init__(self, config: HierarchicalVQVAEConfig, in_channels: int, stride: int):
        super().__init__()
        channels, halvings = config.base_channels, stride.bit_length() - 1
        widths = [in_channels, channels // 2] + [channels] * (halvings - 1)
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(width, next_width, kernel_size=4, stride=2, padding=1)
            for width, next_width in zip(widths[:-1], widths[1:], strict=True)
        )
        self.conv = nn.Conv2d(widths[-1], channels, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.num_res_blocks))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for downsampler in self.downsamplers:
            hidden_states = functional.relu(downsampler(hidden_states))
        hidden_states = self.conv(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return functional.relu(hidden_states)


class PlainDecoder(GradientCheckpointingLayer):
    """Maps `(batch, in_channels, height, width)` to `(batch, out_channels, stride * height, stride * width)`."""

    def __init__(self, config: HierarchicalVQVAEConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        channels, doublings = config.base_channels, stride.bit_length() - 1
        # The mirror image of the encoder's widths; a single doubling has nothing between its two ends.
        widths = [channels] * max(doublings - 1, 1) + [channels // 2] * (doublings > 1) + [out_channels]
        self.conv_in = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.num_res_blocks))
        *upsamplers, self.conv_out = (
            nn.ConvTranspose2d(width, next_width, kernel_size=4, stride=2, padding=1)
            for width, next_width in zip(widths[:-1], widths[1:], strict=True)
        )
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(functional.relu(hidden_states))
        return self.conv_out(functional.relu(hidden_states))
