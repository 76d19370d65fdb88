# SPDX-License-Identifier: Apache-2.0
"""Metrics of a tokenizer on a set of images: quality of reconstructions and use of the codes."""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ..autoencoders import VQVAEModel
from ..modes import evaluation_mode
from .codebook_usage import CodeStatistics, energy_metrics, residual_energy
from .image_quality import ReconstructionMetrics
from .reconstruction_plots import reconstruction_grid, usage_plot


@torch.no_grad()
def measure_reconstruction(
    vqvae: VQVAEModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    accelerator: Accelerator,
    perceptual_loss: nn.Module | None = None,
    feature_extractor: nn.Module | None = None,
    num_shown: int = 8,
) -> tuple[dict[str, float], dict[str, Image.Image | Figure]]:
    """
    Measure a tokenizer in evaluation mode on batches of `pixel_values` `(batch, in_channels, height, width)` in `[-1,
    1]`: the metrics of [`ReconstructionMetrics`] and [`CodeStatistics`] and the `residual_energy_k` of every scale;
    and, on the main process, the plots `reconstructions` and `codes`. All processes must call it, each with its own
    share of the images.
    """
    config = vqvae.config
    metrics = ReconstructionMetrics(perceptual_loss, feature_extractor).to(accelerator.device)
    statistics = CodeStatistics(config, accelerator.device)
    energy = torch.zeros(len(config.scale_lengths) + 1, device=accelerator.device)
    first = None
    with evaluation_mode(vqvae):
        for batch in batches:
            pixel_values = batch["pixel_values"].to(accelerator.device)
            features, _, codes = vqvae.encode(cast(torch.FloatTensor, pixel_values), return_dict=False)
            (sample,) = vqvae.decode(codes, return_dict=False)
            metrics.update(pixel_values, sample)
            statistics.count(codes)
            energy += residual_energy(vqvae, features, codes)
            first = pixel_values[:num_shown] if first is None else first
    values = {**metrics.compute(), **statistics.compute(), **energy_metrics(energy)}
    plots: dict[str, Image.Image | Figure] = {}
    if accelerator.is_main_process and first is not None:
        scales = range(len(config.scale_lengths))
        usage = [values[f"usage_{scale}"] for scale in scales]
        perplexity = [values[f"perplexity_{scale}"] / config.codebook_size for scale in scales]
        plots["reconstructions"] = reconstruction_grid(vqvae, first)
        plots["codes"] = usage_plot(config.patch_nums, usage, perplexity, statistics.reachable())
    return values, plots
