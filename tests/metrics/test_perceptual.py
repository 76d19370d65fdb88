# SPDX-License-Identifier: Apache-2.0
"""LPIPS: held against the package it comes from."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import lpips
import pytest
import safetensors.torch
import torch
import torchvision
from torchvision.models.vgg import cfgs, make_layers

from hf_var.metrics.perceptual import PerceptualLoss


SIZE = (24, 16)


def make_images(seed: int, channels: int = 3, batch_size: int = 2) -> torch.Tensor:
    return torch.rand(batch_size, channels, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def features() -> torch.nn.Sequential:
    """The convolutions of torchvision's vgg16 with random weights, as `vgg16().features`."""
    with torch.device("meta"):
        features = make_layers(cfgs["D"])
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, parameter in features.state_dict().items():
        deviation = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        weights[name] = torch.randn(parameter.shape, generator=generator) * deviation
    features.load_state_dict(weights, assign=True)
    return features.requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(features, tmp_path_factory) -> Path:
    """A file as torchvision has it, the classifier included."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    content = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(content | {"classifier.0.bias": torch.ones(3)}, path)
    return path


@pytest.fixture(scope="module")
def loss(checkpoint) -> PerceptualLoss:
    return PerceptualLoss(3, SIZE, str(checkpoint))


def test_it_is_the_lpips_package(loss, features, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package itself takes torchvision's model apart, as it does with a downloaded one.
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **_: SimpleNamespace(features=features))
    package = lpips.LPIPS(net="vgg", verbose=False)
    sample, target = make_images(0), make_images(1)
    ours, theirs = sample.clone().requires_grad_(), sample.clone().requires_grad_()
    distances = loss(ours, target)
    expected = package(theirs, target).flatten()
    assert distances.shape == (2,)
    assert bool((expected > 0.05).all())
    torch.testing.assert_close(distances, expected)
    distances.sum().backward()
    expected.sum().backward()
    assert theirs.grad is not None
    assert theirs.grad.abs().max() > 1e-4
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_safetensors_file_gives_the_same(loss, features, tmp_path: Path) -> None:
    path = tmp_path / "vgg16.safetensors"
    safetensors.torch.save_file({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    images = make_images(0), make_images(1)
    assert torch.equal(PerceptualLoss(3, SIZE, str(path))(*images), loss(*images))


def test_weights_in_the_cache_of_torch_are_found(
    loss, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").symlink_to(checkpoint)
    images = make_images(0), make_images(1)
    assert torch.equal(PerceptualLoss(3, SIZE)(*images), loss(*images))


def test_equal_images_have_no_distance_and_more_noise_more(loss) -> None:
    images, noise = make_images(0), make_images(1)
    near, far = (loss(images + scale * noise, images) for scale in (0.05, 0.5))
    assert loss(images, images).tolist() == [0, 0]
    assert bool((near > 0).all())
    assert bool((5 * near < far).all())


def test_it_is_frozen_and_stays_in_evaluation_mode(loss) -> None:
    sample, target = make_images(0).requires_grad_(), make_images(1).requires_grad_()
    before = loss(sample, target).tolist()
    torch.nn.Sequential(loss).train()
    assert not any(module.training for module in loss.modules())
    distances = loss(sample, target)
    assert distances.tolist() == before
    distances.sum().backward()
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in loss.parameters())
    assert sample.grad is not None
    assert target.grad is None


def test_one_channel_counts_as_three_equal_ones(loss, checkpoint: Path) -> None:
    grey = PerceptualLoss(1, SIZE, str(checkpoint))
    sample, target = make_images(0, channels=1), make_images(1, channels=1)
    expected = loss(sample.repeat(1, 3, 1, 1), target.repeat(1, 3, 1, 1))
    torch.testing.assert_close(grey(sample, target), expected)


def test_autocast_changes_nothing(loss) -> None:
    sample, target = make_images(0), make_images(1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(sample, target)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(sample, target))


def test_the_gradient_is_finite_where_all_features_are_zero(features, tmp_path: Path) -> None:
    content = {f"features.{name}": tensor.clone() for name, tensor in features.state_dict().items()}
    content["features.28.bias"].fill_(-1e4)
    torch.save(content, tmp_path / "vgg16.pth")
    sample = make_images(0).requires_grad_()
    distances = PerceptualLoss(3, SIZE, str(tmp_path / "vgg16.pth"))(sample, make_images(1))
    distances.sum().backward()
    assert sample.grad is not None
    assert bool(sample.grad.isfinite().all())
    assert bool(sample.grad.any())


def test_random_weights_are_the_same_each_time_and_leave_no_trace() -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (PerceptualLoss(3, SIZE, "random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    images = make_images(0), make_images(1)
    assert torch.equal(first(*images), second(*images))
    assert bool((first(*images) > 0.01).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, SIZE, "random"), "`in_channels` must be 1 or 3.*got 4"),
        ((3, (32, 15), "random"), "`image_size` must be at least 16.*got 32x15"),
        ((3, SIZE, "nowhere.pth"), "`lpips_weights` cannot be read.*nowhere.pth"),
    ],
)
def test_bad_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualLoss(*arguments)


def test_files_of_other_models(features, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"`lpips_weights`.*lacks.*features.0.bias"):
        PerceptualLoss(3, SIZE, str(path))
    content = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(content | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"`lpips_weights`.*features.0.weight.*\(64, 1, 3, 3\)"):
        PerceptualLoss(3, SIZE, str(path))


def test_a_failed_download_names_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match=r"vgg16-397923af.pth cannot be downloaded.*no network.*`lpips_weights`"):
        PerceptualLoss(3, SIZE)
