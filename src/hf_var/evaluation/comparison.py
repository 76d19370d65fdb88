# SPDX-License-Identifier: Apache-2.0
"""All figures of a set of images against a reference, from their features."""

from collections.abc import Mapping

import numpy as np
import torch

from ..metrics.generation import inception_score, kernel_distance, precision_recall
from ..metrics.moments import GaussianStatistics, frechet_distance
from .feature_files import FeatureFiles


# Name of the distance, the features it compares, and the names of their moments in OpenAI's files.
DISTANCES = (("fid", "features", "mu", "sigma"), ("sfid", "spatial_features", "mu_s", "sigma_s"))
NUM_NEIGHBORS = 3
KID_SUBSET_SIZE = 1000


def compute_figures(
    samples: FeatureFiles,
    reference: FeatureFiles | None,
    stored: Mapping[str, np.ndarray],
    device: torch.device,
) -> dict[str, float]:
    """
    Compare a set of images with real ones.

    Args:
        samples ([`FeatureFiles`]): Features of the images to judge.
        reference ([`FeatureFiles`], *optional*): Features of real images.
        stored (`dict[str, np.ndarray]`):
            Moments `mu`, `sigma`, `mu_s` and `sigma_s` of a reference file, as far as it has them. They count more than
            the images beside them, which may be a small part of those that the moments are of.
        device (`torch.device`): Where distances are computed.

    Returns:
        `dict[str, float]`: `fid`, `sfid`, `inception_score`, `precision`, `recall`, `kid` and `kid_std`, as far as the
        features and the reference allow.

    Raises:
        `ValueError`: If there are too few images, or if the features do not fit the stored moments.
    """
    figures: dict[str, float] = {}
    for name, feature, mean, covariance in DISTANCES:
        moments = _moments(samples, feature)
        if moments is None:
            continue
        theirs = None
        if mean in stored and covariance in stored:
            theirs = GaussianStatistics.from_arrays(stored[mean], stored[covariance])
        elif reference is not None:
            theirs = _moments(reference, feature)
        if theirs is not None:
            figures[name] = frechet_distance(moments, theirs)
    logits = _whole(samples, "logits")
    if logits is not None:
        figures["inception_score"] = inception_score(logits)
    features = _whole(samples, "features")
    known = None if reference is None else _whole(reference, "features")
    if features is not None and known is not None:
        features, known = features.to(device), known.to(device)
        figures["precision"], figures["recall"] = precision_recall(features, known, NUM_NEIGHBORS)
        figures["kid"], figures["kid_std"] = kernel_distance(
            features, known, subset_size=kid_subset_size(samples, reference)
        )
    return figures


def kid_subset_size(samples: FeatureFiles, reference: FeatureFiles | None) -> int:
    """Images of a subset of KID: 1,000, or all of a smaller set."""
    return min(KID_SUBSET_SIZE, samples.num_images, samples.num_images if reference is None else reference.num_images)


def _moments(files: FeatureFiles, name: str) -> GaussianStatistics | None:
    moments = GaussianStatistics()
    for part in files.load(name):
        if name not in part:
            return None
        moments.update(part[name])
    return moments


def _whole(files: FeatureFiles, name: str) -> torch.Tensor | None:
    parts = [part.get(name) for part in files.load(name)]
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found and len(found) == len(parts) else None
