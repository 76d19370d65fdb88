# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training: reconstructions scale by scale, use of the codebook, curves of the log."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter
from PIL import Image
from torch import nn
from torchvision.utils import make_grid

from ..autoencoders import VQVAEModel
from ..scales import PatchNums, scale_sizes
from .scaling import SYMBOLS, ScalingLaw, ScalingRun


# What `reconstruction_grid` and `usage_plot` show, for those who see the picture alone.
RECONSTRUCTION_CAPTION = (
    "Each row is one image: its reconstruction from the first scale alone, from the first two and so on, then from all "
    "scales, and, at the right, the original."
)
USAGE_CAPTION = (
    "Share of the codebook that each scale used on the validation images, its perplexity over the codebook's size, and "
    "the share that as many tokens would use if they were drawn uniformly."
)

# Smaller images are enlarged until their shorter side has about this many pixels.
VISIBLE_SIDE = 64


def rgb_bytes(images: torch.Tensor) -> torch.Tensor:
    """
    Images as eyes and feature extractors take them. Of more than three channels the first three are shown, of two the
    first one, and one channel is gray.

    Args:
        images (`torch.FloatTensor` of shape `(batch, channels, height, width)`):
            Images in `[-1, 1]`; values outside are cut off.

    Returns:
        `torch.ByteTensor` of shape `(batch, 3, height, width)`.
    """
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstruction_grid(vqvae: VQVAEModel, pixel_values: torch.Tensor) -> Image.Image:
    """
    Draw what each scale adds. Each row is one image: the reconstruction after one scale, after two and so on to the
    final one, and next to that the original.

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer; it draws in evaluation mode whatever mode it is in.
        pixel_values (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`): Images in `[-1, 1]`.

    Returns:
        `PIL.Image.Image`: In RGB, images under 64 pixels enlarged by an integer factor.
    """
    with _evaluation_mode(vqvae):
        _, _, codes = vqvae.encode(pixel_values.to(vqvae.device), return_dict=False)
        stages = [
            vqvae.decode(codes, num_scales=num_scales, return_dict=False)[0]
            for num_scales in range(1, len(vqvae.config.patch_nums) + 1)
        ]
    columns = torch.stack([rgb_bytes(stage).cpu() for stage in (*stages, pixel_values)], dim=1)
    images = columns.flatten(0, 1)  # (batch * columns, 3, height, width)
    factor = max(1, round(VISIBLE_SIDE / min(images.shape[-2:])))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    grid = make_grid(images, nrow=columns.shape[1], padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def usage_plot(
    patch_nums: PatchNums, usage: Sequence[float], perplexity: Sequence[float], reachable: Sequence[float]
) -> Figure:
    """
    Draw how much of the codebook each scale uses, beside what it can use: few tokens cannot hit many codes.

    Args:
        patch_nums (`list`): Size of the token map of every scale.
        usage (`list[float]`): For every scale the share of the codes that occurred.
        perplexity (`list[float]`): For every scale the perplexity of its codes, divided by `codebook_size`.
        reachable (`list[float]`):
            For every scale the share to expect of as many uniform draws as it had tokens: `1 - (1 - 1 / V) ** n` for
            `n` tokens and `V` codes.

    Returns:
        `matplotlib.figure.Figure`: Its `savefig` writes the picture.

    Raises:
        `ValueError`: If a list has not one entry per scale.
    """
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


def curves_plot(log_path: str | Path, names: Sequence[str], marks: Mapping[str, int] | None = None) -> Figure:
    """
    Draw figures of a training log over the steps, one panel for each.

    Args:
        log_path (`str`): A `train_log.jsonl`.
        names (`list[str]`): Figures to draw, such as `reconstruction_loss` and `validation_psnr`.
        marks (`dict[str, int]`, *optional*):
            Steps at which something began, by its name, such as the adversarial loss; drawn as vertical lines.

    Returns:
        `matplotlib.figure.Figure`: Its `savefig` writes the picture.

    Raises:
        `ValueError`: If `names` is empty or has a figure that is nowhere in the log.
    """
    lines = [json.loads(line) for line in Path(log_path).read_text(encoding="utf-8").splitlines()]
    known = sorted(set().union(*lines) - {"step"})
    if len(names) == 0 or not set(names) <= set(known):
        raise ValueError(f"`names` must be one or more of the log's {known}, got {list(names)}.")
    figure = Figure(figsize=(6.4, 0.6 + 2.0 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        # A figure of the validation may have a single point.
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axes.set_ylabel(name.replace("_", " "))
        for mark, step in (marks or {}).items():
            axes.axvline(step, color="gray", linestyle="--", linewidth=1)
            if axes is panels[0]:
                axes.annotate(mark, (step, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    panels[-1].set_xlabel("step")
    return figure


def scaling_plot(runs: Sequence[ScalingRun], laws: Sequence[ScalingLaw]) -> Figure:
    """
    Draw losses and error rates against parameters and training compute, with the power laws that were fitted to them.

    Args:
        runs (`list[ScalingRun]`): The trainings, whose curves are drawn over the compute.
        laws (`list[ScalingLaw]`): What [`~hf_var.training.scaling.fit_scaling_laws`] made of them.

    Returns:
        `matplotlib.figure.Figure`: Its `savefig` writes the picture.
    """
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for entry in laws:
        row, column = int("error" in entry.figure), int(entry.axis == "compute")
        axes = panels[row, column]
        is_last = entry.figure.startswith("last_scale")
        color = "C1" if is_last else "C0"
        if entry.axis == "compute":
            for run in runs:
                axes.plot(*zip(*run.curve(entry.figure), strict=True), color=color, alpha=0.35, linewidth=1)
        x, y = zip(*entry.points, strict=True)
        axes.plot(x, y, linestyle="none", marker=".", color=color)
        formula = f"({entry.law.prefactor:.2g} {SYMBOLS[entry.axis]})$^{{{entry.law.exponent:.3f}}}$"
        label = f"{'last scale' if is_last else 'all tokens'}: {formula}, r = {entry.law.correlation:.3f}"
        ends = (min(x), max(x))
        axes.plot(ends, [entry.law(end) for end in ends], linestyle="--", color=color, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        # Between two powers of ten its labels would lie upon each other.
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panels.flat:
        axes.legend(frameon=False)
    panels[0, 0].set_ylabel("validation loss in nats per token")
    panels[1, 0].set_ylabel("validation error rate")
    panels[1, 0].set_xlabel("parameters N in billions")
    panels[1, 1].set_xlabel("training compute C in PFLOP")
    return figure


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
