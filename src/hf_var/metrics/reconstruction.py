# SPDX-License-Identifier: Apache-2.0
"""Metrics of a tokenizer on a set of images: quality of reconstructions and use of the codes."""

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ..autoencoders import Tokenizer
from ..modes import evaluation_mode
from .class_maps import ClassMapMetrics
from .codebook_usage import CodeStatistics, energy_metrics, residual_energy
from .image_quality import ReconstructionMetrics
from .reconstruction_plots import reconstruction_grid, usage_plot


@torch.no_grad()
def compare_reconstructions(
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Mapping[str, torch.Tensor]],
    accelerator: Accelerator,
    metrics: ReconstructionMetrics | ClassMapMetrics,
    num_shown: int,
) -> tuple[dict[str, float], torch.Tensor | None]:
    """
    The `metrics` of what `reconstruct` makes of the images of all processes, and this process's first `num_shown`
    images, if it has any.
    """
    metrics, first = metrics.to(accelerator.device), None
    for batch in batches:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        metrics.update(pixel_values, reconstruct(pixel_values))
        first = pixel_values[:num_shown] if first is None else first
    return metrics.compute(), first


@torch.no_grad()
def measure_reconstruction(
    vqvae: Tokenizer,
    batches: Iterable[Mapping[str, torch.Tensor]],
    accelerator: Accelerator,
    perceptual_loss: nn.Module | None = None,
    feature_extractor: nn.Module | None = None,
    num_shown: int = 8,
) -> tuple[dict[str, float], dict[str, Image.Image | Figure]]:
    """
    Measure a tokenizer in evaluation mode on batches of `pixel_values` `(batch, in_channels, height, width)` in `[-1,
    1]`, or of class maps: the metrics of [`ReconstructionMetrics`], or of [`ClassMapMetrics`], and of
    [`CodeStatistics`] and the `residual_energy_k` of every scale; and, on the main process, the plots
    `reconstructions` and `codes`. All processes must call it, each with its own share of the images.
    """
    config = vqvae.config
    if config.num_pixel_classes is None:
        compared = ReconstructionMetrics(perceptual_loss, feature_extractor)
    else:
        compared = ClassMapMetrics(config.num_pixel_classes)
    statistics = CodeStatistics(config, accelerator.device)
    energy = torch.zeros(2, len(config.scale_lengths), device=accelerator.device)

    def reconstruct(pixel_values: torch.Tensor) -> torch.Tensor:
        features, _, codes = vqvae.encode(cast(torch.FloatTensor, pixel_values), return_dict=False)
        statistics.count(codes)
        energy.add_(residual_energy(vqvae, features, codes))
        return vqvae.decode(codes, return_dict=False)[0]

    with evaluation_mode(vqvae):
        metrics, first = compare_reconstructions(reconstruct, batches, accelerator, compared, num_shown)
    values = {**metrics, **statistics.compute(), **energy_metrics(energy)}
    plots: dict[str, Image.Image | Figure] = {}
    if accelerator.is_main_process and first is not None:
        scales = range(len(config.scale_lengths))
        usage = [values[f"usage_{scale}"] for scale in scales]
        perplexity = [values[f"perplexity_{scale}"] / config.codebook_size for scale in scales]
        plots["reconstructions"] = reconstruction_grid(vqvae, first)
        plots["codes"] = usage_plot(config.patch_nums, usage, perplexity, statistics.reachable())
    return values, plots
