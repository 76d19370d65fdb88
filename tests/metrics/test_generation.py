# SPDX-License-Identifier: Apache-2.0
"""Scores against cases with known answers, direct computations, and torch-fidelity's on the same features."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from hf_var.metrics.generation import inception_score, kernel_distance, precision_recall


def make_features(number: int, width: int = 8, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def shuffled(features: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))]


def precision_recall_by_hand(samples: torch.Tensor, reference: torch.Tensor, neighbors: int) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, equations 1 and 2, with all distances at once."""

    def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(one[:, None] - other[None]).sum(axis=2))

    samples, reference = samples.double().numpy(), reference.double().numpy()
    sample_radii = np.sort(distances(samples, samples), axis=1)[:, neighbors]
    reference_radii = np.sort(distances(reference, reference), axis=1)[:, neighbors]
    between = distances(samples, reference)
    precision = (between <= reference_radii[None]).any(axis=1).mean()
    recall = (between <= sample_radii[:, None]).any(axis=0).mean()
    return float(precision), float(recall)


# --------------------------------------------------------------------------------------------------------------------
# Inception Score


def test_inception_score_of_known_distributions() -> None:
    certain = 100 * torch.eye(7).repeat(10, 1)
    assert inception_score(certain) == pytest.approx(7)
    assert inception_score(torch.zeros(20, 7)) == pytest.approx(1)
    # Sure of a class and told nothing by it: all images are alike.
    assert inception_score(certain[:1].repeat(20, 1)) == pytest.approx(1)
    # Two images with shares (p, 1 - p) and (1 - p, p) against (1/2, 1/2).
    share = 0.8
    logits = torch.tensor([[share, 1 - share], [1 - share, share]]).log()
    divergence = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
    assert inception_score(logits) == pytest.approx(math.exp(divergence))


def test_inception_score_splits_in_the_order_given() -> None:
    logits = make_features(100, 10, scale=3)
    # Equal parts of at least as many images.
    parts = [inception_score(part) for part in logits.split(50)]
    assert len(parts) == 2
    assert inception_score(logits, split_size=40) == pytest.approx(np.mean(parts))
    assert inception_score(logits, split_size=40) != pytest.approx(inception_score(logits), rel=1e-3)
    assert inception_score(shuffled(logits)) == pytest.approx(inception_score(logits), rel=1e-12)
    assert inception_score(shuffled(logits), split_size=40) != pytest.approx(
        inception_score(logits, split_size=40), rel=1e-6
    )


@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_equals_torch_fidelitys(splits: int) -> None:
    logits = make_features(200, 30, scale=4)
    expected = isc_features_to_metric(logits, splits=splits, shuffle=False)[KEY_METRIC_ISC_MEAN]
    assert expected > 2
    assert inception_score(logits, split_size=200 // splits) == pytest.approx(expected, rel=1e-10)


def test_inception_score_of_enormous_logits_is_a_number() -> None:
    # Shares that are zero in any precision, whose logarithm is not.
    assert inception_score(1e4 * torch.eye(4)) == pytest.approx(4)
    assert inception_score((1e4 * torch.eye(4)).half()) == pytest.approx(4)


def test_inception_score_of_what_has_none() -> None:
    with pytest.raises(ValueError, match=r"`logits` must be floating.*\(0, 2\)"):
        inception_score(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="`logits` must be finite"):
        inception_score(torch.tensor([[0.0, torch.inf]]))


# --------------------------------------------------------------------------------------------------------------------
# KID


def test_kernel_distance_equals_torch_fidelitys() -> None:
    features, reference = make_features(80, 32), make_features(90, 32, seed=1, scale=1.2, shift=0.3)
    expected = kid_features_to_metric(features.double(), reference.double(), kid_subsets=7, kid_subset_size=50)
    mean, deviation = kernel_distance(features, reference, num_subsets=7, subset_size=50)
    assert mean == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-9)
    assert deviation == pytest.approx(expected[KEY_METRIC_KID_STD], rel=1e-9)
    assert mean > 10 * deviation > 0
    others, _ = kernel_distance(shuffled(features), reference, num_subsets=7, subset_size=50)
    assert others != pytest.approx(mean, rel=1e-6)


def test_kernel_distance_equals_the_estimator_written_out() -> None:
    features, reference = make_features(20, 4).double(), make_features(20, 4, seed=1, shift=0.5).double()

    def kernel(one: torch.Tensor, other: torch.Tensor) -> float:
        return (float(one @ other) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(20) for j in range(20)]
    within = sum(
        (kernel(features[i], features[j]) + kernel(reference[i], reference[j])) / (20 * 19) for i, j in pairs if i != j
    )
    between = sum(kernel(features[i], reference[j]) / 20**2 for i, j in pairs)
    mean, deviation = kernel_distance(features, reference, num_subsets=2, subset_size=20)
    assert mean == pytest.approx(within - 2 * between, rel=1e-9)
    # Both subsets hold all images.
    assert deviation == pytest.approx(0, abs=1e-12)
    assert kernel_distance(shuffled(features), reference, 1, 20)[0] == pytest.approx(mean, rel=1e-9)


def test_kernel_distance_is_unbiased_and_leaves_the_global_generators_alone() -> None:
    features = make_features(2000, 8)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what must be left alone
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    mean, deviation = kernel_distance(features[:1000], features[1000:], num_subsets=50, subset_size=100)
    assert abs(mean) < deviation
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


def test_kernel_distance_of_sets_that_do_not_fit() -> None:
    features = make_features(20)
    for size in (1, 21):
        with pytest.raises(ValueError, match=rf"`subset_size` must be from 2 to 20.*got {size}"):
            kernel_distance(features, make_features(30), subset_size=size)
    with pytest.raises(ValueError, match="`features` and `reference`.*got 8 and 9"):
        kernel_distance(features, make_features(20, 9), subset_size=5)
    with pytest.raises(ValueError, match="`reference` must be finite"):
        kernel_distance(features, torch.full_like(features, torch.nan), subset_size=5)


# --------------------------------------------------------------------------------------------------------------------
# Precision and recall


def test_precision_and_recall_of_points_on_a_line() -> None:
    reference = torch.tensor([[0.0], [1], [2], [3], [20]])
    samples = torch.tensor([[2.5], [6.0], [6.5], [7.0], [7.5]])
    # The reference's balls reach to its third neighbours: 3, 2, 2, 3 and 19, the last one's to all samples.
    assert precision_recall(samples, reference)[0] == 1
    # Without that one's large ball, 3 + 3 is the farthest: 2.5 and 6 are in it, at its very edge.
    assert precision_recall(samples, reference[:4]) == (2 / 5, 4 / 4)
    # The samples' radii are 4.5, 1.5, 1, 1 and 1.5: 2.5 reaches to -2, and none to 20.
    assert precision_recall(samples, reference)[1] == 4 / 5
    # With the nearest neighbour alone they are 3.5, 0.5, 0.5, 0.5 and 0.5.
    assert precision_recall(samples, reference[:4], num_neighbors=1) == (1 / 5, 4 / 4)


@pytest.mark.parametrize("neighbors", [1, 3, 5])
@pytest.mark.parametrize("block_size", [7, 50, 4096])
def test_precision_and_recall_equal_the_definition(
    neighbors: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_var.metrics.generation.BLOCK_SIZE", block_size)
    samples, reference = make_features(150, 6, scale=0.8), make_features(110, 6, seed=1, shift=0.5)
    expected = precision_recall_by_hand(samples, reference, neighbors)
    assert 0.2 < expected[1] < expected[0] < 0.99
    assert precision_recall(samples, reference, neighbors) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(reference, samples, neighbors) == pytest.approx(expected[::-1], abs=1e-12)


def test_precision_and_recall_equal_torch_fidelitys() -> None:
    samples, reference = make_features(200, 64, scale=0.9), make_features(150, 64, seed=1, shift=0.1)
    expected = prc_features_to_metric(samples, reference, verbose=False)
    figures = precision_recall(samples, reference)
    assert figures == pytest.approx((expected[KEY_METRIC_PRECISION], expected[KEY_METRIC_RECALL]), rel=1e-6)
    assert 0.1 < figures[1] < figures[0] < 0.99


def test_precision_and_recall_of_features_far_from_zero() -> None:
    # Multiples of 1/64, which the shift rounds nowhere; their squares have too many digits for fp32.
    samples = (make_features(150, 6, scale=0.8) * 64).round() / 64
    reference = (make_features(110, 6, seed=1, shift=0.5) * 64).round() / 64
    expected = precision_recall_by_hand(samples, reference, 3)
    assert precision_recall(samples + 60_000, reference + 60_000) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_shuffled_and_of_equal_sets() -> None:
    samples, reference = make_features(90, 6), make_features(90, 6, seed=1)
    expected = precision_recall(samples, reference)
    assert precision_recall(shuffled(samples), shuffled(reference, seed=1)) == expected
    assert precision_recall(samples, shuffled(samples)) == (1, 1)
    assert precision_recall(samples, samples + 100) == (0, 0)
    assert precision_recall(samples.half(), reference.half())[0] == pytest.approx(expected[0], abs=0.05)


def test_precision_and_recall_of_sets_that_do_not_fit() -> None:
    features = make_features(20)
    with pytest.raises(ValueError, match="`samples` must have more images than `num_neighbors` = 3, got 3"):
        precision_recall(features[:3], features)
    with pytest.raises(ValueError, match="`reference` must have more images than `num_neighbors` = 20, got 20"):
        precision_recall(make_features(21), features, num_neighbors=20)
    with pytest.raises(ValueError, match="`samples` and `reference`.*got 8 and 9"):
        precision_recall(features, make_features(20, 9))
    with pytest.raises(ValueError, match=r"`samples` must be floating.*\(20, 2, 4\)"):
        precision_recall(features.view(20, 2, 4), features)
