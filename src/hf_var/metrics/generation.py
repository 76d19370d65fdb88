# SPDX-License-Identifier: Apache-2.0
"""How close generated images are to real ones, by their features: FID, sFID, Inception Score, KID, precision, recall."""

from collections.abc import Mapping

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from .feature_extractors import full_precision
from .protocol import NUM_NEIGHBORS


# `mu` (features,) and `sigma` (features, features), in double precision.
Moments = Mapping[str, np.ndarray]

# Name of the distance, the features that it compares, and the names of their moments in OpenAI's reference files.
DISTANCES = (("fid", "features", "mu", "sigma"), ("sfid", "spatial_features", "mu_s", "sigma_s"))
KID_SUBSET_SIZE = 1000
# Images whose distances to a whole set are in memory at once.
BLOCK_SIZE = 1000


def generation_metrics(
    samples: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    stored: Mapping[str, np.ndarray],
    device: torch.device,
) -> dict[str, float]:
    """
    All metrics that can be computed from the features of two sets of images, by name (see [`extract_features`]). The
    `stored` moments of a reference file, `mu`, `sigma`, `mu_s` and `sigma_s`, take precedence over its images, which
    may be only a small part of the images behind the moments.
    """
    metrics: dict[str, float] = {}
    for name, feature, mean, covariance in DISTANCES:
        if feature not in samples:
            continue
        if mean in stored and covariance in stored:
            known = {"mu": stored[mean], "sigma": stored[covariance]}
        elif feature in reference:
            known = moments(reference[feature])
        else:
            continue
        metrics[name] = frechet_distance(moments(samples[feature]), known)
    if "logits" in samples:
        metrics["inception_score"] = inception_score(samples["logits"])
    if "features" in samples and "features" in reference:
        features, known = samples["features"], reference["features"]
        metrics["precision"], metrics["recall"] = precision_recall(features.to(device), known.to(device))
        metrics["kid"], metrics["kid_std"] = kernel_distance(
            features, known, subset_size=kid_subset_size(len(features), len(known))
        )
    return metrics


def moments(features: torch.Tensor) -> Moments:
    """Mean and unbiased covariance of features `(images, features)`, of two images at least."""
    check_features("features", features)
    if len(features) < 2:
        raise ValueError(f"A covariance needs at least 2 images, got {len(features)}.")
    return fid_features_to_statistics(features.cpu().double())


def frechet_distance(first: Moments, second: Moments) -> float:
    r"""
    Distance of two Gaussians (Heusel et al. 2017, section 2): \( \|\mu_1 - \mu_2\|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2
    - 2 (\Sigma_1 \Sigma_2)^{1/2}) \). It is FID on Inception's pool features and sFID on its spatial ones.
    """
    (mean, covariance), (other_mean, other_covariance) = (
        (each["mu"], np.atleast_2d(each["sigma"])) for each in (first, second)
    )
    if len(mean) != len(other_mean):
        raise ValueError(
            f"`first` and `second` must have as many features as each other, got {len(mean)} and {len(other_mean)}: they "
            "come from different extractors."
        )
    # The trace of the root is a sum over the eigenvalues of the symmetric root(first) second root(first). Unlike those of
    # the product, which torch-fidelity takes, they stay real and positive for fewer images than features.
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(min=0))
    traces = np.trace(covariance) + np.trace(other_covariance)
    return max(float(np.square(mean - other_mean).sum() + traces - 2 * roots.sum()), 0.0)


def inception_score(logits: torch.Tensor, split_size: int = 5000) -> float:
    """
    Inception Score (Salimans et al. 2016, section 4) of Inception's logits `(images, classes)` without the last bias:
    the mean over equal parts of the images, in the order given, of at least `split_size` images each. For a multiple
    of 5,000 images it is that of the evaluator of Dhariwal & Nichol 2021, which otherwise counts the smaller last part
    like the others.
    """
    check_features("logits", logits)
    splits = max(1, len(logits) // split_size)
    return isc_features_to_metric(logits, splits=splits, shuffle=False)[KEY_METRIC_ISC_MEAN]


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, num_subsets: int = 100, subset_size: int = KID_SUBSET_SIZE
) -> tuple[float, float]:
    """
    Mean and standard deviation of KID (Binkowski et al. 2018, section 4): the squared maximum mean discrepancy for the
    kernel (x y / features + 1)^3, estimated without bias on random subsets, with torch-fidelity's seed. An estimate
    may be negative.
    """
    _check_pair("features", features, reference)
    most = min(len(features), len(reference))
    if not 2 <= subset_size <= most:
        raise ValueError(
            f"`subset_size` must be from 2 to {most}, the number of images of the smaller set, got {subset_size}."
        )
    # In double precision: the estimate is a small difference of large means.
    found = kid_features_to_metric(
        features.cpu().double(),
        reference.cpu().double(),
        kid_subsets=num_subsets,
        kid_subset_size=subset_size,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def kid_subset_size(num_samples: int, num_reference: int) -> int:
    """Images of a subset of KID: 1,000, or all of a smaller set."""
    return min(KID_SUBSET_SIZE, num_samples, num_reference)


def precision_recall(
    samples: torch.Tensor, reference: torch.Tensor, num_neighbors: int = NUM_NEIGHBORS
) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, section 3). An image's ball reaches to its
    `num_neighbors`-th neighbour among the other images of its set. Precision is the share of the samples in the ball
    of some image of the reference, recall the share of the reference in the ball of some sample. Both depend on the
    numbers of images. The evaluator of Dhariwal & Nichol 2021 rounds distances to half precision, which is not done
    here.
    """
    _check_pair("samples", samples, reference)
    for name, values in (("samples", samples), ("reference", reference)):
        if len(values) <= num_neighbors:
            raise ValueError(
                f"`{name}` must have more images than `num_neighbors` = {num_neighbors}, got {len(values)}."
            )
    # Centred: distances stay the same and are no longer small differences of large norms.
    samples, reference = samples.float(), reference.float()
    center = reference.mean(dim=0)
    with full_precision(samples.device.type):
        found = prc_features_to_metric(
            samples - center,
            reference - center,
            prc_neighborhood=num_neighbors,
            prc_batch_size=BLOCK_SIZE,
            save_cpu_ram=True,
            verbose=False,
        )
    # torch-fidelity divides in single precision.
    precision, recall = round(found[KEY_METRIC_PRECISION] * len(samples)), found[KEY_METRIC_RECALL] * len(reference)
    return precision / len(samples), round(recall) / len(reference)


def check_features(name: str, features: torch.Tensor) -> None:
    """Raise a `ValueError` if `features`, named `name`, are not finite numbers `(images, features)`."""
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating point numbers (images, features), got "
            f"{tuple(features.shape)} of {str(features.dtype).removeprefix('torch.')}."
        )
    if not features.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got values that are not.")


def _check_pair(name: str, features: torch.Tensor, reference: torch.Tensor) -> None:
    check_features(name, features)
    check_features("reference", reference)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"`{name}` and `reference` must have as many features as each other, got {features.shape[1]} and "
            f"{reference.shape[1]}."
        )
