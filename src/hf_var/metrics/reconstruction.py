# SPDX-License-Identifier: Apache-2.0
"""Metrics of a tokenizer on a set of images: quality of reconstructions and use of the codes."""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ..autoencoders import Tokenizer
from ..modes import evaluation_mode
from .codebook_usage import CodeStatistics, residual_energy
from .image_quality import ReconstructionMetrics
from .reconstruction_plots import reconstruction_grid, usage_plot


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
    Measure a tokenizer, in evaluation mode. All processes must call it, each with its own share of the images.

    Args:
        vqvae ([`VQVAEModel`] or [`HierarchicalVQVAEModel`]): The tokenizer.
        batches (`Iterable`): Batches with `pixel_values` `(batch, in_channels, height, width)` in `[-1, 1]`.
        accelerator (`Accelerator`): Knows the device and the other processes.
        perceptual_loss (`nn.Module`, *optional*): For `lpips`, see [`ReconstructionMetrics`].
        feature_extractor (`nn.Module`, *optional*): For `rfid`, see [`ReconstructionMetrics`].
        num_shown (`int`, *optional*, defaults to 8): How many images of the first batch are plotted, at most.

    Returns:
        `tuple[dict, dict]`: The metrics of [`ReconstructionMetrics`] and [`CodeStatistics`] with the `residual_energy_k` of
        every scale; and, on the main process, the plots `reconstructions` and `codes`.
    """
    config = vqvae.config
    metrics = ReconstructionMetrics(perceptual_loss, feature_extractor).to(accelerator.device)
    statistics = CodeStatistics(config, accelerator.device)
    energy = torch.zeros(2, len(config.scale_lengths), device=accelerator.device)
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
    energy = cast(torch.Tensor, accelerator.reduce(energy, reduction="sum"))
    values = {**metrics.compute(), **statistics.compute()}
    for scale, left in enumerate((energy[1] / energy[0]).tolist()):
        values[f"residual_energy_{scale}"] = left
    plots: dict[str, Image.Image | Figure] = {}
    if accelerator.is_main_process and first is not None:
        scales = range(len(config.scale_lengths))
        usage = [values[f"usage_{scale}"] for scale in scales]
        perplexity = [values[f"perplexity_{scale}"] / config.codebook_size for scale in scales]
        plots["reconstructions"] = reconstruction_grid(vqvae, first)
        plots["codes"] = usage_plot(config.patch_nums, usage, perplexity, statistics.reachable())
    return values, plots
