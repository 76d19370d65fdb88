# SPDX-License-Identifier: Apache-2.0
"""Plots of a tokenizer: reconstructions scale by scale, and the usage of its codebook."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torchvision.utils import make_grid

from ..autoencoders import Tokenizer
from ..modes import evaluation_mode
from ..scales import PatchNums, scale_sizes
from .class_maps import class_colors
from .feature_extractors import rgb_bytes


# What `reconstruction_grid` and `usage_plot` show, for model cards.
RECONSTRUCTION_CAPTION = (
    "Each row is one image: its reconstruction from the first scale alone, from the first two and so on, then from all "
    "scales, and, at the right, the original."
)
USAGE_CAPTION = (
    "Share of the codebook that each scale used on the validation images, its perplexity over the codebook's size, and "
    "the share that as many uniformly random tokens would use."
)

# Smaller images are enlarged until their shorter side has about this many pixels.
VISIBLE_SIDE = 64


@torch.no_grad()
def reconstruction_grid(vqvae: Tokenizer, pixel_values: torch.Tensor) -> Image.Image:
    """
    Images in `[-1, 1]`, or class maps, in rows: reconstructions after one scale, after two and so on, then the
    original. Each class has its own colour.
    """
    with evaluation_mode(vqvae):
        _, _, codes = vqvae.encode(pixel_values.to(vqvae.device), return_dict=False)
        stages = [
            vqvae.decode(codes, num_scales=num_scales, return_dict=False)[0]
            for num_scales in range(1, len(vqvae.config.patch_nums) + 1)
        ]
    columns = [*stages, pixel_values]
    return image_grid(columns if vqvae.config.num_pixel_classes is None else [class_colors(maps) for maps in columns])


def image_grid(columns: Sequence[torch.Tensor]) -> Image.Image:
    """
    Columns of images `(rows, channels, height, width)` in `[-1, 1]` side by side. Those under 64 pixels are enlarged by an
    integer factor.
    """
    images = torch.stack([rgb_bytes(column).cpu() for column in columns], dim=1).flatten(0, 1)
    factor = max(1, round(VISIBLE_SIDE / min(images.shape[-2:])))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    grid = make_grid(images, nrow=len(columns), padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def usage_plot(
    patch_nums: PatchNums, usage: Sequence[float], perplexity: Sequence[float], reachable: Sequence[float]
) -> Figure:
    """The share of the codebook that each scale uses, its perplexity, and the share within reach of random tokens."""
    labels = [f"{height}x{width}" for height, width in scale_sizes(patch_nums)]
    for name, shares in (("usage", usage), ("perplexity", perplexity), ("reachable", reachable)):
        if len(shares) != len(labels):
            raise ValueError(f"`{name}` must have one entry for each of {len(labels)} scales, got {len(shares)}.")
    figure = Figure(figsize=(max(5.0, 0.7 * len(labels) + 2), 3.6), layout="constrained")
    axes = figure.subplots()
    positions = range(len(labels))
    axes.bar([position - 0.2 for position in positions], usage, width=0.4, label="codes used")
    axes.bar([position + 0.2 for position in positions], perplexity, width=0.4, label="perplexity / codebook size")
    axes.plot(positions, reachable, linestyle="none", marker="_", color="black", markersize=22, label="within reach")
    axes.set_xticks(positions, labels)
    axes.set_xlabel("scale (height x width)")
    axes.set_ylabel("share of the codebook")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
