# SPDX-License-Identifier: Apache-2.0
"""Saving and loading the tokenizer as transformers does it, in every precision."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModel

import hf_var
from hf_var import VQVAEModel
from loading_checks import incomplete


HALVES = [torch.bfloat16, torch.float16]


def assert_same_weights(model, expected):
    weights, expected = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.device.type == "cpu"
        assert torch.equal(weight, expected[name]), name


def assert_exact_quantizer(model, expected, codes, features):
    """`model` may compute its convolutions in any precision, but its quantizer gives the same numbers as `expected`'s."""
    assert {tensor.dtype for tensor in model.quantizer.state_dict().values()} == {torch.float32}
    assert_same_weights(model.quantizer, expected.quantizer)
    assert torch.equal(model.teacher_forcing(codes), expected.teacher_forcing(codes))
    assert torch.equal(model.quantizer(features).codes, expected.quantizer(features).codes)
    assert torch.equal(model.next_scale(None, codes[:, :1], 0)[0], expected.next_scale(None, codes[:, :1], 0)[0])


@pytest.fixture(scope="module")
def folder(vqvae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqvae")
    vqvae.save_pretrained(folder)
    return folder


def test_round_trip(vqvae, folder):
    loaded, report = VQVAEModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training
    assert_same_weights(loaded, vqvae)


def test_sharded_round_trip(vqvae, tmp_path):
    vqvae.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(VQVAEModel.from_pretrained(tmp_path), vqvae)


def test_auto_classes(vqvae, folder):
    assert type(AutoConfig.from_pretrained(folder)) is type(vqvae.config)
    assert_same_weights(AutoModel.from_pretrained(folder), vqvae)
    assert isinstance(AutoModel.from_config(vqvae.config), VQVAEModel)


@torch.no_grad()
def test_fresh_interpreter(vqvae, folder, images, codes, tmp_path):
    safetensors.torch.save_file({"images": images}, tmp_path / "images.safetensors")
    script = """
        import sys
        import hf_var, safetensors.torch
        from transformers import AutoModel
        model = AutoModel.from_pretrained(sys.argv[1])
        codes = model.encode(safetensors.torch.load_file(sys.argv[2] + "/images.safetensors")["images"]).codes
        sample = model.decode(codes).sample.detach()
        safetensors.torch.save_file({"codes": codes, "sample": sample}, sys.argv[2] + "/results.safetensors")
    """
    source = os.path.dirname(os.path.dirname(hf_var.__file__))
    code = "\n".join(line.strip() for line in script.strip().splitlines())
    environment = {**os.environ, "PYTHONPATH": source}
    subprocess.run([sys.executable, "-c", code, folder, tmp_path], check=True, env=environment, timeout=200)
    results = safetensors.torch.load_file(tmp_path / "results.safetensors")
    assert torch.equal(results["codes"], codes)
    torch.testing.assert_close(results["sample"], vqvae.decode(codes).sample, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_loading_in_half_precision_keeps_the_quantizer_exact(vqvae, folder, images, codes, dtype):
    features = vqvae.encode(images).features
    loaded = VQVAEModel.from_pretrained(folder, dtype=dtype)
    assert loaded.encoder.conv_in.weight.dtype == loaded.post_quant_conv.weight.dtype == dtype
    assert_exact_quantizer(loaded, vqvae, codes, features)
    output = loaded(images)
    assert output.features.dtype == output.sample.dtype == dtype
    assert output.latents.dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(loaded.decode(codes).sample.float(), vqvae.decode(codes).sample, rtol=0, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_model_built_in_half_precision_has_an_exact_quantizer(vqvae, images, codes, dtype):
    model = AutoModel.from_config(vqvae.config, dtype=dtype)
    assert model.encoder.conv_in.weight.dtype == dtype
    assert 0.5 / 32 < model.codebook.vectors.abs().max() <= 1 / 32
    assert model.encode(images).codes.shape == codes.shape
    assert model(images).loss.dtype == torch.float32
    # Its weights may come from a state dict in half precision, too, whose tensors it takes over as they are.
    rounded = {name: weight.to(dtype) for name, weight in vqvae.state_dict().items()}
    expected = type(vqvae)(vqvae.config)
    expected.load_state_dict(rounded)
    model.load_state_dict(rounded, assign=True)
    assert model.encoder.conv_in.weight.dtype == dtype
    assert_exact_quantizer(model, expected, codes, vqvae.encode(images).features)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_survives_saving(folder, tmp_path, dtype):
    loaded = VQVAEModel.from_pretrained(folder, dtype=dtype)
    loaded.save_pretrained(tmp_path)
    again = VQVAEModel.from_pretrained(tmp_path)
    assert {name: weight.dtype for name, weight in again.state_dict().items()} == {
        name: weight.dtype for name, weight in loaded.state_dict().items()
    }
    assert_same_weights(again, loaded)


@torch.no_grad()
@pytest.mark.parametrize(
    "cast",
    [lambda model: model.to(torch.bfloat16), lambda model: model.half(), lambda model: model.double()],
    ids=["to(bfloat16)", "half", "double"],
)
def test_casting_keeps_the_quantizer_exact(make_vqvae, vqvae, images, codes, cast):
    features = vqvae.encode(images).features
    model = cast(make_vqvae())
    assert model.encoder.conv_in.weight.dtype != torch.float32
    assert_exact_quantizer(model, vqvae, codes, features)
    assert model(images).sample.dtype == model.encoder.conv_in.weight.dtype
    # And back: the codebook was never rounded.
    assert_exact_quantizer(model.float(), vqvae, codes, features)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_quantizes_in_full_precision(vqvae, images, codes, dtype):
    with torch.autocast("cpu", dtype=dtype):
        output = vqvae(images)
        encoded = vqvae.encode(images)
        inputs = vqvae.teacher_forcing(codes)
        latents, _ = vqvae.next_scale(None, codes[:, :1], 0)
        mixed = vqvae.mix_code_vectors(torch.eye(32))
    assert output.features.dtype == dtype
    expected = vqvae.quantizer(output.features, return_loss=True)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(encoded.codes, expected.codes)
    assert torch.equal(encoded.latents, expected.latents)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(inputs, vqvae.teacher_forcing(codes))
    assert torch.equal(latents, vqvae.next_scale(None, codes[:, :1], 0)[0])
    assert torch.equal(mixed, vqvae.quantizer.codebook.weight)


def test_what_a_file_lacks_is_initialised(folder, tmp_path, vqvae):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name.startswith("encoder.")}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = incomplete(VQVAEModel).from_pretrained(tmp_path)
    assert torch.equal(loaded.encoder.conv_in.weight, vqvae.encoder.conv_in.weight)
    assert torch.equal(loaded.quantizer.codebook.running_hits, torch.zeros(3, 32))
    codebook = loaded.quantizer.codebook.weight
    assert 0.5 / 32 < codebook.abs().max() <= 1 / 32
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Conv2d) and not name.startswith("encoder."):
            limit = module.weight[0].numel() ** -0.5
            assert 0.8 * limit < module.weight.abs().max() <= limit, name
            assert 0 < module.bias.abs().max() <= limit, name
        if isinstance(module, torch.nn.GroupNorm) and not name.startswith("encoder."):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


def test_shapes_without_weights(tiny_config):
    with torch.device("meta"):
        model = VQVAEModel(tiny_config())
        output = model(torch.empty(2, 3, 8, 8))
    assert output.sample.shape == (2, 3, 8, 8)
    assert output.codes.shape == (2, 21)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_saved_config_names_the_model(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "hf_var_vqvae"
    assert config["architectures"] == ["VQVAEModel"]
    assert config["patch_nums"] == [1, 2, 4]
