# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Switti to our models and back: without losing a bit, with what their `config.json` says."""

import json

import pytest
import safetensors.torch
import torch

from hf_var import TextVARTransformer
from hf_var.conversion import ORIGINS, export_switti, load_switti
from parity import assert_same_tensors, load_switti_case, make_contrast
from priors.text import text_config


MASK = "attn_bias_for_masking"
RELEASED = {"Switti-512": False, "Switti-512-AR": True, "Switti-1024": False, "Switti-1024-AR": True}


@pytest.fixture(scope="module")
def case():
    return load_switti_case()


@pytest.fixture(scope="module")
def facts(case):
    return json.loads((case.folder / "facts.json").read_text(encoding="utf-8"))


def tiny_weights(**fields):
    """The official state dict of two layers of width 128, so that the heads follow from it."""
    sizes = {"hidden_size": 128, "patch_nums": (1, 2, 3), **fields}
    return export_switti(make_contrast(TextVARTransformer(text_config(**sizes))))


@pytest.fixture(scope="module")
def weights():
    return tiny_weights()


def arguments(**changes):
    """The `config.json` of an official model of two layers."""
    known = {"depth": 2, "reso": 512, "rope": True, "rope_size": 128, "rope_theta": 10000}
    return {**known, "use_ar": False, "use_crop_cond": True, "use_swiglu_ffn": True, **changes}


def write(folder, weights, content=None):
    """A file of weights and, if there is a content, a `config.json` beside it."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text, encoding="utf-8")
    return path


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["ar0_crop0", "ar0_crop1", "ar1_crop0", "ar1_crop1"])
def test_there_and_back(case, variant):
    model = case.transformer(variant)
    assert not model.training
    exported = export_switti(model)
    mask = exported.pop(MASK)
    expected = case.weights["switti"]
    if variant.endswith("crop0"):
        expected = {name: tensor for name, tensor in expected.items() if "crop" not in name}
    assert_same_tensors(exported, expected)
    # The buffer that the file lacks: minus infinity where a token does not see another.
    assert (mask.shape, mask.dtype) == ((1, 1, 66, 66), torch.float32)
    assert torch.equal(mask[0, 0] == 0, case.expected[f"mask/{variant[:3]}"].bool())
    assert torch.equal(mask.isinf(), mask != 0)
    assert_same_tensors(
        export_switti(load_switti({**exported, MASK: mask}, **kept_fields(model))), exported | {MASK: mask}
    )


def kept_fields(model):
    return {name: getattr(model.config, name) for name in ("is_causal", "num_attention_heads")}


def test_fields_of_the_weights(case):
    config = case.transformer("ar1_crop1").config
    official = case.manifest["switti_args"]
    assert config.patch_nums == official["patch_nums"]
    assert (config.hidden_size, config.num_hidden_layers) == (official["embed_dim"], official["depth"])
    assert (config.cross_attention_dim, config.pooled_projection_dim) == (
        official["context_dim"],
        official["pooled_dim"],
    )
    assert (config.feed_forward_size, config.head_dim) == (official["ffn_hidden"], official["head_dim"])
    assert (config.codebook_size, config.latent_channels) == (official["V"], official["Cvae"])
    assert config.is_causal
    assert config.crop_conditioning
    assert not case.transformer("ar0_crop0").config.crop_conditioning


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models(facts, name):
    """From names and shapes, without memory: every weight finds its place, and an export has the released bytes."""
    released = facts["models"][name]
    keys, changes = facts["models"]["Switti-512"]["keys"], {}
    if name != "Switti-512":
        keys, changes = facts["models"][released["keys"]["as"]]["keys"], released["keys"]["except"]
    shapes = {}
    for key, (shape, dtype, _) in {**keys, **changes}.items():
        numbers = range(released["config"]["depth"]) if "{i}" in key else [0]
        shapes |= {key.replace("{i}", str(number)): (shape, getattr(torch, dtype)) for number in numbers}
    assert len(shapes) == released["tensors"]
    empty = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in shapes.items()}
    model = load_switti(empty, is_causal=RELEASED[name])
    resolution = str(released["config"]["reso"])
    assert model.config.patch_nums == facts["schedules"][resolution]["patch_nums"]
    assert (model.config.length, model.config.num_attention_heads) == (released["L"], 30)
    weights = model.state_dict().values()
    assert sum(tensor.numel() for tensor in weights) == released["parameters"]
    assert sum(tensor.nbytes for tensor in weights) == released["bytes_without_buffers"]
    exported = export_switti(model)
    assert {key: (list(tensor.shape), tensor.dtype) for key, tensor in exported.items()} == shapes
    assert sum(tensor.nbytes for tensor in exported.values()) == released["file_bytes_fp32"]
    defaults = type(model.config)(patch_nums=model.config.patch_nums, is_causal=RELEASED[name], intermediate_size=5120)
    assert model.config.to_diff_dict() == defaults.to_diff_dict()


def test_the_weights_are_not_copied(weights, tmp_path):
    model = load_switti(write(tmp_path, weights), is_causal=False)
    layer = model.layers[0]

    def storage(*projections):
        return {projection.weight.untyped_storage().data_ptr() for projection in projections}

    attention, text = layer.attention, layer.cross_attention
    assert len(storage(attention.q_proj, attention.k_proj, attention.v_proj)) == 1
    assert len(storage(text.k_proj, text.v_proj)) == 1
    given = {name: tensor.clone() for name, tensor in weights.items()}
    model = load_switti(given, is_causal=False)
    for tensor in given.values():
        tensor.zero_()
    assert_same_tensors(export_switti(model), weights)


def test_buffers_are_dropped(weights):
    for names in ([MASK], ["lvl_1L"], [MASK, "lvl_1L"]):
        some = {name: tensor for name, tensor in weights.items() if name not in names}
        model = load_switti(some, is_causal=False, patch_nums=(1, 2, 3))
        assert_same_tensors(export_switti(model), weights)
    # The official trainer writes a block-causal mask into other models, too, when it goes on at another resolution.
    causal = torch.zeros_like(weights[MASK]).masked_fill(torch.ones(14, 14).triu(1).bool(), -torch.inf)
    assert_same_tensors(export_switti(load_switti({**weights, MASK: causal}, is_causal=False)), weights)


def test_half_precision_stays(weights):
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    assert_same_tensors(export_switti(load_switti(halves, is_causal=False)), halves)


def test_saved_as_a_folder_of_ours(weights, tmp_path):
    model = load_switti(weights, is_causal=True)
    model.save_pretrained(tmp_path)
    loaded = TextVARTransformer.from_pretrained(tmp_path)
    assert loaded.config.is_causal
    assert_same_tensors(export_switti(loaded), export_switti(model))


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_ar", [False, True])
def test_the_configuration_beside_the_file(weights, tmp_path, use_ar):
    path = write(tmp_path, weights, arguments(use_ar=use_ar, rope_theta=1000, rope_size=96))
    for checkpoint in (path, str(path)):
        config = load_switti(checkpoint).config
        assert (config.is_causal, config.rope_theta, config.rope_size) == (use_ar, 1000, 96)
    config = load_switti(path, is_causal=not use_ar, rope_theta=500.0, rope_size=64).config
    assert (config.is_causal, config.rope_theta, config.rope_size) == (not use_ar, 500, 64)


def test_missing_arguments_are_those_of_the_class(weights, tmp_path):
    config = load_switti(write(tmp_path, weights, {"depth": 2})).config
    assert (config.is_causal, config.rope_theta, config.rope_size) == (False, 10000, 128)


@pytest.mark.parametrize(
    "content", [None, {"model_type": "clip"}, {}, [1, 2]], ids=["none", "another", "empty", "list"]
)
def test_without_a_configuration_it_must_be_said(weights, tmp_path, content):
    path = write(tmp_path, weights, content)
    for checkpoint in (path, weights):
        with pytest.raises(ValueError, match="`is_causal` cannot be inferred .* is_causal=False or is_causal=True"):
            load_switti(checkpoint)
        assert not load_switti(checkpoint, is_causal=False).config.is_causal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json' must hold the arguments of a Switti transformer"),
        ("3", "config.json' must hold the arguments of a Switti transformer"),
        (arguments(depth=3), "`depth` is 3 in config.json, but `checkpoint` has the weights of 2"),
        (arguments(use_crop_cond=False), "`use_crop_cond` is False in config.json, but `checkpoint` has .* of True"),
        (arguments(use_ar="no"), "config.json' must hold .*: `use_ar` must be true or false, got 'no'"),
        (arguments(rope_theta=-1), "config.json' must hold .*: `rope_theta` must be positive, got -1"),
        (arguments(rope=False), "`rope` in .* must be true, as in all released models"),
        (arguments(use_swiglu_ffn=False), "`use_swiglu_ffn` in .* must be true"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(weights, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_switti(write(tmp_path, weights, content))


# --- schedules and heads ---------------------------------------------------------------------------------------------


def test_schedules_without_a_level_buffer(facts, tmp_path):
    numbers = {name: schedule["patch_nums"] for name, schedule in facts["schedules"].items()}
    for resolution, patch_nums in numbers.items():
        fields = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1}
        weights = tiny_weights(patch_nums=patch_nums, **fields)
        del weights["lvl_1L"]
        folder = tmp_path / resolution
        folder.mkdir()
        path = write(folder, weights, arguments(depth=1, reso=int(resolution)))
        assert load_switti(path).config.patch_nums == patch_nums
        if resolution == "1024":
            # The only released schedule of 14 scales.
            assert load_switti(weights, is_causal=False).config.patch_nums == patch_nums
        else:
            with pytest.raises(ValueError, match="`patch_nums` cannot be inferred from this .* of 10 scales"):
                load_switti(weights, is_causal=False)


def test_a_schedule_of_another_file(weights, tmp_path):
    with pytest.raises(ValueError, match=r"`patch_nums` must be the 3 maps that lvl_embed.weight has rows for"):
        load_switti(weights, is_causal=False, patch_nums=(1, 2))
    with pytest.raises(ValueError, match=r"`patch_nums` must be maps of 14 tokens, of which lvl_1L .* with 21"):
        load_switti(weights, is_causal=False, patch_nums=(1, 2, 4))
    some = {name: tensor for name, tensor in weights.items() if name != "lvl_1L"}
    with pytest.raises(ValueError, match="`patch_nums` must be the 3 maps"):
        load_switti(write(tmp_path, some, arguments()), is_causal=False)


def test_heads_that_are_not_64_wide():
    weights = tiny_weights(hidden_size=32)
    with pytest.raises(
        ValueError, match="`num_attention_heads` cannot be inferred .* whose width 32 is not 64 per layer"
    ):
        load_switti(weights, is_causal=False)
    assert load_switti(weights, is_causal=False, num_attention_heads=2).config.head_dim == 16


# --- what is no such file --------------------------------------------------------------------------------------------


def test_other_keys(weights):
    with pytest.raises(ValueError, match=r"not an official Switti transformer .* left over \['blocks.0.attn.bias'\]"):
        load_switti({**weights, "blocks.0.attn.bias": torch.zeros(3)}, is_causal=False)
    for name in ("text_pooler.weight", "blocks.0.ffn.up_proj.weight", "blocks.1.attn.proj.bias", "crop_proj.bias"):
        some = {key: tensor for key, tensor in weights.items() if key != name}
        with pytest.raises(ValueError, match=f"missing.*{name}|{name}.* missing"):
            load_switti(some, is_causal=False)
    with pytest.raises(ValueError, match="`num_layers` is not a field of TextVARConfig"):
        load_switti(weights, num_layers=3)


def test_what_the_official_code_cannot():
    for patch_nums in ((2, 3), (1, (2, 3))):
        model = TextVARTransformer(text_config(patch_nums=patch_nums))
        with pytest.raises(
            ValueError, match="`patch_nums` must be square maps and begin with 1 for the official code"
        ):
            export_switti(model)
    with pytest.raises(ValueError, match="`learned_empty_text` must be false for the official code"):
        export_switti(TextVARTransformer(text_config(learned_empty_text=True, patch_nums=(1, 2, 3))))


def test_its_licences():
    origin = ORIGINS["switti"]
    assert (origin.code_license, origin.weights_license) == ("apache-2.0", None)
