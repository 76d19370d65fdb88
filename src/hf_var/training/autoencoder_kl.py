# SPDX-License-Identifier: Apache-2.0
"""Training of diffusers' `AutoencoderKL`: its configuration, its forward pass and its objective (Kingma & Welling 2014)."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from ..metrics.latents import latent_shape
from ..ranges import NonNegativeFloat, argument
from .losses import PixelLossConfig, pixel_loss


# Fields that fine-tuning may change: the network is convolutional, and the factor is a measurement.
FREE_FIELDS = ("sample_size", "scaling_factor")
# The random stream of the posteriors' noise; those before it are the adversary's.
POSTERIOR_STREAM = 3


@dataclass(kw_only=True)
class KLConfig(PixelLossConfig):
    """Weights of the objective of a variational autoencoder, without the adversary."""

    kl_weight: NonNegativeFloat = argument(
        1e-6, help="weight of KL / D: summed over latents, mean over images, D values in an image"
    )


class KLObjective:
    r"""
    The objective of a variational autoencoder: `l1_weight · |x - x̂| + l2_weight · (x - x̂)² + lpips_weight · LPIPS +
    kl_weight · KL / D`. The reconstruction is averaged over everything. KL is summed over the latents of an image and
    averaged over images; D is the number of pixels times channels. In this spelling a weight holds for any image size:

    - latent diffusion (Rombach et al. 2022): `l1_weight` 1, `lpips_weight` 1, `kl_weight` 1e-6. Its constant
      log-variance \( s \) of the output would multiply the first two by \( e^{-s} \).
    - the evidence lower bound (Kingma & Welling 2014) of pixels with variance \( \sigma^2 \): `l2_weight` 1, `kl_weight`
      \( 2 \sigma^2 \).
    - mean squared error + w · KL: `l2_weight` 1, `kl_weight` w · D.

    Args:
        config ([`KLConfig`]): The weights.
        perceptual_loss (`nn.Module`, *optional*): LPIPS, needed if it has a weight.
    """

    def __init__(self, config: KLConfig, perceptual_loss: nn.Module | None = None):
        self.config = config
        self.perceptual_loss = perceptual_loss

    def __call__(
        self, sample: torch.Tensor, posterior: DiagonalGaussianDistribution, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of pixels and features, that of the latents, both with their weights, and what they are made of."""
        reconstruction, metrics = pixel_loss(self.config, self.perceptual_loss, sample, target)
        metrics["kl"] = posterior.kl().mean()
        return reconstruction, self.config.kl_weight * metrics["kl"] / target[0].numel(), metrics


class AutoencoderKLWithPosterior(nn.Module):
    """
    An `AutoencoderKL` whose `forward` returns the posterior beside the reconstruction. Both come from one `forward`,
    because distributed training wraps only this method.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(
        self, pixel_values: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Reconstruction of a sample from the posterior of the latents, and the posterior, in fp32."""
        moments = self.autoencoder.encode(pixel_values, return_dict=False)[0].parameters
        # Exponentials and squares of half precision would make the KL divergence noise.
        posterior = DiagonalGaussianDistribution(moments.float())
        latents = posterior.sample(generator).to(moments.dtype)
        return self.autoencoder.decode(cast(torch.FloatTensor, latents), return_dict=False)[0], posterior


def autoencoder_kl_config(given: Mapping[str, Any], pretrained: str | None = None) -> dict[str, Any]:
    """
    All arguments of `AutoencoderKL`: those that are given, then those of the pretrained model, then what follows from them
    (types of blocks and `out_channels`), then the defaults. Without `block_out_channels` each level is as wide as in latent
    diffusion: 128 channels, 256, and 512 from the third level on.

    Args:
        given (`dict[str, Any]`): Arguments by name.
        pretrained (`str`, *optional*): Folder or repository of the model to start from.

    Raises:
        `ValueError`: If they do not fit each other or the pretrained model.
    """
    defaults = {name: entry.default for name, entry in inspect.signature(AutoencoderKL).parameters.items()}
    if pretrained is not None:
        loaded = cast(dict[str, Any], AutoencoderKL.load_config(pretrained))
        config = defaults | {name: value for name, value in loaded.items() if name in defaults}
        for name, value in given.items():
            before = list(config[name]) if isinstance(config[name], tuple) else config[name]
            if name not in FREE_FIELDS and before != value:
                raise ValueError(f"`{name}` is {before} in `pretrained_autoencoder`, got {value}.")
        config |= given
    else:
        num_levels = len(given.get("block_out_channels") or given.get("down_block_types") or range(4))
        derived = {
            "block_out_channels": [128 * min(2**level, 4) for level in range(num_levels)],
            "down_block_types": ["DownEncoderBlock2D"] * num_levels,
            "up_block_types": ["UpDecoderBlock2D"] * num_levels,
            "out_channels": given.get("in_channels", defaults["in_channels"]),
        }
        config = {**defaults, **derived, **given}
    _check_config(config)
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for sizes that do not fit each other, which diffusers would not name or not notice."""
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    for name in ("in_channels", "layers_per_block", "latent_channels", "norm_num_groups", "sample_size"):
        if config[name] < 1:
            raise ValueError(f"`{name}` must be at least 1, got {config[name]}.")
    for name in ("down_block_types", "up_block_types"):
        if len(config[name]) != len(widths):
            raise ValueError(
                f"`{name}` must have an entry for each of {len(widths)} `block_out_channels`, got {config[name]}."
            )
    if any(width < 1 or width % groups for width in widths):
        raise ValueError(f"`block_out_channels` must be multiples of `norm_num_groups` = {groups}, got {widths}.")
    if config["out_channels"] != config["in_channels"]:
        raise ValueError(
            f"`out_channels` must be `in_channels` = {config['in_channels']}, got {config['out_channels']}."
        )
    factor = 2 ** (len(widths) - 1)
    if config["sample_size"] % factor:
        raise ValueError(
            f"`sample_size` must be a multiple of {factor}, as {len(widths)} levels halve the image {len(widths) - 1} "
            f"times, got {config['sample_size']}."
        )
    # A group of one value has no variance: what it normalizes is zero.
    if latent_shape(config)[1] == 1 and widths[-1] == groups:
        raise ValueError(
            f"`norm_num_groups` must be below {widths[-1]}, the channels of latents of 1x1 pixels, got {groups}."
        )
