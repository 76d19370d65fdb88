# SPDX-License-Identifier: Apache-2.0
"""
Networks that tell images from reconstructions: images in [-1, 1] to logits, high for images.

They have no statistics over the whole batch, so that logits do not depend on gradient accumulation or on the number of
processes, and penalties on the gradients of single images are well defined.
"""

import math

import torch
from torch import nn
from torch.nn import functional


DISCRIMINATORS = ("patchgan", "stylegan")
LEAK = 0.2


def make_discriminator(
    kind: str,
    in_channels: int,
    image_size: tuple[int, int],
    batch_size: int,
    base_channels: int = 64,
    num_layers: int = 3,
) -> nn.Module:
    """A discriminator; a stylegan compares images in the largest groups of at most 4 that divide the batch."""
    if kind == "patchgan":
        discriminator = PatchDiscriminator(in_channels, base_channels, num_layers)
        if min(image_size) < discriminator.min_image_size:
            raise ValueError(
                f"`image_size` must be at least {discriminator.min_image_size} pixels per side for a patchgan with "
                f"`num_layers` = {num_layers}, got {image_size[0]}x{image_size[1]}. Take fewer layers or a stylegan."
            )
        return discriminator
    group_size = max(size for size in range(1, 5) if batch_size % size == 0)
    return StyleGANDiscriminator(in_channels, image_size, base_channels, group_size=group_size)


class PatchDiscriminator(nn.Module):
    """
    The discriminator of pix2pix (Isola et al. 2017, appendix 6.1.2) and VQGAN (Esser et al. 2021), which judges
    overlapping patches: 70 pixels wide with three layers, each of which halves the resolution. GroupNorm replaces the
    papers' BatchNorm, whose statistics would depend on how a batch is cut into micro-batches and processes, would
    differ between the generator's pass, which sees reconstructions alone, and the discriminator's, and would let one
    image's logit depend on the others, against R1's idea.
    """

    def __init__(self, in_channels: int, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.num_layers = num_layers
        self.conv_in = nn.Conv2d(in_channels, base_channels, kernel_size=4, stride=2, padding=1)
        widths = [base_channels * min(2**layer, 8) for layer in range(num_layers + 1)]
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for layer in range(1, num_layers + 1):
            # The norm has a bias of its own. Only the last of these layers keeps the resolution.
            stride = 2 if layer < num_layers else 1
            conv = nn.Conv2d(widths[layer - 1], widths[layer], kernel_size=4, stride=stride, padding=1, bias=False)
            self.convs.append(conv)
            # Groups of two channels or more: an even number of channels always has such a division.
            self.norms.append(nn.GroupNorm(math.gcd(32, widths[layer] // 2), widths[layer]))
        self.conv_out = nn.Conv2d(widths[-1], 1, kernel_size=4, padding=1)
        self.apply(self._init_weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def min_image_size(self) -> int:
        """Height and width from which on there is a logit: the last two layers take off a position each."""
        return 3 * 2**self.num_layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 1, height / 2**num_layers - 2, width / 2**num_layers - 2)`."""
        hidden_states = functional.leaky_relu(self.conv_in(images), LEAK)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden_states = functional.leaky_relu(norm(conv(hidden_states)), LEAK)
        return self.conv_out(hidden_states)


class StyleGANDiscriminator(nn.Module):
    """
    The residual discriminator of StyleGAN2 (Karras et al. 2020, section 4.1), which judges whole images. The weights
    start as He et al. have it and are used as they are: StyleGAN's equalized learning rate, weights of standard
    deviation 1 scaled at run time, would need a learning rate some twenty times that of the generator.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        base_channels: int = 64,
        max_channels: int = 512,
        group_size: int = 4,
    ):
        super().__init__()
        if min(image_size) < 8:
            raise ValueError(
                f"`image_size` must be at least 8 pixels per side for a stylegan discriminator, got "
                f"{image_size[0]}x{image_size[1]}."
            )
        # Down to 4 pixels on the shorter side, or the nearest reachable size if it is not a power of two.
        num_blocks = int(math.log2(min(image_size) / 4))
        widths = [min(base_channels * 2**level, max_channels) for level in range(num_blocks + 1)]
        self.conv_in = nn.Conv2d(in_channels, widths[0], kernel_size=1)
        self.blocks = nn.ModuleList(ResidualDownBlock(widths[level], widths[level + 1]) for level in range(num_blocks))
        self.minibatch_deviation = MinibatchStandardDeviation(group_size)
        self.conv_out = nn.Conv2d(widths[-1] + 1, widths[-1], kernel_size=3, padding=1)
        height, width = (size >> num_blocks for size in image_size)
        self.linear = nn.Linear(widths[-1] * height * width, widths[-1])
        self.linear_out = nn.Linear(widths[-1], 1)
        self.apply(self._init_weights)
        # The layers that no activation follows.
        shortcuts = [module.shortcut for module in self.modules() if isinstance(module, ResidualDownBlock)]
        for layer in (*shortcuts, self.linear_out):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=LEAK)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 1)`; each `group_size` images in a row are a group, of images or of reconstructions."""
        hidden_states = functional.leaky_relu(self.conv_in(images), LEAK)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = self.minibatch_deviation(hidden_states)
        hidden_states = functional.leaky_relu(self.conv_out(hidden_states), LEAK)
        hidden_states = functional.leaky_relu(self.linear(hidden_states.flatten(1)), LEAK)
        return self.linear_out(hidden_states)


class ResidualDownBlock(nn.Module):
    """Two convolutions, half the resolution, and a shortcut past them."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)
        self.downsample = BlurDownsample(in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(self.downsample(hidden_states))
        hidden_states = functional.leaky_relu(self.conv1(hidden_states), LEAK)
        hidden_states = functional.leaky_relu(self.conv2(self.downsample(hidden_states)), LEAK)
        # The sum of two independent signals, with the variance of one.
        return (hidden_states + residual) * math.sqrt(0.5)  # (batch, out_channels, height / 2, width / 2)


class BlurDownsample(nn.Module):
    """Half the resolution after the filter (1, 3, 3, 1), which leaves less aliasing than the mean of two by two pixels."""

    kernel: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(row, row).expand(channels, 1, 4, 4).contiguous()  # (channels, 1, 4, 4)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # A copy: distributed training writes into buffers at each forward pass, which would spoil an earlier one's graph.
        kernel = self.kernel.to(hidden_states.dtype, copy=True)
        return functional.conv2d(hidden_states, kernel, stride=2, padding=1, groups=hidden_states.shape[1])


class MinibatchStandardDeviation(nn.Module):
    """
    Shows each image how much the images around it differ (Karras et al. 2018, section 3), as one more channel,
    constant in groups of one image. Groups of a fixed size that follow one another hold either images or
    reconstructions, and logits do not depend on how many groups a process sees at a time.
    """

    def __init__(self, group_size: int):
        super().__init__()
        self.group_size = group_size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        if batch % self.group_size != 0:
            raise ValueError(
                f"The batch of a stylegan discriminator must be a multiple of `group_size` = {self.group_size}, got "
                f"{batch} images."
            )
        groups = hidden_states.float().unflatten(0, (-1, self.group_size))  # (groups, group_size, channels, ...)
        deviations = (groups.var(dim=1, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (groups,)
        deviations = deviations.repeat_interleave(self.group_size).to(hidden_states.dtype)
        channel = deviations.view(batch, 1, 1, 1).expand(batch, 1, height, width)
        return torch.cat([hidden_states, channel], dim=1)  # (batch, channels + 1, height, width)
