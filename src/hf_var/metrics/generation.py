# SPDX-License-Identifier: Apache-2.0
"""Inception Score, KID, precision and recall of features that are there as a whole."""

from collections.abc import Iterator

import numpy as np
import torch
from torchmetrics.image.kid import poly_mmd

from .feature_extractors import full_precision
from .moments import check_features, in_double


@torch.no_grad()
def inception_score(logits: torch.Tensor, split_size: int = 5000) -> float:
    """
    Inception Score (Salimans et al. 2016, section 4) as the evaluator of Dhariwal & Nichol 2021 takes it: images are cut
    into splits in the order given, and the scores of the splits averaged. So it depends on the order of the images, on
    their number and, where the last split is smaller, on that split, which counts like the others.

    Args:
        logits (`torch.FloatTensor` of shape `(images, classes)`): Inception's, without the last layer's bias.
        split_size (`int`, *optional*, defaults to 5000): Images of a split.

    Raises:
        `ValueError`: If the shape is another one, if values are not finite, or if `split_size` is not positive.
    """
    check_features("logits", logits)
    if split_size < 1:
        raise ValueError(f"`split_size` must be positive, got {split_size}.")
    scores = []
    for split in logits.split(split_size):
        log_shares = in_double(split).log_softmax(dim=1)  # (split, classes)
        log_mean = log_shares.logsumexp(dim=0) - np.log(len(split))
        divergences = (log_shares.exp() * (log_shares - log_mean)).sum(dim=1)
        scores.append(divergences.mean().exp().item())
    return float(np.mean(scores))


@torch.no_grad()
def kernel_distance(
    features: torch.Tensor,
    reference: torch.Tensor,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """
    KID (Binkowski et al. 2018, section 4): the squared maximum mean discrepancy for the kernel (x y / features + 1)^3,
    estimated without bias on random subsets. An estimate may be negative.

    Subsets are drawn as torch-fidelity draws them; with its seed, which is the default here, both agree.

    Args:
        features (`torch.FloatTensor` of shape `(images, features)`): Features of the images.
        reference (`torch.FloatTensor` of shape `(reference_images, features)`): Features of the reference.
        num_subsets (`int`, *optional*, defaults to 100): Number of pairs of subsets.
        subset_size (`int`, *optional*, defaults to 1000): Images of a subset.
        seed (`int`, *optional*, defaults to 2020): Seed of the subsets.

    Returns:
        `tuple[float, float]`: Mean and standard deviation of the subsets' estimates.

    Raises:
        `ValueError`: If the features do not fit to each other or are not finite, if there are fewer images than a
            subset has, or if the subsets are too small or too few.
    """
    _check_pair("features", features, reference)
    if num_subsets < 1:
        raise ValueError(f"`num_subsets` must be positive, got {num_subsets}.")
    if not 2 <= subset_size <= min(len(features), len(reference)):
        raise ValueError(
            f"`subset_size` must be from 2 to {min(len(features), len(reference))}, the number of images of the smaller "
            f"set, got {subset_size}."
        )
    random = np.random.RandomState(seed)
    estimates = []
    for _ in range(num_subsets):
        chosen, other = (
            values[torch.from_numpy(random.choice(len(values), subset_size, replace=False))]
            for values in (features, reference)
        )
        # The estimate is a small difference of large means, more of it than fp32 can hold.
        chosen = in_double(chosen)
        estimates.append(poly_mmd(chosen, in_double(other).to(chosen.device)).item())
    return float(np.mean(estimates)), float(np.std(estimates))


@torch.no_grad()
def precision_recall(
    samples: torch.Tensor, reference: torch.Tensor, num_neighbors: int = 3, block_size: int = 4096
) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, section 3). An image's ball reaches to its
    `num_neighbors`-th neighbour among the other images of its set. Precision is the share of the samples in the ball of
    some image of the reference, recall the share of the reference in the ball of some sample.

    As the evaluator of Dhariwal & Nichol 2021 has it, but for its rounding: it computes distances in fp16 where that
    gives finite numbers, and they are fp32 here. Both figures depend on the numbers of images.

    Args:
        samples (`torch.FloatTensor` of shape `(images, features)`): Features of the samples; their device computes.
        reference (`torch.FloatTensor` of shape `(reference_images, features)`): Features of the reference.
        num_neighbors (`int`, *optional*, defaults to 3): Which neighbour the balls reach to.
        block_size (`int`, *optional*, defaults to 4096):
            Images of either set whose distances are in memory at once.

    Returns:
        `tuple[float, float]`: Precision and recall.

    Raises:
        `ValueError`: If the features do not fit to each other or are not finite, or if a set has no more than
            `num_neighbors` images.
    """
    _check_pair("samples", samples, reference)
    for name, value in (("num_neighbors", num_neighbors), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    for name, values in (("samples", samples), ("reference", reference)):
        if len(values) <= num_neighbors:
            raise ValueError(
                f"`{name}` must have more images than `num_neighbors` = {num_neighbors}, got {len(values)}."
            )
    with full_precision(samples.device.type):
        samples, reference = samples.float(), reference.to(samples.device).float()
        # Distances stay the same, and are no longer small differences of large norms.
        center = reference.mean(dim=0)
        samples, reference = samples - center, reference - center
        sample_radii = _squared_radii(samples, num_neighbors, block_size)
        reference_radii = _squared_radii(reference, num_neighbors, block_size)
        realistic = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
        for rows in _blocks(len(samples), block_size):
            for columns in _blocks(len(reference), block_size):
                distances = _squared_distances(samples[rows], reference[columns])  # (rows, columns)
                realistic[rows] |= (distances <= reference_radii[columns]).any(dim=1)
                covered[columns] |= (distances <= sample_radii[rows, None]).any(dim=0)
    return realistic.sum().item() / len(samples), covered.sum().item() / len(reference)


def _squared_radii(features: torch.Tensor, num_neighbors: int, block_size: int) -> torch.Tensor:
    radii = []
    for rows in _blocks(len(features), block_size):
        nearest = features.new_empty(len(features[rows]), 0)
        for columns in _blocks(len(features), block_size):
            nearest = torch.cat([nearest, _squared_distances(features[rows], features[columns])], dim=1)
            # Each image is among its own neighbours, hence one more.
            nearest = nearest.topk(min(num_neighbors + 1, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)  # (images,)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    norms = rows.square().sum(dim=1, keepdim=True) + columns.square().sum(dim=1)
    return torch.addmm(norms, rows, columns.T, alpha=-2).clamp_(min=0)  # (rows, columns)


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _check_pair(name: str, features: torch.Tensor, reference: torch.Tensor) -> None:
    check_features(name, features)
    check_features("reference", reference)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"`{name}` and `reference` must have as many features as each other, got {features.shape[1]} and "
            f"{reference.shape[1]}."
        )
