# SPDX-License-Identifier: Apache-2.0
"""Trained entrants as one thing that samples, reconstructs, and knows likelihoods where there are any."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from hf_var.metrics.latents import latent_shape
from hf_var.pipelines.base import load_pipeline
from hf_var.scoring import log_likelihood

from .entrants import DIT, Entrant


# Steps of DPM-Solver++ of order 2, whose authors take 15 to 20.
DIFFUSION_STEPS = 25


def parameters(*modules: nn.Module) -> int:
    """Their number."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


class PipelineSampler:
    """A pipeline of ours, without guidance and filters."""

    has_classes = True

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        self.tokenizer = pipeline.vqvae

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Of the first stage and of the second."""
        return parameters(self.tokenizer), parameters(*self.pipeline.priors)

    @property
    def tokens(self) -> str:
        """How many of which map."""
        config = self.tokenizer.config
        maps = " + ".join(f"{height}x{width}" for height, width in config.scale_sizes)
        return f"{sum(config.scale_lengths)} ({maps})"

    def images(self, labels: list[int], generator: torch.Generator) -> torch.Tensor:
        """Images in [0, 1]."""
        options: dict[str, Any] = {"guidance_scale": 1.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        return self.pipeline(labels, **options, generator=generator, output_type="pt").images

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Reconstructions of images in [-1, 1]."""
        return self.tokenizer.decode(self.tokenizer.encode(pixel_values).codes).sample

    def bits(self, pixel_values: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """Bits of the codes of each image in [-1, 1], given its class."""
        found = log_likelihood(self.pipeline, (pixel_values + 1) / 2, labels, batch_size=64)
        return -found.total / torch.log(torch.tensor(2.0))


class DiffusionSampler:
    """diffusers' DiT, without guidance."""

    has_classes = True
    bits = None

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        for model in (pipeline.vae, pipeline.transformer):
            model.eval().requires_grad_(False)

    @property
    def num_parameters(self) -> tuple[int, int]:
        return parameters(self.pipeline.vae), parameters(self.pipeline.transformer)

    @property
    def tokens(self) -> str:
        return latents_text(self.pipeline.vae)

    def images(self, labels: list[int], generator: torch.Generator) -> torch.Tensor:
        options: dict[str, Any] = {"num_inference_steps": DIFFUSION_STEPS, "output_type": "pt"}
        return self.pipeline(labels, guidance_scale=1.0, generator=generator, **options).images

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return reconstruct(self.pipeline.vae, pixel_values)


class NormalSampler:
    """A KL autoencoder whose latents are drawn from N(0, I)."""

    has_classes = False
    bits = None

    def __init__(self, autoencoder: Any):
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    @property
    def num_parameters(self) -> tuple[int, int]:
        return parameters(self.autoencoder), 0

    @property
    def tokens(self) -> str:
        return latents_text(self.autoencoder)

    def images(self, labels: list[int], generator: torch.Generator) -> torch.Tensor:
        latents = randn_tensor((len(labels), *latent_shape(self.autoencoder.config)), generator=generator)
        with torch.no_grad():
            return (self.autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return reconstruct(self.autoencoder, pixel_values)


def reconstruct(autoencoder: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """From the means of the posteriors."""
    return autoencoder.decode(autoencoder.encode(pixel_values).latent_dist.mode()).sample


def latents_text(autoencoder: Any) -> str:
    """Shape of the latents."""
    channels, height, width = latent_shape(autoencoder.config)
    return f"{height}x{width}, {channels} channels"


Sampler = PipelineSampler | DiffusionSampler | NormalSampler


def load_sampler(entrant: Entrant, folder: Path) -> Sampler:
    """What the last training of an entrant left in its folder."""
    if not entrant.priors:
        return NormalSampler(AutoencoderKL.from_pretrained(folder))
    if entrant.priors[-1].script == DIT:
        return DiffusionSampler(DiTPipeline.from_pretrained(folder))
    return PipelineSampler(load_pipeline(folder, torch_dtype=torch.float32))
