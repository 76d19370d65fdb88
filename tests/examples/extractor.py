# SPDX-License-Identifier: Apache-2.0
"""A feature extractor for rFID that needs no weights."""

import torch
from torch import nn


class CoarsePixels(nn.Module):
    """Images as their means over two by two areas."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)  # (batch, 12)
