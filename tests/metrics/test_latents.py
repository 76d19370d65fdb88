# SPDX-License-Identifier: Apache-2.0
"""Statistics of latents against their definitions, and pictures read back pixel by pixel."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from hf_var.metrics.feature_extractors import rgb_bytes
from hf_var.metrics.latents import LatentStatistics, latent_shape, measure_autoencoder_kl


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=64, **blocks)
        model.quant_conv.weight.mul_(3)
        model.decoder.conv_out.weight.mul_(3)
    return model.eval()


def make_images(number: int) -> torch.Tensor:
    return torch.rand(number, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def cell(picture: Image.Image, row: int, column: int) -> np.ndarray:
    """An image of 64 pixels, which is not enlarged."""
    return np.asarray(picture)[2 + 66 * row : 66 * (row + 1), 2 + 66 * column : 66 * (column + 1)]


def pixels(image: torch.Tensor) -> np.ndarray:
    return rgb_bytes(image[None])[0].permute(1, 2, 0).numpy()


def test_statistics_are_those_of_all_posteriors_together() -> None:
    moments = torch.randn(40, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    # A mean that hardly varies is inactive, however far from zero it is.
    moments[:, 1] = 2 + 0.05 * moments[:, 1]
    posterior = DiagonalGaussianDistribution(moments)
    statistics = LatentStatistics((4, 2, 3), torch.device("cpu"))
    for part in (slice(0, 33), slice(33, 40)):
        statistics.update(posterior.mean[part], posterior.logvar[part])
    values = statistics.compute(Accelerator(cpu=True))
    assert values["kl"] == pytest.approx(posterior.kl().mean().item(), rel=1e-5)
    assert 6 * sum(values[f"kl_{channel}"] for channel in range(4)) == pytest.approx(values["kl"], rel=1e-5)
    assert values["kl_1"] > 1.5
    assert values["active_dimensions"] == 3 * 6
    generator = torch.Generator().manual_seed(1)
    samples = torch.stack([posterior.sample(generator) for _ in range(400)])
    assert values["latent_std"] == pytest.approx(samples.std().item(), rel=0.01)


def test_pictures_show_the_images_of_the_first_batch(autoencoder: AutoencoderKL) -> None:
    images, noise = make_images(5), torch.Generator().manual_seed(3)
    batches = [{"pixel_values": images[:4]}, {"pixel_values": images[4:]}]
    autoencoder.train()
    metrics, plots = measure_autoencoder_kl(autoencoder, batches, Accelerator(cpu=True), noise, num_shown=4)
    assert autoencoder.training
    autoencoder.eval()
    with torch.no_grad():
        latents = autoencoder.encode(images).latent_dist.mode()
        samples = autoencoder.decode(latents).sample
        middle = autoencoder.decode(torch.lerp(latents[2], latents[3], 1 / 3)[None]).sample[0]
        shape = (4, 4, *latent_shape(autoencoder.config))
        drawn = autoencoder.decode(torch.randn(shape, generator=torch.Generator().manual_seed(3))[1]).sample
    errors = (samples.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    assert metrics["psnr"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-4)
    assert samples.std() > 0.1
    expected = [
        ("reconstructions", 3, 0, samples[3]),
        ("reconstructions", 3, 1, images[3]),
        ("interpolations", 1, 0, samples[2]),
        ("interpolations", 1, 1, middle),
        ("interpolations", 1, 3, samples[3]),
        ("samples", 1, 2, drawn[2]),
    ]
    for name, row, column, image in expected:
        difference = cell(plots[name], row, column).astype(int) - pixels(image)
        # Rounding depends on the size of the batch.
        assert np.abs(difference).max() <= 1, (name, row, column)
    assert plots["interpolations"].size == (4 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize(("number", "rows"), [(1, 1), (3, 1)])
def test_an_image_without_another_one(number: int, rows: int, autoencoder: AutoencoderKL) -> None:
    batches = [{"pixel_values": make_images(number)}]
    noise = torch.Generator().manual_seed(0)
    _, plots = measure_autoencoder_kl(autoencoder, batches, Accelerator(cpu=True), noise, num_shown=4)
    assert plots["interpolations"].size == (4 * 66 + 2, rows * 66 + 2)
