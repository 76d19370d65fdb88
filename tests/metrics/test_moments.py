# SPDX-License-Identifier: Apache-2.0
"""Gaussians whose distance is known, batches in any order and of any size, and torch-fidelity's numbers."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from hf_var.metrics.moments import GaussianStatistics, frechet_distance


def make_features(number: int, width: int = 16, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    """Correlated features, the standard deviations of which go from 0.1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    spread = torch.linspace(0.1, 3, width, dtype=torch.float64)
    features = torch.randn(number, width, generator=generator, dtype=torch.float64) @ mixing * spread
    return features + offset + torch.linspace(0, 2, width)


def summed_up(features: torch.Tensor, batch_size: int = 32) -> GaussianStatistics:
    statistics = GaussianStatistics()
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def fidelity(first: torch.Tensor, second: torch.Tensor) -> float:
    one, other = fid_features_to_statistics(first), fid_features_to_statistics(second)
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_moments_equal_numpys_whatever_the_batches(batch_size: int) -> None:
    features = make_features(100)
    statistics = summed_up(features[torch.randperm(100, generator=torch.Generator().manual_seed(1))], batch_size)
    assert statistics.num_images == 100
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-13)


def test_large_means_cost_no_digits() -> None:
    features, shifted = make_features(200), make_features(200, offset=1e6)
    expected = summed_up(features).covariance
    torch.testing.assert_close(summed_up(shifted).covariance, expected, rtol=1e-7, atol=1e-9)
    # What sums of squares would make of it.
    naive = (shifted.T @ shifted - 200 * torch.outer(shifted.mean(0), shifted.mean(0))) / 199
    assert (naive - expected).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_are_summed_up_in_double(dtype: torch.dtype) -> None:
    # In half precision sums stop growing at the 2048th one.
    features = torch.ones(3000, 1, dtype=dtype)
    features[::2] = 3
    statistics = summed_up(features, 3000)
    assert statistics.mean.item() == 2
    assert statistics.covariance.item() == pytest.approx(3000 / 2999, rel=1e-12)


def test_distance_of_gaussians_that_commute() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    first, second = torch.tensor([0.0, 0.5, 1, 4, 9]).double(), torch.tensor([2, 0.0, 1, 1, 16]).double()
    means = torch.tensor([1, 2, 3, 4, 5]).double(), torch.tensor([1, 0, 3, 7, 5]).double()
    one, other = (
        GaussianStatistics.from_arrays((rotation @ mean).numpy(), ((rotation * variances) @ rotation.T).numpy())
        for mean, variances in zip(means, (first, second), strict=True)
    )
    expected = 4 + 9 + (first.sqrt() - second.sqrt()).square().sum().item()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-7)


def test_distance_of_samples_nears_that_of_their_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100_000, 4, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0])
    distance = frechet_distance(summed_up(features[:50_000], 1000), summed_up(features[50_000:] * scales + 1, 1000))
    assert distance == pytest.approx(4 + (scales - 1).square().sum().item(), rel=0.02)


@pytest.mark.parametrize(("number", "width"), [(300, 16), (300, 64), (20, 64)])
def test_distance_equals_torch_fidelitys(number: int, width: int) -> None:
    first, second = make_features(number, width), make_features(number + 7, width, seed=1)
    expected = fidelity(first, second)
    assert expected > 1
    assert frechet_distance(summed_up(first), summed_up(second)) == pytest.approx(expected, rel=1e-6)
    in_single = frechet_distance(summed_up(first.float()), summed_up(second.float()))
    assert in_single == pytest.approx(fidelity(first.float(), second.float()), rel=1e-4)


def test_order_and_batches_do_not_change_the_distance() -> None:
    first, second = make_features(100), make_features(100, seed=1)
    expected = frechet_distance(summed_up(first), summed_up(second))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(summed_up(first[order], 9), summed_up(second, 100)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("number", [2, 20, 200])
def test_distance_to_itself_is_nothing(number: int) -> None:
    statistics = summed_up(make_features(number, 64))
    assert 0 <= frechet_distance(statistics, statistics) < 1e-5 * statistics.covariance.trace()


def test_stored_statistics_serve_as_well() -> None:
    first, second = summed_up(make_features(50)), summed_up(make_features(60, seed=1))
    stored = GaussianStatistics.from_arrays(first.mean.numpy(), first.covariance.numpy())
    assert stored.num_images is None
    torch.testing.assert_close(stored.covariance, first.covariance, rtol=1e-12, atol=1e-15)
    assert frechet_distance(stored, second) == pytest.approx(frechet_distance(first, second), rel=1e-12)
    with pytest.raises(ValueError, match="number of images is unknown"):
        stored.update(make_features(3))


def test_what_is_returned_does_not_change_afterwards() -> None:
    statistics = summed_up(make_features(10))
    mean, covariance = statistics.mean, statistics.covariance
    kept = mean.clone(), covariance.clone()
    statistics.update(make_features(10, seed=1))
    assert torch.equal(mean, kept[0])
    assert torch.equal(covariance, kept[1])
    assert not torch.equal(statistics.mean, mean)


def test_too_few_images() -> None:
    statistics = GaussianStatistics()
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        _ = statistics.mean
    statistics.update(make_features(1))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        frechet_distance(summed_up(make_features(5)), statistics)


def test_features_that_do_not_fit() -> None:
    statistics = summed_up(make_features(5))
    with pytest.raises(ValueError, match="16 per image as before, got 8"):
        statistics.update(make_features(5, 8))
    with pytest.raises(ValueError, match="as many features as each other, got 16 and 8"):
        frechet_distance(statistics, summed_up(make_features(5, 8)))
    for wrong in (torch.zeros(5), torch.zeros(0, 16), torch.zeros(5, 16, dtype=torch.long), torch.zeros(5, 4, 4)):
        with pytest.raises(
            ValueError, match=r"`features` must be floating point numbers \(images, features\), got \("
        ):
            statistics.update(wrong)
    with pytest.raises(ValueError, match="`features` must be finite"):
        statistics.update(torch.full((2, 16), torch.nan))
    assert statistics.num_images == 5


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(3), np.zeros((3, 2)), r"got \(3,\) and \(3, 2\)"),
        (np.zeros((1, 3)), np.eye(3), r"got \(1, 3\) and \(3, 3\)"),
        (np.zeros(0), np.zeros((0, 0)), r"got \(0,\)"),
        (np.array([0, np.inf]), np.eye(2), "`mu` must be finite"),
        (np.zeros(2), np.full((2, 2), np.nan), "`sigma` must be finite"),
        (np.zeros(2), np.array([[1, 0.5], [0, 1]]), "`sigma` must be symmetric.*0.5"),
    ],
)
def test_arrays_that_are_no_statistics(mu: np.ndarray, sigma: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianStatistics.from_arrays(mu, sigma)
