# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers whose features, codes and images have contrast: with the initial ones any tolerance would pass."""

from collections.abc import Callable

import pytest
import torch

from hf_var import VQVAEConfig, VQVAEModel


TINY = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "codebook_size": 32,
    "patch_nums": (1, 2, 4),
}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., VQVAEConfig]:
    """Makes a small configuration, with any field replaced."""
    return lambda **fields: VQVAEConfig(**{**TINY, **fields})


@pytest.fixture(scope="session")
def make_vqvae(tiny_config) -> Callable[..., VQVAEModel]:
    """Makes a small model in evaluation mode, the same one for the same fields."""

    def make(**fields) -> VQVAEModel:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = VQVAEModel(tiny_config(**fields)).eval()
            model.quantizer.codebook.weight.normal_()
            model.quantizer.codebook.running_hits.uniform_()
            # Features of the codebook's size, images over most of their range.
            model.encoder.conv_out.weight.mul_(4)
            model.quant_conv.weight.mul_(3)
            model.decoder.conv_out.weight.mul_(2)
        return model

    return make


@pytest.fixture(scope="session")
def make_images() -> Callable[..., torch.Tensor]:
    """Draws images that fit a model."""

    def make(model: VQVAEModel, batch_size: int = 3, seed: int = 0) -> torch.Tensor:
        shape = (batch_size, model.config.in_channels, *model.config.image_size)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    return make


@pytest.fixture(scope="session")
def vqvae(make_vqvae) -> VQVAEModel:
    """A small model that tests share and none may change."""
    return make_vqvae()


@pytest.fixture(scope="session")
def images(vqvae, make_images) -> torch.Tensor:
    return make_images(vqvae)


@pytest.fixture(scope="session")
def codes(vqvae, images) -> torch.Tensor:
    with torch.no_grad():
        return vqvae.encode(images).codes
