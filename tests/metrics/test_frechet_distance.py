# SPDX-License-Identifier: Apache-2.0
"""Gaussians whose distance is known, and torch-fidelity's numbers."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from hf_var.metrics.generation import frechet_distance, moments


def make_features(number: int, width: int = 16, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    """Correlated features, the standard deviations of which go from 0.1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    spread = torch.linspace(0.1, 3, width, dtype=torch.float64)
    features = torch.randn(number, width, generator=generator, dtype=torch.float64) @ mixing * spread
    return features + offset + torch.linspace(0, 2, width)


def fidelity(first: torch.Tensor, second: torch.Tensor) -> float:
    one, other = fid_features_to_statistics(first), fid_features_to_statistics(second)
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def test_moments_equal_numpys() -> None:
    features = make_features(100)
    found = moments(features[torch.randperm(100, generator=torch.Generator().manual_seed(1))])
    np.testing.assert_allclose(found["mu"], features.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["sigma"], np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-13)


def test_large_means_cost_no_digits() -> None:
    features, shifted = make_features(200), make_features(200, offset=1e6)
    expected = moments(features)["sigma"]
    np.testing.assert_allclose(moments(shifted)["sigma"], expected, rtol=1e-7, atol=1e-9)
    # What sums of squares would make of it.
    naive = (shifted.T @ shifted - 200 * torch.outer(shifted.mean(0), shifted.mean(0))) / 199
    assert np.abs(naive.numpy() - expected).max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_are_summed_up_in_double(dtype: torch.dtype) -> None:
    # In half precision sums stop growing at the 2048th one.
    features = torch.ones(3000, 1, dtype=dtype)
    features[::2] = 3
    found = moments(features)
    assert found["mu"].item() == 2
    assert found["sigma"].item() == pytest.approx(3000 / 2999, rel=1e-12)
    assert frechet_distance(found, moments(features + 1)) == pytest.approx(1, rel=1e-7)


def test_distance_of_gaussians_that_commute() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    first, second = torch.tensor([0.0, 0.5, 1, 4, 9]).double(), torch.tensor([2, 0.0, 1, 1, 16]).double()
    means = torch.tensor([1, 2, 3, 4, 5]).double(), torch.tensor([1, 0, 3, 7, 5]).double()
    one, other = (
        {"mu": (rotation @ mean).numpy(), "sigma": ((rotation * variances) @ rotation.T).numpy()}
        for mean, variances in zip(means, (first, second), strict=True)
    )
    expected = 4 + 9 + (first.sqrt() - second.sqrt()).square().sum().item()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-7)


def test_distance_of_samples_nears_that_of_their_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100_000, 4, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0])
    distance = frechet_distance(moments(features[:50_000]), moments(features[50_000:] * scales + 1))
    assert distance == pytest.approx(4 + (scales - 1).square().sum().item(), rel=0.02)


@pytest.mark.parametrize(("number", "width"), [(300, 16), (300, 64), (20, 64)])
def test_distance_equals_torch_fidelitys(number: int, width: int) -> None:
    first, second = make_features(number, width), make_features(number + 7, width, seed=1)
    expected = fidelity(first, second)
    assert expected > 1
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-6)
    in_single = frechet_distance(moments(first.float()), moments(second.float()))
    assert in_single == pytest.approx(fidelity(first.float(), second.float()), rel=1e-4)


def test_the_order_does_not_change_the_distance() -> None:
    first, second = make_features(100), make_features(100, seed=1)
    expected = frechet_distance(moments(first), moments(second))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(moments(first[order]), moments(second)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("number", [2, 20, 200])
def test_distance_to_itself_is_nothing(number: int) -> None:
    found = moments(make_features(number, 64))
    assert 0 <= frechet_distance(found, found) < 1e-5 * found["sigma"].trace()


def test_features_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments(make_features(1))
    with pytest.raises(ValueError, match="as many features as each other, got 16 and 8"):
        frechet_distance(moments(make_features(5)), moments(make_features(5, 8)))
    for wrong in (torch.zeros(5), torch.zeros(0, 16), torch.zeros(5, 16, dtype=torch.long), torch.zeros(5, 4, 4)):
        with pytest.raises(
            ValueError, match=r"`features` must be floating point numbers \(images, features\), got \("
        ):
            moments(wrong)
    with pytest.raises(ValueError, match="`features` must be finite"):
        moments(torch.full((2, 16), torch.nan))
