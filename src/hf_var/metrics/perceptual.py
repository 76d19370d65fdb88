# SPDX-License-Identifier: Apache-2.0
"""LPIPS: the distance of two images in the features of a classifier."""

import os
import warnings
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from ..weight_files import StateDict, listing, read_state_dict


# Four halvings lie before the last of the compared layers.
MIN_IMAGE_SIZE = 16

RANDOM_WEIGHTS = "random"


class PerceptualLoss(nn.Module):
    """
    LPIPS (Zhang et al. 2018): the distance of two images in the features of VGG16, by the `lpips` package and its
    calibrated heads. Frozen, always in evaluation mode and in fp32.

    Args:
        in_channels (`int`): Channels of the images, 3 or 1; a single one is shown to the three inputs of VGG16.
        image_size (`tuple[int, int]`): Height and width of the images, at least 16 each.
        weights (`str`, *optional*):
            File with the weights of torchvision's `vgg16`, `.pth` or `.safetensors`. Without it torchvision's own are
            taken from torch's cache (`$TORCH_HOME/hub/checkpoints`) and downloaded to it first if need be. The word
            `random` means weights drawn with a fixed seed, which is good for tests and for nothing else.

    Raises:
        `ValueError`: If the images do not suit, or the weights can neither be read nor downloaded.
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
            # The package passes arguments that torchvision has renamed. Nothing is drawn on the meta device, neither the
            # 138 million weights that would be overwritten nor anything from the default generator.
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
        """
        Compare images.

        Args:
            sample (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`): Images in [-1, 1].
            target (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`):
                What they are compared with. It gets no gradient, which halves what is kept for the backward pass.

        Returns:
            `torch.FloatTensor` of shape `(batch,)`: Distances, 0 for equal images.
        """
        # Differences of features that nearly agree are what this measures: half precision leaves noise of them.
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
    path = _downloaded_weights() if weights is None else weights
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


def _downloaded_weights() -> str:
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not os.path.isfile(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # The end of the file's name is the beginning of its hash.
            digest = Path(path).stem.rpartition("-")[2]
            # Written under another name first, so several processes may do the same at once.
            torch.hub.download_url_to_file(url, path, hash_prefix=digest, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"`lpips_weights` is not given, and the weights of VGG16 cannot be downloaded from {url} ({error}). Put "
                f"that file on this machine and give its path as `lpips_weights`, or set the weight of LPIPS to 0."
            ) from error
    return path
