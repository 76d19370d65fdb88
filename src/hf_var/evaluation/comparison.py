# SPDX-License-Identifier: Apache-2.0
"""All metrics of a set of images against a reference, from files of their features."""

from collections.abc import Mapping

import numpy as np
import torch

from ..metrics.generation import generation_metrics
from .feature_files import FeatureFiles


def compute_figures(
    samples: FeatureFiles,
    reference: FeatureFiles | None,
    stored: Mapping[str, np.ndarray],
    device: torch.device,
) -> dict[str, float]:
    """Compare a set of images with real ones, see [`generation_metrics`]."""
    return generation_metrics(_whole(samples), {} if reference is None else _whole(reference), stored, device)


def _whole(files: FeatureFiles) -> dict[str, torch.Tensor]:
    parts = list(files.load("features", "spatial_features", "logits"))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
