# SPDX-License-Identifier: Apache-2.0
"""The kinds of files conversion reads, what it leaves alone, what it writes, and how much memory it takes."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch

import hf_var
from hf_var import VARConfig, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.conversion import export_official_var, export_official_vqvae, load_official_var, load_official_vqvae
from parity import assert_same_tensors, load_case, make_contrast


@pytest.fixture(scope="module")
def small_var():
    """An official state dict of five tokens and ten labels."""
    fields = {"num_labels": 10, "latent_channels": 4, "codebook_size": 16, "patch_nums": (1, 2)}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return export_official_var(make_contrast(VARTransformer(VARConfig(**fields, **sizes))))


def write_zip(weights, path):
    torch.save(weights, path)


def write_before_torch_1_6(weights, path):
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def write_trainer_checkpoint(weights, path):
    trainer = {"config": {"depth": 2}, "var_wo_ddp": weights, "vae_local": {"other": torch.zeros(1)}}
    torch.save({"args": "{}", "epoch": 3, "iter": 7, "trainer": trainer, "milestones": [1, 2]}, path)


def write_safetensors(weights, path):
    safetensors.torch.save_file(weights, path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_zip, "var.pth"),
        (write_before_torch_1_6, "var.pth"),
        (write_trainer_checkpoint, "ckpt.pth"),
        (write_safetensors, "var.safetensors"),
    ],
)
def test_files(small_var, tmp_path, write, name):
    write(small_var, tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
        assert_same_tensors(export_official_var(load_official_var(path)), small_var)


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_is_not_aliased(small_var, nested):
    weights = copy.deepcopy(small_var)
    model = load_official_var({"trainer": {"var_wo_ddp": weights}} if nested else weights)
    for tensor in weights.values():
        tensor.zero_()
    assert_same_tensors(export_official_var(model), small_var)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    assert all(not tensor.any() for tensor in weights.values())


def test_loading_changes_no_state_dict():
    weights = load_case("A").vqvae_weights
    names = set(weights)
    load_official_vqvae({name: weights[name] for name in names}, patch_nums=(2, 4))
    given = {name: tensor for name, tensor in weights.items() if name != "quantize.ema_vocab_hit_SV"}
    model = load_official_vqvae(given, patch_nums=(1, 2, 4))
    assert "quantize.ema_vocab_hit_SV" not in given
    # Usage statistics of another schedule are dropped.
    assert torch.equal(model.quantizer.codebook.running_hits, torch.zeros(3, 64))


def test_usable_like_a_trained_model(small_var):
    model = load_official_var(small_var)
    assert not model.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert all(not buffer.is_meta for buffer in model.buffers())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_files_in_half_precision(small_var, dtype):
    config = VQVAEConfig(base_channels=32, channel_multipliers=(1,), latent_channels=4, patch_nums=(1, 2))
    weights = export_official_vqvae(make_contrast(VQVAEModel(config)))
    vqvae = load_official_vqvae({name: tensor.to(dtype) for name, tensor in weights.items()}, patch_nums=(1, 2))
    assert vqvae.dtype == dtype
    assert {parameter.dtype for parameter in vqvae.quantizer.parameters()} == {torch.float32}
    assert vqvae(torch.zeros(1, 3, 2, 2)).sample.dtype == dtype
    # Here even the level buffer is no longer of integers.
    var = load_official_var({name: tensor.to(dtype) for name, tensor in small_var.items()})
    assert {parameter.dtype for parameter in var.parameters()} == {dtype}
    assert var.config.patch_nums == [1, 2]


@torch.no_grad()
def test_saving_a_converted_transformer(small_var, tmp_path):
    # Query, key and value are views of one official matrix, and the file is still mapped while it is saved.
    torch.save(small_var, tmp_path / "var.pth")
    model = load_official_var(tmp_path / "var.pth")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size < 4 * numel + 10_000
    for folder in ("whole", "sharded"):
        loaded, report = VARTransformer.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values()), report
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        assert_same_tensors(export_official_var(loaded), small_var)


def test_training_a_converted_transformer_changes_no_neighbour(small_var, tmp_path):
    torch.save(small_var, tmp_path / "var.pth")
    model = load_official_var(tmp_path / "var.pth")
    attention = model.layers[0].attention
    with torch.no_grad():
        attention.k_proj.weight.zero_()
    rows = small_var["blocks.0.attn.mat_qkv.weight"].chunk(3)
    assert torch.equal(attention.q_proj.weight, rows[0])
    assert torch.equal(attention.v_proj.weight, rows[2])
    # Nor the file.
    assert_same_tensors(export_official_var(load_official_var(tmp_path / "var.pth")), small_var)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory with Linux's /proc")
def test_conversion_holds_one_copy(tmp_path):
    fields = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "patch_nums": (1, 2)}
    with torch.device("meta"):
        model = VARTransformer(VARConfig(num_labels=10, **fields))
    weights = {name: torch.zeros(tensor.shape) for name, tensor in export_official_var(model).items()}
    weights["lvl_1L"] = torch.tensor([[0, 1, 1, 1, 1]])
    torch.save(weights, tmp_path / "var.pth")
    script = """
        import sys
        from hf_var.conversion import load_official_var

        def memory(field):
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # forget the peak of the imports
        before, private = memory("VmRSS"), memory("RssAnon")
        model = load_official_var(sys.argv[1] + "/var.pth")
        loaded = memory("RssAnon") - private
        model.save_pretrained(sys.argv[1] + "/converted")
        print(loaded, memory("VmHWM") - before)
    """
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(hf_var.__file__))}
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path]
    output = subprocess.run(command, check=True, env=environment, timeout=280, stdout=subprocess.PIPE).stdout
    loaded, peak = map(int, output.split()[-2:])
    size = (tmp_path / "var.pth").stat().st_size
    assert size > 100_000_000
    assert loaded < 0.1 * size  # the weights stay in the file
    assert peak < 1.5 * size
