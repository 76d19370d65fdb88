# SPDX-License-Identifier: Apache-2.0
"""What conversion refuses, and whether it says why."""

import argparse
import functools
import os
import pickle
import re

import pytest
import torch

from hf_var import VARConfig, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.conversion import (
    export_official_var,
    export_official_vqvae,
    load_official_var,
    load_official_vqvae,
    load_pixelcnn,
    load_pixelsnail,
    load_vqvae2,
)
from parity import load_case


@pytest.fixture(scope="module")
def official_vqvae():
    config = VQVAEConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=4,
        codebook_size=16,
        patch_nums=(1, 2),
    )
    return export_official_vqvae(VQVAEModel(config))


def make_official_var(shared_adaln=False):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "shared_adaln": shared_adaln}
    config = VARConfig(num_labels=10, latent_channels=4, codebook_size=16, patch_nums=(1, 2), **sizes)
    return export_official_var(VARTransformer(config))


@pytest.fixture(scope="module")
def official_var():
    return make_official_var()


load_vqvae = functools.partial(load_official_vqvae, patch_nums=(1, 2))
load_var = functools.partial(load_official_var, patch_nums=(1, 2))


@pytest.fixture(params=["vqvae", "var", "var_with_shared_adaln"])
def load_and_weights(request, official_vqvae, official_var):
    """A loader, told what no state dict needs to tell, and a state dict which it takes."""
    if request.param == "vqvae":
        return load_vqvae, official_vqvae
    return load_var, official_var if request.param == "var" else make_official_var(shared_adaln=True)


DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def without(weights, name):
    return {other: tensor for other, tensor in weights.items() if other != name}


# --- files -----------------------------------------------------------------------------------------------------------


LOADERS = pytest.mark.parametrize("load", [load_official_vqvae, load_official_var])


@LOADERS
def test_missing_file(load, tmp_path):
    with pytest.raises(ValueError, match="`checkpoint` must be an existing file.*var_d16.pth"):
        load(tmp_path / "var_d16.pth")
    with pytest.raises(ValueError, match="`checkpoint` must be an existing file"):
        load(tmp_path)


@LOADERS
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file(load, official_vqvae, tmp_path, share, zipped):
    path = tmp_path / "vae.pth"
    torch.save(official_vqvae, path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"`checkpoint` '.*vae.pth' cannot be read as weights"):
        load(path)


@LOADERS
@pytest.mark.parametrize("name", ["readme.txt", "vae.pth", "vae.safetensors"])
def test_text_file(load, tmp_path, name):
    (tmp_path / name).write_text("These are no weights.\n" * 100)
    with pytest.raises(ValueError, match=f"`checkpoint` '.*{name}' cannot be read as weights"):
        load(tmp_path / name)


class Foreign:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@LOADERS
@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: argparse.Namespace(value=value)])
def test_foreign_objects_are_not_executed(load, official_vqvae, tmp_path, wrap, by_torch):
    path, trace = tmp_path / "vae.pth", tmp_path / "executed"
    if by_torch:
        torch.save({**official_vqvae, "extra": wrap(Foreign(trace))}, path)
    else:
        path.write_bytes(pickle.dumps({"extra": wrap(Foreign(trace))}, protocol=2))
    with pytest.raises(ValueError, match="`checkpoint` .* cannot be read as weights and nothing else") as error:
        load(path)
    assert not trace.exists()
    assert "refers to" in str(error.value)
    assert "mkdir" in str(error.value)
    # No advice to switch the protection off.
    assert "weights_only" not in str(error.value)


@LOADERS
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "must hold a dictionary of tensors by name, got list"),
        (torch.zeros(2), "must hold a dictionary of tensors by name, got Tensor"),
        ({"model": {"weight": torch.zeros(2)}}, r"the keys \[.*\] are missing, and it holds \['weight'\]"),
        ({"weight": torch.zeros(2), "epoch": 3}, r"got \['epoch'\]"),
        ({3: torch.zeros(2)}, r"got \['3'\]"),
        ({"trainer": {"config": {}}}, r"official trainer has no 'va.*it holds \['config'\]"),
        ({"trainer": {"var_wo_ddp": 3, "vae_local": 3}}, "must hold a dictionary of tensors by name, got int"),
        ({}, r"the keys \[.*\] are missing, and it holds \[\]"),
    ],
)
def test_files_without_a_state_dict(load, tmp_path, content, message):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file.pth")
    if isinstance(content, dict):
        with pytest.raises(ValueError, match=message):
            load(content)


# --- state dicts -----------------------------------------------------------------------------------------------------


def test_one_model_given_as_the_other(official_vqvae, official_var):
    with pytest.raises(ValueError, match=r"not an official VAR transformer.*'pos_1LC'.* missing.* holds .*'decoder"):
        load_official_var(official_vqvae)
    with pytest.raises(ValueError, match=r"not an official VQVAE.*'encoder.conv_in.weight'.* missing.*'attn_bias_for"):
        load_official_vqvae(official_var)


def test_any_missing_key(load_and_weights):
    load, weights = load_and_weights
    for name in weights:
        if name.endswith(DERIVED):
            load(without(weights, name))
        else:
            with pytest.raises(ValueError, match=f"{name}.* missing|missing keys .*{name}.* left over"):
                load(without(weights, name))


def test_any_wrong_shape(load_and_weights):
    load, weights = load_and_weights
    taken = []
    # One of each kind, whatever its layer.
    for name in {re.sub(r"\d+", "0", name): name for name in weights}.values():
        tensor = weights[name]
        # Another dimension, a row more, and as many elements in another order.
        for changed in (tensor[None], torch.cat([tensor, tensor[-1:]]), tensor.transpose(0, -1).contiguous()):
            if changed.shape != tensor.shape and not name.endswith(DERIVED):
                try:
                    load({**weights, name: changed})
                except ValueError:
                    continue
                taken.append((name, *changed.shape))
    assert taken == ([("class_emb.weight", 12, 16)] if "pos_1LC" in weights else [])  # a class more is nothing wrong


def test_wrong_shape_is_named(official_vqvae, official_var):
    wrong = {**official_vqvae, "decoder.norm_out.weight": torch.zeros(31)}
    with pytest.raises(
        ValueError, match=r"VQVAE configuration: decoder.norm_out.weight has the shape \(31,\).*\(32,\)"
    ):
        load_vqvae(wrong)
    wrong = {**official_var, "blocks.1.attn.mat_qkv.weight": torch.zeros(47, 16)}
    with pytest.raises(ValueError, match=r"mat_qkv.weight has the shape \(47, 16\), layers.1.*needs \(16, 16\)"):
        load_official_var(wrong)


def test_extra_keys(load_and_weights):
    load, weights = load_and_weights
    with pytest.raises(ValueError, match=r"missing keys \[\], left over \['loss.logvar'\]"):
        load({**weights, "loss.logvar": torch.zeros(1)})
    many = {f"discriminator.{index}": torch.zeros(1) for index in range(20)}
    with pytest.raises(ValueError, match=r"left over \['discriminator.0', .*\] and 12 more"):
        load({**weights, **many})


# --- what cannot be inferred -----------------------------------------------------------------------------------------


def test_unknown_schedule_of_a_tokenizer(official_vqvae):
    with pytest.raises(ValueError, match="`patch_nums` cannot be inferred from this VQVAE of 2 scales"):
        load_official_vqvae(official_vqvae)
    with pytest.raises(ValueError, match="`patch_nums` cannot be inferred from this VQVAE of an unknown number of"):
        load_official_vqvae(without(official_vqvae, "quantize.ema_vocab_hit_SV"))


def test_unknown_schedule_of_a_transformer(official_var):
    with pytest.raises(ValueError, match="`patch_nums` cannot be inferred from this VAR transformer of 5 tokens"):
        load_official_var(without(official_var, "lvl_1L"))
    with pytest.raises(ValueError, match="`patch_nums` cannot be inferred"):
        load_official_var({**official_var, "lvl_1L": torch.tensor([[0, 0, 1, 1, 1]])})
    assert load_official_var(without(official_var, "lvl_1L"), patch_nums=(1, 2)).config.patch_nums == [1, 2]
    with pytest.raises(ValueError, match=r"pos_1LC has the shape \(1, 5, 16\).*\(10, 16\)"):
        load_official_var(official_var, patch_nums=(1, 3))


@pytest.mark.parity
def test_unknown_number_of_heads():
    with pytest.raises(ValueError, match="`num_attention_heads` cannot be inferred.*96.*num_attention_heads="):
        load_official_var(load_case("B").var_weights)


def test_overrides(official_vqvae, official_var):
    with pytest.raises(ValueError, match="`patch_num` is not a field of VQVAEConfig. Did you mean `patch_nums`?"):
        load_official_vqvae(official_vqvae, patch_num=(1, 2))
    with pytest.raises(ValueError, match="`heads` is not a field of VARConfig"):
        load_official_var(official_var, heads=2)
    with pytest.raises(ValueError, match=r"class_emb.weight has the shape \(11, 16\)"):
        load_official_var(official_var, num_labels=7)
    config = load_official_var(official_var, class_dropout_prob=0.25, id2label={n: str(n) for n in range(10)}).config
    assert config.class_dropout_prob == 0.25
    assert config.id2label[9] == "9"


@pytest.mark.parametrize("load", [load_official_vqvae, load_official_var, load_pixelcnn, load_pixelsnail, load_vqvae2])
@pytest.mark.parametrize("checkpoint", [3, None, b"var.pth", [], torch.zeros(2)], ids=repr)
def test_neither_a_path_nor_a_state_dict(load, checkpoint):
    message = f"`checkpoint` must be a path or a state dict, got {type(checkpoint).__name__}"
    arguments = {"image_size": 16} if load is load_vqvae2 else {}
    with pytest.raises(ValueError, match=message):
        load(checkpoint, **arguments)
