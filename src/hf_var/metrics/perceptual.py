# SPDX-License-Identifier: Apache-2.0
"""LPIPS: the distance of two images in the features of a classifier."""

import warnings
from pathlib import Path

import torch
from torch import nn

from ..downloads import download_weights
from ..weight_files import StateDict, listing, read_state_dict


# Four halvings lie before the last of the compared layers.
MIN_IMAGE_SIZE = 16

RANDOM_WEIGHTS = "random"


class PerceptualLoss(nn.Module):
    """
    LPIPS (Zhang et al. 2018): the distance of two images in the features of VGG16, by the `lpips` package and its
    calibrated heads. Frozen, always in evaluation mode and in fp32. A single channel is shown to all three inputs of
    VGG16. `weights` are a file of torchvision's `vgg16`, downloaded once by default; `random`, for tests, are random
    ones with a fixed seed.
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], weights: str | None = None):
        super().__init__()
        if in_channels not in (1, 3):
            raise ValueError(
                f"`in_channels` must be 1 or 3 for the perceptual loss, whose network looks at colour images, got "
                f"{in_channels}."
            )
        if min(image_size) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"`image_size` must be at least {MIN_IMAGE_SIZE} pixels per side for the perceptual loss, got "
                f"{image_size[0]}x{image_size[1]}."
            )
        import lpips

        with torch.device("meta"), warnings.catch_warnings():
            # The package passes arguments that torchvision has renamed. The meta device spares the initialization of
            # 138 million weights, and the default generator.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            self.lpips = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        content = read_state_dict(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", "lpips")
        backbone = self.lpips.net
        found = _random_backbone(backbone) if weights == RANDOM_WEIGHTS else _read_backbone(weights, backbone)
        content |= {f"net.{name}": tensor for name, tensor in found.items()}
        # A copy, since files are memory-mapped. Not strict, since the package has a second name for each head.
        content = {name: tensor.to(torch.float32, copy=True) for name, tensor in content.items()}
        self.lpips.load_state_dict(content, strict=False, assign=True)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stays in evaluation mode: the heads have dropout, which belongs to their own training."""
        return super().train(False)

    def forward(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Distances `(batch,)` of images in `[-1, 1]`. `target` gets no gradient, which halves the memory."""
        # Half precision would leave only noise of the differences between features that nearly agree.
        with torch.autocast(sample.device.type, enabled=False):
            sample, target = (images.float().expand(-1, 3, -1, -1) for images in (sample, target.detach()))
            return self.lpips(sample, target).flatten()  # (batch,)


def _random_backbone(backbone: nn.Module) -> StateDict:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in backbone.state_dict().items():
        weights[name] = torch.zeros(parameter.shape)
        if name.endswith("weight"):
            nn.init.kaiming_normal_(weights[name], nonlinearity="relu", generator=generator)
    return weights


def _read_backbone(weights: str | None, backbone: nn.Module) -> StateDict:
    from torchvision.models import VGG16_Weights

    path = download_weights(VGG16_Weights.IMAGENET1K_V1.url, "lpips_weights") if weights is None else weights
    try:
        content = read_state_dict(path, "vgg16")
    except ValueError as error:
        raise ValueError(f"`lpips_weights` cannot be read: {error}") from error
    # The package cuts `features` of torchvision's model into five slices and keeps the numbers of the layers.
    names = {name: "features." + name.partition(".")[2] for name in backbone.state_dict()}
    missing = [name for name in names.values() if name not in content]
    if missing:
        raise ValueError(
            f"`lpips_weights` must hold the weights of torchvision's vgg16, but {path!r} lacks {listing(missing)}."
        )
    for ours, theirs in names.items():
        expected = backbone.get_parameter(ours).shape
        if content[theirs].shape != expected:
            raise ValueError(
                f"`lpips_weights` must hold the weights of torchvision's vgg16, but {theirs!r} of {path!r} has the shape "
                f"{tuple(content[theirs].shape)} instead of {tuple(expected)}."
            )
    return {ours: content[theirs] for ours, theirs in names.items()}
