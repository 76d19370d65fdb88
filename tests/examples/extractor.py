# SPDX-License-Identifier: Apache-2.0
"""A feature extractor for rFID that needs no weights."""

import torch
from torch import nn


class CoarsePixels(nn.Module):
    """Images as their means over two by two areas."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)  # (batch, 12)


class RandomFeatures(nn.Module):
    """Two random convolutions with all that Inception gives: 6 features, 8 spatial ones and 5 logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convolutions = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2))
        self.head = nn.Linear(6, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.convolutions(images.float() / 127.5 - 1)
        features = maps.mean(dim=(2, 3))
        spatial_features = nn.functional.adaptive_avg_pool2d(maps[:, :2], 2).flatten(1)
        return {"features": features, "spatial_features": spatial_features, "logits": self.head(features)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images)["features"]


class Refusing(RandomFeatures):
    """The same, which takes noise and no other images."""

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(images) > 2:
            raise ValueError("These images are too dark.")
        return super().outputs(images)
