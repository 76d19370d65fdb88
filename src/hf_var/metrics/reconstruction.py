# SPDX-License-Identifier: Apache-2.0
"""A tokenizer on a whole set of images: how good its reconstructions are and how it uses its codes."""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ..autoencoders import VQVAEModel
from .codebook_usage import CodeStatistics, residual_energy
from .image_quality import ReconstructionMetrics
from .reconstruction_plots import reconstruction_grid, usage_plot


@torch.no_grad()
def measure_reconstruction(
    vqvae: VQVAEModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    accelerator: Accelerator,
    perceptual_loss: nn.Module | None = None,
    feature_extractor: nn.Module | None = None,
    num_pictures: int = 8,
) -> tuple[dict[str, float], dict[str, Image.Image | Figure]]:
    """
    Measure a tokenizer, in evaluation mode. All processes must call it, each with its own share of the images.

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer.
        batches (`Iterable`): Batches with `pixel_values` `(batch, in_channels, height, width)` in `[-1, 1]`.
        accelerator (`Accelerator`): Knows the device and the other processes.
        perceptual_loss (`nn.Module`, *optional*): For `lpips`, see [`ReconstructionMetrics`].
        feature_extractor (`nn.Module`, *optional*): For `rfid`, see [`ReconstructionMetrics`].
        num_pictures (`int`, *optional*, defaults to 8): How many images of the first batch to draw at most.

    Returns:
        `tuple[dict, dict]`: The figures of [`ReconstructionMetrics`] and [`CodeStatistics`] with the `residual_energy_k` of
        every scale; and, on the main process, the pictures `reconstructions` and `codes`.

    Raises:
        `ValueError`: If there are no images.
    """
    config, was_training = vqvae.config, vqvae.training
    num_scales = len(config.scale_lengths)
    vqvae.eval()
    metrics = ReconstructionMetrics(perceptual_loss, feature_extractor).to(accelerator.device)
    statistics = CodeStatistics(config, accelerator.device)
    energy = torch.zeros(num_scales + 1, device=accelerator.device)
    first = None
    for batch in batches:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        features, _, codes = vqvae.encode(cast(torch.FloatTensor, pixel_values), return_dict=False)
        (sample,) = vqvae.decode(codes, return_dict=False)
        metrics.update(pixel_values, sample)
        statistics.count(codes)
        energy += residual_energy(vqvae, features, codes)
        first = pixel_values[:num_pictures] if first is None else first
    energy = cast(torch.Tensor, accelerator.reduce(energy, reduction="sum"))
    figures = {**metrics.compute(), **statistics.figures()}
    for scale, left in enumerate((energy[1:] / energy[0]).tolist()):
        figures[f"residual_energy_{scale}"] = left
    drawn: dict[str, Image.Image | Figure] = {}
    if accelerator.is_main_process and first is not None:
        usage = [figures[f"usage_{scale}"] for scale in range(num_scales)]
        perplexity = [figures[f"perplexity_{scale}"] / config.codebook_size for scale in range(num_scales)]
        drawn["reconstructions"] = reconstruction_grid(vqvae, first)
        drawn["codes"] = usage_plot(config.patch_nums, usage, perplexity, statistics.reachable())
    vqvae.train(was_training)
    return figures, drawn
