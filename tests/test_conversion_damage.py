# SPDX-License-Identifier: Apache-2.0
"""Conversion of wrapped, nested and damaged checkpoints: the same weights or a `ValueError`, soon."""

import argparse
import contextlib
import logging
import random
import re
import time
import zipfile

import pytest
import safetensors.torch
import torch

from hf_var import TextVARTransformer, VARConfig, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.cli import main
from hf_var.conversion import (
    export_official_var,
    export_official_vqvae,
    export_rqvae,
    export_switti,
    export_taming_vqgan,
    load_official_var,
    load_official_vqvae,
    load_rqvae,
    load_switti,
    load_taming_vqgan,
)
from parity import assert_same_tensors, make_contrast
from priors.text import text_config


# What no weight of ours holds.
DERIVED = re.compile(r"lvl_1L|attn_bias_for_masking|.*zero_k_bias|.*ema_vocab_hit_SV")
MUTATIONS_OF_A_FILE = 40


def load_vqvae(checkpoint):
    return export_official_vqvae(load_official_vqvae(checkpoint, patch_nums=(1, 2)))


def load_var(checkpoint):
    return export_official_var(load_official_var(checkpoint))


def load_text_var(checkpoint):
    return export_switti(load_switti(checkpoint, is_causal=False, num_attention_heads=2))


def load_vqgan(checkpoint):
    return export_taming_vqgan(load_taming_vqgan(checkpoint, patch_nums=(2,)))


def load_residual_vqvae(checkpoint):
    return export_rqvae(load_rqvae(checkpoint, patch_nums=(2, 2)))


def tiny_vqvae(**fields):
    shape = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "latent_channels": 4}
    return make_contrast(VQVAEModel(VQVAEConfig(codebook_size=16, **shape, **fields)))


@pytest.fixture(scope="module")
def vqvae():
    return export_official_vqvae(tiny_vqvae(patch_nums=(1, 2)))


@pytest.fixture(scope="module")
def vqgan():
    fields = {"quant_conv_kernel_size": 1, "refinement_ratio": 0.0, "encoder_out_channels": 6}
    return export_taming_vqgan(tiny_vqvae(patch_nums=(2,), attention_levels=[0], **fields))


@pytest.fixture(scope="module")
def rqvae():
    fields = {"quant_conv_kernel_size": 1, "refinement_ratio": 0.0, "codebook_averages": True}
    return export_rqvae(tiny_vqvae(patch_nums=(2, 2), **fields))


@pytest.fixture(scope="module")
def var():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 10}
    config = VARConfig(latent_channels=4, codebook_size=16, patch_nums=(1, 2), **sizes)
    return export_official_var(make_contrast(VARTransformer(config)))


@pytest.fixture(scope="module")
def switti():
    sizes = {"hidden_size": 16, "patch_nums": (1, 2), "codebook_size": 16}
    return export_switti(make_contrast(TextVARTransformer(text_config(**sizes))))


LOADERS = {
    "vqvae": load_vqvae,
    "var": load_var,
    "vqgan": load_vqgan,
    "rqvae": load_residual_vqvae,
    "switti": load_text_var,
}


@pytest.fixture(params=LOADERS)
def load_and_weights(request):
    return LOADERS[request.param], request.getfixturevalue(request.param)


# --- wrapped and nested ----------------------------------------------------------------------------------------------


def with_prefix(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_prefix_of_all_keys_is_removed(load_and_weights, tmp_path, caplog, prefix):
    load, weights = load_and_weights
    torch.save(with_prefix(weights, prefix), tmp_path / "file.pth")
    with caplog.at_level(logging.INFO):
        assert_same_tensors(load(tmp_path / "file.pth"), weights)
    assert "prefix 'module.'" in caplog.text or "prefix '_orig_mod.'" in caplog.text


def test_a_prefix_of_some_keys_is_refused(load_and_weights, tmp_path, capsys):
    load, weights = load_and_weights
    first, *others = weights
    mixed = {**with_prefix({name: weights[name] for name in others}, "module."), first: weights[first]}
    with pytest.raises(
        ValueError, match=re.escape(f"prefix 'module.' before some of its keys only, not before ['{first}']")
    ):
        load(mixed)
    torch.save(mixed, tmp_path / "file.pth")
    for option in ("--vqvae", "--var", "--switti"):
        assert main(["convert", option, str(tmp_path / "file.pth"), "--output", str(tmp_path / "out")]) == 2
        assert "prefix 'module.'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["model"], ["state_dict"], ["model", "state_dict"], ["trainer"]])
def test_a_nested_state_dict_is_found(load_and_weights, tmp_path, names):
    load, weights = load_and_weights
    content = with_prefix(weights, "module.")
    if names == ["trainer"]:
        content = {name: {"state_dict": content, "step": 3} for name in ("vae_local", "var_wo_ddp", *LOADERS)}
    for name in reversed(names):
        optimizer = {"state": {0: {"step": torch.zeros(())}}, "param_groups": [{"lr": 1e-3}]}
        content = {"epoch": 3, "optimizer": optimizer, name: content, "args": argparse.Namespace(lr=1e-3, name="run")}
    torch.save(content, tmp_path / "file.pth")
    assert_same_tensors(load(tmp_path / "file.pth"), weights)
    assert_same_tensors(load(content), weights)


def test_a_state_dict_inside_itself(load_and_weights):
    content = {}
    content["model"] = content
    with pytest.raises(ValueError, match="less than 8 levels deep"):
        load_and_weights[0](content)


# --- absurd sizes and tensors ----------------------------------------------------------------------------------------


def changes(name):
    """Tensors that are no weight, made of a weight."""
    return {
        "integers": lambda weight: weight.long(),
        "complex": lambda weight: weight.cfloat(),
        "8 bits": lambda weight: weight.to(torch.float8_e4m3fn),
        "sparse": lambda weight: weight.to_sparse(),
        "quantized": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "empty": lambda weight: weight[:0],
        "a number": lambda weight: weight.flatten()[0].clone(),
        "endless": lambda weight: torch.zeros(1).expand(10**9, *weight.shape[1:]),
        "nan": lambda weight: weight.clone().index_fill_(0, torch.tensor([0]), torch.nan),
        "infinite": lambda weight: weight.clone().index_fill_(0, torch.tensor([0]), torch.inf),
    }[name]


WEIGHTS = ["quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.bias"]
WEIGHTS += ["pos_1LC", "lvl_embed.weight", "head.weight", "blocks.1.attn.mat_qkv.weight", "blocks.0.ffn.fc1.weight"]
WEIGHTS += ["crop_embed.weight", "blocks.1.cross_attn.to_kv.weight", "blocks.0.ffn_norm1.weight"]
KINDS = ["integers", "complex", "8 bits", "sparse", "quantized", "empty", "a number", "endless", "nan", "infinite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_weights(vqvae, var, switti, tmp_path, name, kind):
    kinds = {load_vqvae: vqvae, load_var: var, load_text_var: switti}
    load, weights = next((load, weights) for load, weights in kinds.items() if name in weights)
    content = {**weights, name: changes(kind)(weights[name])}
    with pytest.raises(ValueError, match=re.escape(name)):
        load(content)
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=re.escape(name)):
        load(tmp_path / "file.pth")


@pytest.mark.parametrize(
    "name", ["blocks.100000000.attn.q_bias", "blocks.3.attn.q_bias", "blocks." + "9" * 5000 + ".x"]
)
def test_layers_without_the_ones_before(var, switti, name):
    for load, weights in ((load_var, var), (load_text_var, switti)):
        with pytest.raises(ValueError, match="must number its keys .* without a gap"):
            load({**weights, name: torch.zeros(16)})


@pytest.mark.parametrize("name", ["encoder.down.90000000.block.0.x", "encoder.down.0.block.90000000.x"])
def test_levels_without_the_ones_before(vqvae, name):
    with pytest.raises(ValueError, match="must number its keys .* without a gap"):
        load_vqvae({**vqvae, name: torch.zeros(16)})


@pytest.mark.parametrize("value", [10**9, 2**62, -1])
def test_absurd_level_buffers(var, switti, value):
    levels = torch.tensor([[0, 1, 1, 1, value]])
    for content in (levels, levels.expand(10**4, -1).contiguous()):
        for load, weights in ((load_var, var), (load_text_var, switti)):
            with pytest.raises(ValueError, match="`patch_nums` cannot be inferred"):
                load({**weights, "lvl_1L": content})


def test_nothing():
    for load in LOADERS.values():
        with pytest.raises(ValueError, match="missing"):
            load({})


# --- damaged files ---------------------------------------------------------------------------------------------------


def test_a_damaged_weight_is_found_by_its_checksum(load_and_weights, tmp_path):
    load, weights = load_and_weights
    path = tmp_path / "file.pth"
    torch.save(weights, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="record '.*' is damaged"):
        load(path)


def test_compressed_files_are_not_unpacked(load_and_weights, tmp_path):
    load, weights = load_and_weights
    torch.save(weights, tmp_path / "file.pth")
    packed = zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "file.pth") as stored, packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match="record '.*' is compressed"):
        load(tmp_path / "packed.pth")


def changed_weights(weights, rng):
    """A state dict with one thing changed."""
    content, name = dict(weights), rng.choice(sorted(weights))
    tensor = content[name]
    change = rng.choice(["rename", "drop", "duplicate", "shape", "dtype", "value"])
    if change == "rename":
        content[rng.choice(["module.", "x", "blocks.70000000."]) + name] = content.pop(name)
    elif change == "drop":
        del content[name]
    elif change == "duplicate":
        digits = [str(rng.choice([7, 10**6, 10**12]))]
        content[re.sub(r"\d+", digits[0], name) if re.search(r"\d", name) else f"{name}.0"] = tensor.clone()
    elif change == "shape":
        shapes = [tensor[None], tensor.flatten(), tensor[:0], torch.cat([tensor, tensor]), tensor[..., 1:]]
        content[name] = rng.choice([*shapes, tensor.transpose(0, -1), tensor.flatten()[0]]).clone()
    elif change == "dtype":
        kinds = [torch.int64, torch.float16, torch.float64, torch.bool, torch.complex64, torch.uint8]
        content[name] = tensor.to(rng.choice(kinds))
    else:
        content[name] = torch.full_like(tensor, rng.choice([0, 10**9]))
        if tensor.is_floating_point() and rng.random() < 0.7:
            content[name].view(-1)[rng.randrange(tensor.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return content


def damage(path, rng):
    """Cut a file off, or flip bits of it, in safetensors in the header alone: nothing tells damaged weights there."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    else:
        end = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
        for _ in range(rng.choice([1, 1, 1, 8, 100])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(MUTATIONS_OF_A_FILE))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_damage_ends_in_the_same_weights_or_an_error(load_and_weights, tmp_path, suffix, seed):
    load, weights = load_and_weights
    rng = random.Random(seed)
    path = tmp_path / f"file{suffix}"
    content = weights if seed % 2 else changed_weights(weights, rng)
    if suffix == ".pth":
        torch.save(content, path)
    else:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    if seed % 2:
        damage(path, rng)
    begin = time.monotonic()
    loaded = None
    with contextlib.suppress(ValueError):
        loaded = load(path)
    if loaded is not None:
        names = [name for name in content if not DERIVED.fullmatch(name)]
        assert {name for name in loaded if not DERIVED.fullmatch(name)} == set(names)
        for name in names:
            assert torch.equal(loaded[name].float(), content[name].float()), name
    assert time.monotonic() - begin < 10
