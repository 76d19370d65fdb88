# SPDX-License-Identifier: Apache-2.0
"""Measurement of diffusers' `AutoencoderKL`: its reconstructions, its latents and what it makes of noise."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from ..modes import evaluation_mode
from .image_quality import ReconstructionMetrics
from .reconstruction import compare_reconstructions
from .reconstruction_plots import image_grid


# What the plots of `measure_autoencoder_kl` show, for model cards.
PAIRS_CAPTION = (
    "Each row is one image: its reconstruction from the mean of its latents and, at the right, the original."
)
SAMPLES_CAPTION = (
    "Decoded noise, N(0, I): images to the extent that the KL divergence shaped the latents. With a small `kl_weight` "
    "it takes a model of the latents to sample."
)
INTERPOLATIONS_CAPTION = "Each row goes in equal steps from the latents of one image to those of another."

# A latent dimension is active if the variance of its mean over images exceeds this (Burda et al. 2016, appendix C).
ACTIVE_VARIANCE = 0.01


def latent_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of the latents of an `AutoencoderKL`, from its configuration."""
    side = config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
    return config["latent_channels"], side, side


class LatentStatistics:
    """
    Statistics of the posteriors of an `AutoencoderKL`, of all images of all processes.

    Args:
        shape (`tuple[int, int, int]`): Channels, height and width of the latents.
        device (`torch.device`): Where the posteriors are.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        # Of every dimension: mean, its square, variance and KL divergence; and the number of images.
        self.sums = torch.zeros(5, *shape, device=device)

    def update(self, mean: torch.Tensor, logvar: torch.Tensor) -> None:
        """Add the posteriors of a batch, each `(batch, channels, height, width)`."""
        mean, logvar = mean.float(), logvar.float()
        variance = logvar.exp()
        kl = 0.5 * (mean.square() + variance - 1 - logvar)
        values = torch.stack([mean, mean.square(), variance, kl, torch.ones_like(mean)])
        self.sums += values.sum(dim=1)

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """
        All processes must call it. Returns `kl` (nats per image), `kl_c` (nats per dimension of channel c), `active_dimensions`
        (see `ACTIVE_VARIANCE`) and `latent_std`, the standard deviation of all latents together, sampled from the
        posteriors: its inverse is the `scaling_factor` of latent diffusion.
        """
        *sums, number = cast(torch.Tensor, accelerator.reduce(self.sums, reduction="sum"))
        mean, square, variance, kl = (total / number for total in sums)  # (channels, height, width)
        values = {
            "kl": kl.sum(),
            "active_dimensions": (square - mean.square() > ACTIVE_VARIANCE).sum(),
            "latent_std": ((square + variance).mean() - mean.mean().square()).sqrt(),
        }
        values |= {f"kl_{channel}": value for channel, value in enumerate(kl.mean(dim=(1, 2)))}
        return {name: value.item() for name, value in values.items()}


@torch.no_grad()
def measure_autoencoder_kl(
    autoencoder: AutoencoderKL,
    batches: Iterable[Mapping[str, torch.Tensor]],
    accelerator: Accelerator,
    generator: torch.Generator,
    perceptual_loss: nn.Module | None = None,
    feature_extractor: nn.Module | None = None,
    num_shown: int = 8,
) -> tuple[dict[str, float], dict[str, Image.Image]]:
    """
    Measure an `AutoencoderKL`, in evaluation mode. All processes must call it, each with its own share of the images.

    Args:
        autoencoder (`AutoencoderKL`): The model. Images are reconstructed from the means of their latents.
        batches (`Iterable`): Batches with `pixel_values` `(batch, in_channels, height, width)` in `[-1, 1]`.
        accelerator (`Accelerator`): Knows the device and the other processes.
        generator (`torch.Generator`): Of the noise that is decoded.
        perceptual_loss (`nn.Module`, *optional*): For `lpips`, see [`~image_quality.ReconstructionMetrics`].
        feature_extractor (`nn.Module`, *optional*): For `rfid`, likewise.
        num_shown (`int`, *optional*, defaults to 8): How many images of the first batch are plotted, at most.

    Returns:
        `tuple[dict, dict]`: The metrics of [`~image_quality.ReconstructionMetrics`] and [`LatentStatistics`]; and, on the
        main process, the plots `reconstructions`, `samples` and `interpolations`.
    """
    shape = latent_shape(autoencoder.config)
    statistics = LatentStatistics(shape, accelerator.device)

    def reconstruct(pixel_values: torch.Tensor) -> torch.Tensor:
        (posterior,) = autoencoder.encode(pixel_values, return_dict=False)
        statistics.update(posterior.mean, posterior.logvar)
        return _decode(autoencoder, posterior.mode())

    plots: dict[str, Image.Image] = {}
    with evaluation_mode(autoencoder):
        compared = ReconstructionMetrics(perceptual_loss, feature_extractor)
        metrics, first = compare_reconstructions(reconstruct, batches, accelerator, compared, num_shown)
        values = {**metrics, **statistics.compute(accelerator)}
        if accelerator.is_main_process and first is not None:
            latents = autoencoder.encode(first, return_dict=False)[0].mode()
            noise = torch.randn(num_shown, num_shown, *shape, generator=generator)
            columns = {
                "reconstructions": [_decode(autoencoder, latents), first],
                "samples": _decode_columns(autoencoder, noise),
                "interpolations": _decode_columns(autoencoder, _interpolate(latents, num_shown)),
            }
            plots = {name: image_grid(images) for name, images in columns.items()}
    return values, plots


def _interpolate(latents: torch.Tensor, num_steps: int) -> torch.Tensor:
    """From each second image to the one after it, `(rows, num_steps, channels, height, width)`; one goes to itself."""
    starts, ends = (latents[::2], latents[1::2]) if len(latents) > 1 else (latents, latents)
    number = min(len(starts), len(ends))
    shares = torch.linspace(0, 1, num_steps, device=latents.device)[:, None, None, None]
    return torch.lerp(starts[:number, None], ends[:number, None], shares)


def _decode_columns(autoencoder: AutoencoderKL, latents: torch.Tensor) -> list[torch.Tensor]:
    """Images of `(rows, columns, channels, height, width)` latents, a column at a time to save memory."""
    return [_decode(autoencoder, column.to(autoencoder.device)) for column in latents.unbind(1)]


def _decode(autoencoder: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    return autoencoder.decode(cast(torch.FloatTensor, latents), return_dict=False)[0]
