# SPDX-License-Identifier: Apache-2.0
"""Metrics of reconstructions against computations by hand, in one process and in several."""

import math

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from torch import nn

from hf_var.metrics.image_quality import MAX_PSNR, ReconstructionMetrics


class MeanAbsoluteError(nn.Module):
    """Stands for LPIPS: one value per image, or their mean."""

    def __init__(self, per_image: bool):
        super().__init__()
        self.per_image = per_image

    def forward(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = (sample - target).abs().mean(dim=(1, 2, 3))
        return values if self.per_image else values.mean()


class ProjectedDistance(nn.Module):
    """Computes with matrices, as LPIPS does, so that autocast changes it."""

    def forward(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        matrix = torch.linspace(-1, 1, 256).sin().view(16, 16)
        return (sample @ matrix - target @ matrix).abs().mean()


class Quadrants(nn.Module):
    """Twelve features of an image of any size: the means of its quadrants, channel by channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def make_images(
    number: int, channels: int = 3, height: int = 16, width: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and worse copies of them: the later, the worse."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, channels, 4, 4, generator=generator) * 2 - 1
    images = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    strengths = torch.linspace(0.05, 0.5, number).view(-1, 1, 1, 1)
    return images, (images + strengths * noise).clamp(-1, 1)


def measure(metrics: ReconstructionMetrics, images: torch.Tensor, sample: torch.Tensor, batch_size: int = 4) -> dict:
    for begin in range(0, len(images), batch_size):
        metrics.update(images[begin : begin + batch_size], sample[begin : begin + batch_size])
    return metrics.compute()


def psnr_by_hand(images: np.ndarray, sample: np.ndarray) -> float:
    return 10 * math.log10(1 / np.square((images - sample) / 2).mean())


def ssim_by_hand(image: np.ndarray, sample: np.ndarray, radius: int, deviation: float) -> float:
    """Wang et al. 2004, equation 13, of one channel with values in [0, 1], borders mirrored."""
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-0.5 * (offsets[:, None] ** 2 + offsets[None] ** 2) / deviation**2)
    window /= window.sum()
    one, other = (np.pad(array, radius, mode="reflect") for array in (image, sample))
    values = []
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            x, y = (array[row : row + len(offsets), column : column + len(offsets)] for array in (one, other))
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            variances = (window * (x - mean_x) ** 2).sum() + (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
            values.append(luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2))
    return float(np.mean(values))


def frechet_by_hand(one: np.ndarray, other: np.ndarray) -> float:
    """Heusel et al. 2017, equation 6, with the root of a symmetric matrix."""
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    distance = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    return float(distance + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * trace)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_psnr_is_the_mean_of_each_images_own(channels: int) -> None:
    images, sample = make_images(6, channels)
    figures = measure(ReconstructionMetrics(), images, sample)
    assert figures.keys() == {"psnr", "ssim"}
    each = [psnr_by_hand(one.numpy(), other.numpy()) for one, other in zip(images, sample, strict=True)]
    assert figures["psnr"] == pytest.approx(np.mean(each), abs=1e-4)
    assert figures["psnr"] > psnr_by_hand(images.numpy(), sample.numpy()) + 1


def test_perfect_and_impossible_reconstructions() -> None:
    images, sample = make_images(2)
    assert measure(ReconstructionMetrics(), images, images) == {"psnr": MAX_PSNR, "ssim": pytest.approx(1.0)}
    white = torch.ones_like(images)
    assert measure(ReconstructionMetrics(), white, 3 * white)["psnr"] == MAX_PSNR
    sample[0] = torch.nan
    assert math.isnan(measure(ReconstructionMetrics(), images, sample)["psnr"])


@pytest.mark.parametrize(
    ("height", "width", "radius"), [(16, 16, 5), (12, 20, 5), (11, 11, 5), (8, 8, 3), (9, 16, 4), (4, 4, 1), (3, 5, 1)]
)
def test_ssim_equals_the_definition_and_its_window_fits(height: int, width: int, radius: int) -> None:
    images, sample = make_images(2, 2, height, width)
    figures = measure(ReconstructionMetrics(), images, sample)
    channels = zip(((images + 1) / 2).double().flatten(0, 1), ((sample + 1) / 2).double().flatten(0, 1), strict=True)
    expected = [ssim_by_hand(one.numpy(), other.numpy(), radius, 1.5 * radius / 5) for one, other in channels]
    assert figures["ssim"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert figures["ssim"] < 0.98


@pytest.mark.parametrize("per_image", [False, True])
def test_lpips_counts_images_not_batches(per_image: bool) -> None:
    images, sample = make_images(5)
    figures = measure(ReconstructionMetrics(lpips=MeanAbsoluteError(per_image)), images, sample)
    expected = (images - sample).abs().mean().item()
    assert figures["lpips"] == pytest.approx(expected, abs=1e-6)
    batches = [(images[:4] - sample[:4]).abs().mean().item(), (images[4:] - sample[4:]).abs().mean().item()]
    assert abs(np.mean(batches) - expected) > 1e-2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rfid_equals_the_definition_on_bytes(channels: int) -> None:
    images, sample = make_images(40, channels)
    figures = measure(ReconstructionMetrics(feature_extractor=Quadrants()), images, sample)
    features = []
    for batch in (images, sample):
        colors = batch[:, :3] if channels > 1 else batch.repeat(1, 3, 1, 1)
        features.append(Quadrants()(((colors + 1) * 127.5).round().byte()).double().numpy())
    # Three equal channels give singular covariances, whose roots are known to few digits.
    assert figures["rfid"] == pytest.approx(frechet_by_hand(*features), rel=1e-3)
    assert figures["rfid"] > 1


def test_rfid_of_fewer_images_than_features_is_finite() -> None:
    images, sample = make_images(3)
    assert 1 < measure(ReconstructionMetrics(feature_extractor=Quadrants()), images, sample)["rfid"] < 1e4
    same = measure(ReconstructionMetrics(feature_extractor=Quadrants()), images, images)
    assert same["rfid"] == pytest.approx(0, abs=1e-2)


def test_autocast_and_half_precision_inputs_change_nothing() -> None:
    images, sample = make_images(4)
    images, sample = images.bfloat16(), sample.bfloat16()
    distance = ProjectedDistance()
    plain = measure(ReconstructionMetrics(distance), images.float(), sample.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measure(ReconstructionMetrics(distance), images, sample)
        # What autocast would do to it.
        assert distance(sample.float(), images.float()).item() != pytest.approx(plain["lpips"], rel=1e-5)
    assert inside == plain


def test_precision_is_put_back() -> None:
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    seen = []

    class Failing(nn.Module):
        def forward(self, *images):
            seen.extend(backend.fp32_precision for backend in backends)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ReconstructionMetrics(lpips=Failing()).update(*make_images(1))
    assert seen == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in backends] == before


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    measure(ReconstructionMetrics(MeanAbsoluteError(True), Quadrants()), *make_images(8))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_input_that_cannot_be_measured() -> None:
    images, sample = make_images(2)
    with pytest.raises(ValueError, match=r"`sample`.*\(2, 3, 16, 16\).*\(2, 1, 16, 16\)"):
        ReconstructionMetrics().update(images, sample[:, :1])
    with pytest.raises(ValueError, match="3 x 3"):
        ReconstructionMetrics().update(images[..., :2], sample[..., :2])
    with pytest.raises(ValueError, match="at least 1 validation"):
        ReconstructionMetrics().compute()
    with pytest.raises(ValueError, match=r"at least 2 validation.*got 1"):
        measure(ReconstructionMetrics(feature_extractor=Quadrants()), images[:1], sample[:1])


def measure_share(expected: dict[str, float], cut: int) -> None:
    images, sample = make_images(9)
    rank = torch.distributed.get_rank()
    share = slice(0, cut) if rank == 0 else slice(cut, None)
    metrics = ReconstructionMetrics(MeanAbsoluteError(False), Quadrants())
    figures = measure(metrics, images[share], sample[share])
    assert figures == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.parametrize("cut", [6, 9])
def test_shares_of_two_processes_make_the_same_figures(cut: int) -> None:
    expected = measure(ReconstructionMetrics(MeanAbsoluteError(False), Quadrants()), *make_images(9))
    debug_launcher(measure_share, args=(expected, cut), num_processes=2)
