# SPDX-License-Identifier: Apache-2.0
"""Inception's three outputs against its layers one by one, weights that are none, and extractors of users."""

import io
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from hf_var.metrics.feature_extractors import (
    InceptionFeatures,
    extract_features,
    full_precision,
    load_feature_extractor,
    rgb_bytes,
)
from hf_var.metrics.image_quality import ReconstructionMetrics


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Random weights under which features differ between images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    network.fc.bias.copy_(torch.linspace(-3, 3, 1008))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(weights) -> InceptionFeatures:
    return load_feature_extractor("inception", str(weights))


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Two that differ in all their features: dark noise, and bright stripes."""
    noise = torch.randint(90, (3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stripes = torch.tensor([255, 120, 30, 200], dtype=torch.uint8).repeat_interleave(5).expand(3, 24, 20)
    return torch.stack([noise, stripes])


@pytest.fixture(scope="session")
def outputs(inception, images) -> dict[str, torch.Tensor]:
    return extract_features(inception, images)


def test_outputs_are_those_of_the_layers(inception, images, outputs) -> None:
    network = inception.network
    maps = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    maps = (maps - 128) / 128
    for name, layer in network.named_children():
        if name == "Mixed_6d":
            convolution = network.Mixed_6d.branch1x1
            spatial = torch.relu(convolution.bn(convolution.conv(maps)))
        if name == "fc":
            break
        maps = layer(maps)
    pooled = maps.flatten(1)
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {
        "features": (2, 2048),
        "spatial_features": (2, 2023),
        "logits": (2, 1008),
    }
    torch.testing.assert_close(outputs["features"], pooled)
    torch.testing.assert_close(outputs["logits"], pooled @ network.fc.weight.T)
    by_place = torch.stack([spatial[:, channel] for channel in range(7)], dim=-1)  # (batch, height, width, channel)
    torch.testing.assert_close(outputs["spatial_features"], by_place.reshape(2, 17 * 17 * 7))
    # What it would be blind without: images differ, and so do places and channels.
    assert all((one - other).norm() > 0.1 * one.norm() for one, other in outputs.values())
    assert by_place.std(dim=(1, 2)).mean() > 0.2 * by_place.mean()
    assert by_place.std(dim=3).mean() > 0.2 * by_place.mean()


def test_outputs_equal_torch_fidelitys_bit_by_bit(inception, images, outputs) -> None:
    features, logits = inception.network(images)
    assert torch.equal(outputs["features"], features)
    assert torch.equal(outputs["logits"], logits)
    assert torch.equal(inception(images), features)
    assert inception.num_features == features.shape[1]


def test_calls_leave_nothing_behind_and_do_not_mix(inception, images, outputs) -> None:
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda image: extract_features(inception, image[None]), images))
    for name, values in outputs.items():
        torch.testing.assert_close(torch.cat([one[name] for one in both]), values)
    assert not any(module._forward_hooks for module in inception.modules())
    assert not any(values.requires_grad for values in both[0].values())


def test_inception_stays_in_evaluation_mode(inception, images, outputs) -> None:
    assert not any(module.training for module in inception.train().modules())
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract_features(inception, images)["logits"], outputs["logits"])


def test_loading_draws_no_random_numbers(weights) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    load_feature_extractor("inception", str(weights))
    assert torch.equal(torch.rand(2), expected)


def test_weights_as_safetensors_and_from_the_cache(weights, inception, tmp_path, monkeypatch) -> None:
    state_dict = inception.network.state_dict()
    save_file(state_dict, tmp_path / "inception.safetensors")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    shutil.copy(weights, cached)
    for extractor in (InceptionFeatures(str(tmp_path / "inception.safetensors")), InceptionFeatures()):
        loaded = extractor.network.state_dict()
        assert loaded.keys() == state_dict.keys()
        assert all(torch.equal(loaded[name], state_dict[name]) for name in loaded)


def test_torch_fidelity_which_would_run_a_files_code_reads_none(weights, monkeypatch) -> None:
    load, calls = torch.serialization.load, []

    def recording_load(file, *args, **kwargs):
        calls.append((kwargs["weights_only"], isinstance(file, io.BytesIO)))
        return load(file, *args, **kwargs)

    monkeypatch.setattr("torch.load", recording_load)
    load_feature_extractor("inception", str(weights))
    assert calls == [(True, False), (False, True)]


def test_rfid_takes_inception(inception) -> None:
    metrics = ReconstructionMetrics(feature_extractor=inception)
    samples = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metrics.update(samples, samples.flip(3))
    expected = inception(rgb_bytes(samples)).double().sum(dim=0)
    torch.testing.assert_close(metrics.rfid.real_features_sum, expected)


class Malicious:
    def __reduce__(self):
        return (eval, ("1 + 1",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.zeros(2)}, r"must be those of torch-fidelity's Inception:.*Conv2d_1a_3x3"),
        ({"fc.weight": Malicious()}, "cannot be read as weights and nothing else: it refers to eval"),
        (b"no weights at all", "cannot be used.*cannot be read as weights"),
    ],
)
def test_files_that_are_no_weights(content, message: str, tmp_path, monkeypatch) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, pickle_module=pickle)
    monkeypatch.setattr("builtins.eval", lambda code: pytest.fail("the file's code was run"))
    with pytest.raises(ValueError, match=message):
        load_feature_extractor("inception", str(path))


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_downloaded(error: Exception, tmp_path, monkeypatch) -> None:
    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        assert url.endswith(f"-{hash_prefix}.pth")
        assert len(hash_prefix) == 8
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with pytest.raises(ValueError, match=r"cannot be downloaded.*give its path as `feature_extractor_weights`"):
        load_feature_extractor("inception")


def test_feature_extractors_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_features.py").write_text(
        "import torch\n\ndef make(weights=None):\n    model = torch.nn.Linear(1, 1)\n    model.weights = weights\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    extractor = load_feature_extractor("my_features:make")
    assert extractor.weights is None
    assert not extractor.training
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    weights = str(tmp_path / "my_features.py")
    assert load_feature_extractor("my_features:make", weights).weights == weights


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet", None, "inception or package.module:callable"),
        ("no_such_package:make", None, "cannot be imported: No module named 'no_such_package'"),
        ("torch.nn:NoSuchThing", None, "cannot be imported"),
        ("builtins:dict", None, "must give a torch.nn.Module"),
        ("inception", "no/such/file.pth", "must be a file"),
        ("inception", None, "pip install torch-fidelity"),
    ],
)
def test_feature_extractors_that_cannot_be_had(name: str, weights: str | None, message: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=message):
        load_feature_extractor(name, weights)


class Means(nn.Module):
    """Three features of an image: the means of its channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().mean(dim=(2, 3))


class Given(Means):
    """Gives what it was made with, beside its features or in their place."""

    def __init__(self, given):
        super().__init__()
        self.given = given

    def outputs(self, images: torch.Tensor):
        return {"features": self(images), **self.given} if isinstance(self.given, dict) else self.given


def test_extractors_of_users_give_one_output_or_several(images) -> None:
    (features,) = extract_features(Means(), images).values()
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, images.float().mean(dim=(2, 3)))
    found = extract_features(Given({"logits": torch.ones(2, 5, dtype=torch.bfloat16)}), images)
    assert torch.equal(found["features"], features)
    assert torch.equal(found["logits"], torch.ones(2, 5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit": torch.ones(2, 5)}, r"'logits'.*got \['features', 'logit'\]"),
        (torch.ones(2, 5), "must give a dictionary.*got Tensor"),
        ({"logits": torch.ones(2, 5, 1)}, r"`logits` of shape \(2, numbers\), got \(2, 5, 1\)"),
        ({"features": torch.ones(3, 5)}, r"`features` of shape \(2, numbers\), got \(3, 5\)"),
        ({"logits": torch.ones(2, 0)}, r"got \(2, 0\)"),
        ({"logits": [1, 2]}, "got list"),
        ({"spatial_features": torch.tensor([[1.0], [torch.inf]])}, "`spatial_features` that are not finite"),
    ],
)
def test_outputs_that_are_none(given, message: str, images) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(Given(given), images)


@pytest.mark.parametrize("wrong", [torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)])
def test_images_that_are_none(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`images` must be a uint8 tensor \(batch, 3, height, width\), got \(2, "):
        extract_features(Means(), wrong)


def test_full_precision_ends_autocast_and_puts_settings_back() -> None:
    matrices = torch.backends.cuda.matmul
    before = matrices.fp32_precision
    try:
        matrices.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert matrices.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert matrices.fp32_precision == "tf32"
    finally:
        matrices.fp32_precision = before


def test_rgb_bytes_round_cut_and_choose_channels() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 1.5]).view(1, 1, 1, 6)
    assert rgb_bytes(values)[0, :, 0].tolist() == [[0, 0, 128, 255, 255, 255]] * 3
    levels = torch.linspace(-1, 1, 5).view(1, 5, 1, 1)
    assert [rgb_bytes(levels[:, :number]).flatten().tolist() for number in (2, 3, 4, 5)] == [
        [0, 0, 0],
        *[[0, 64, 128]] * 3,
    ]
