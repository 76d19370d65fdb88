# SPDX-License-Identifier: Apache-2.0
"""Reconstruction losses on pixels."""

import torch
from torch.nn import functional


def reconstruction_loss(
    sample: torch.Tensor, target: torch.Tensor, l1_weight: float, l2_weight: float
) -> torch.Tensor:
    """
    Weighted sum of mean absolute and mean squared error, in fp32 whatever the dtype of the images.

    Args:
        sample (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Reconstructions.
        target (`torch.FloatTensor` of shape `(batch, channels, height, width)`): What they should be.
        l1_weight (`float`): Weight of the mean absolute error.
        l2_weight (`float`): Weight of the mean squared error.

    Returns:
        `torch.FloatTensor` of shape `()`.
    """
    sample, target = sample.float(), target.float()
    # A term without weight costs nothing.
    terms = ((l1_weight, functional.l1_loss), (l2_weight, functional.mse_loss))
    weighted = [weight * distance(sample, target) for weight, distance in terms if weight != 0]
    return torch.stack(weighted).sum() if weighted else sample.new_zeros(())
