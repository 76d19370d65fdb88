# SPDX-License-Identifier: Apache-2.0
"""Feature extractors for metrics: the Inception network of published results, or any other module."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from threading import get_ident

import torch
from torch import nn

from ..downloads import download_weights
from ..precision import EXACT_ON_CUDA, fp32_precision
from ..weight_files import read_state_dict


# Channels of the spatial features that are compared: with 17 x 17 positions about as many numbers as pool features.
SPATIAL_CHANNELS = 7
OUTPUTS = ("features", "spatial_features", "logits")


class InceptionFeatures(nn.Module):
    """
    The Inception network of 2015, the source of published values of FID, ported by torch-fidelity together with
    TensorFlow 1's resizing to 299 x 299 pixels: bilinear without antialiasing, unlike that of other libraries. It
    stays in evaluation mode. Without a file of torch-fidelity's `weights` they are downloaded once.
    """

    num_features = 2048

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise ValueError("The feature extractor 'inception' needs `pip install torch-fidelity`.") from error
        path = download_weights(URL_INCEPTION_V3, "feature_extractor_weights") if weights is None else weights
        try:
            state_dict = read_state_dict(path, section="inception")
        except ValueError as error:
            raise ValueError(f"The weights of the feature extractor 'inception' cannot be used: {error}") from error
        # The constructor would run any code in the file, so it gets a copy of what was read safely.
        copy = io.BytesIO()
        torch.save(state_dict, copy)
        copy.seek(0)
        try:
            # The constructor initializes weights at random, which must not change the random stream of a training.
            with torch.random.fork_rng(devices=[]):
                self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:300]
            raise ValueError(f"`weights` {path!r} must be those of torch-fidelity's Inception: {detail}.") from error

    def train(self, mode: bool = True) -> "InceptionFeatures":
        """No effect: in training mode an image's features would depend on the other images."""
        return super().train(False)

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What the evaluator of Dhariwal & Nichol 2021 (`guided-diffusion`) compares, for images of any size: `features`
        `(batch, 2048)`, the averages of the last layer's maps; `spatial_features` `(batch, 2023)`, the first 7
        channels of `mixed_6/conv` in the order height, width, channel, for sFID (Nash et al. 2021); `logits` `(batch,
        1008)`, without the last layer's bias, for the Inception Score.
        """
        maps: list[torch.Tensor] = []
        thread = get_ident()

        def keep(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            # Calls in other threads run this hook as well.
            if get_ident() == thread:
                maps.append(output)

        layer: nn.Module = self.network.Mixed_6d.branch1x1  # pyright: ignore[reportAssignmentType]
        with layer.register_forward_hook(keep):
            features, logits = self.network(images)
        (spatial,) = maps
        # TensorFlow has channels last, and stored statistics are in its order.
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (batch, 17 * 17 * 7)
        return {"features": features, "spatial_features": spatial, "logits": logits}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pool features `(batch, 2048)` of `torch.ByteTensor` images `(batch, 3, height, width)`."""
        return self.outputs(images)["features"]


def load_feature_extractor(name: str, weights: str | None = None) -> nn.Module:
    """
    The feature extractor that a command line names: `inception` for [`InceptionFeatures`], or
    `package.module:callable`, called with the file of `weights` if there is one, which returns a module for
    [`extract_features`].
    """
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"`weights` of the feature extractor must be a file, got {weights!r}.")
    if name == "inception":
        return InceptionFeatures(weights)
    if ":" not in name:
        raise ValueError(f"The feature extractor must be inception or package.module:callable, got {name!r}.")
    try:
        factory = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The feature extractor {name!r} cannot be imported: {error}.") from error
    extractor = factory() if weights is None else factory(weights)
    if not isinstance(extractor, nn.Module):
        raise ValueError(f"The feature extractor {name!r} must give a torch.nn.Module, got {type(extractor)}.")
    return extractor.eval().requires_grad_(False)


def rgb_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in `[-1, 1]` as bytes `(batch, 3, height, width)`: gray is repeated, further channels are cut off."""
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def extract_features(extractor: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Features in fp32, without autocast. Use it inside of [`full_precision`].

    Args:
        extractor (`nn.Module`):
            Maps the images to features `(batch, features)`. If it has a method `outputs`, that one is called instead and
            returns a dictionary of `features` and, optionally, `spatial_features` (for sFID) and `logits` (for the
            Inception Score), each of two dimensions. See [`InceptionFeatures`].
        images (`torch.ByteTensor` of shape `(batch, 3, height, width)`): On the extractor's device.

    Returns:
        `dict[str, torch.FloatTensor]`: `features` and the others that the extractor returns, on its device.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            "`images` must be a uint8 tensor (batch, 3, height, width), got "
            f"{tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}."
        )
    with torch.autocast(images.device.type, enabled=False):
        outputs = getattr(extractor, "outputs", None)
        found = {"features": extractor(images)} if outputs is None else outputs(images)
    if not isinstance(found, dict) or "features" not in found or not found.keys() <= set(OUTPUTS):
        given = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"`extractor.outputs` must give a dictionary with 'features' and of {OUTPUTS}, got {given}.")
    for name, values in found.items():
        shape = tuple(values.shape) if torch.is_tensor(values) else type(values).__name__
        if not torch.is_tensor(values) or values.ndim != 2 or len(values) != len(images) or values.shape[1] == 0:
            raise ValueError(f"`extractor` must give `{name}` of shape ({len(images)}, numbers), got {shape}.")
        if not values.isfinite().all():
            raise ValueError(f"`extractor` gives values of `{name}` that are not finite.")
    return {name: values.float() for name, values in found.items()}


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """
    Compute in true fp32, without autocast on `device_type`. NVIDIA's cards round the factors of convolutions to 10 bits
    by default, and those of matrices on demand: too few for differences of squares. The setting is the process's.
    """
    with fp32_precision(EXACT_ON_CUDA), torch.autocast(device_type, enabled=False):
        yield
