# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of VQGAN and of the RQ-VAE, to our models and back, without losing a bit or a setting."""

import numpy as np
import pytest
import torch

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.cli import main
from hf_var.conversion import (
    export_official_vqvae,
    export_rqvae,
    export_taming_vqgan,
    load_official_vqvae,
    load_rqvae,
    load_taming_vqgan,
)
from parity import assert_same_tensors, load_lineage_case, make_contrast


SMALL = {
    "base_channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "latent_channels": 4,
    "quant_conv_kernel_size": 1,
    "codebook_size": 7,
    "patch_nums": [2],
    "refinement_ratio": 0.0,
}
EXPORTS = {load_taming_vqgan: export_taming_vqgan, load_rqvae: export_rqvae}


def make_model(**fields):
    return make_contrast(VQVAEModel(VQVAEConfig(**{**SMALL, **fields})))


def weights_of(system, name):
    return load_lineage_case(system, name).weights


@pytest.fixture(params=[load_taming_vqgan, load_rqvae], ids=["vqgan", "rqvae"])
def load(request):
    return request.param


@pytest.fixture
def weights(load):
    model = make_model() if load is load_taming_vqgan else make_model(patch_nums=[2, 2], codebook_averages=True)
    return EXPORTS[load](model)


def small_maps(load):
    return [2] if load is load_taming_vqgan else [2, 2]


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize(
    ("load", "system", "name"),
    [(load_taming_vqgan, "vqgan", "plain"), (load_taming_vqgan, "vqgan", "wide"), (load_rqvae, "rqvae", "rqvae")],
)
def test_theirs_to_ours_to_theirs(load, system, name, tmp_path):
    weights = weights_of(system, name)
    torch.save({"state_dict": weights, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "last.ckpt")
    for checkpoint in (weights, tmp_path / "last.ckpt"):
        model = load(checkpoint)
        assert not model.training
        assert_same_tensors(EXPORTS[load](model), weights)
    model.save_pretrained(tmp_path / "model")
    assert_same_tensors(EXPORTS[load](VQVAEModel.from_pretrained(tmp_path / "model")), weights)


@pytest.mark.parametrize("name", ["plain", "wide"])
def test_fields_of_vqgan(name):
    arguments = load_lineage_case("vqgan", name).manifest["vqmodel_args"][name]
    expected, config = arguments["ddconfig"], load_taming_vqgan(weights_of("vqgan", name)).config
    assert config.in_channels == config.num_output_channels == expected["in_channels"]
    assert config.base_channels == expected["ch"]
    assert config.channel_multipliers == expected["ch_mult"]
    assert config.num_res_blocks == expected["num_res_blocks"]
    assert config.num_encoder_channels == expected["z_channels"]
    assert (config.latent_channels, config.codebook_size) == (arguments["embed_dim"], arguments["n_embed"])
    sides = [expected["resolution"] // 2**level for level in range(3)]
    assert config.levels_with_attention == [sides.index(side) for side in expected["attn_resolutions"]]
    assert config.sample_type == ("class_map" if name == "wide" else "image")
    assert (config.commitment_loss_weight, config.codebook_loss_weight) == (1.0, 0.25)
    # 256x256 pixels unless it is said otherwise.
    assert config.patch_nums == [64]
    assert config.image_size == (256, 256)


def test_fields_of_rqvae():
    manifest = load_lineage_case("rqvae", "rqvae").manifest
    arguments, config = manifest["hparams"], load_rqvae(weights_of("rqvae", "rqvae")).config
    assert config.patch_nums == [64] * arguments["code_shape"][-1]
    assert (config.latent_channels, config.codebook_size) == (arguments["embed_dim"], arguments["n_embed"])
    assert config.codebook_averages
    assert config.sample_type == "image"
    assert (config.commitment_loss_weight, config.codebook_loss_weight) == (0.25, 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"in_channels": 1, "num_res_blocks": 3},
        {"out_channels": 2},
        {"channel_multipliers": (1, 1, 2), "attention_levels": (1,)},
        {"channel_multipliers": (2, 1, 2), "attention_levels": (0, 2), "encoder_out_channels": 12},
        {"channel_multipliers": (1,), "last_level_attention": False},
        {"encoder_out_channels": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("maps", [[2], [(2, 3)] * 3])
def test_ours_to_theirs_to_ours(fields, maps):
    for load, export in EXPORTS.items():
        if load is load_taming_vqgan and len(maps) > 1:
            continue
        averages = {"codebook_averages": True} if load is load_rqvae else {}
        model = make_model(patch_nums=maps, **fields, **averages)
        weights = {"commitment_loss_weight": 0.25, "codebook_loss_weight": 1.0}
        loaded = load(export(model), patch_nums=maps, **weights)
        # The counts of the codes' use are ours alone.
        expected = model.state_dict() | {"quantizer.codebook.running_hits": torch.zeros(len(maps), 7)}
        assert_same_tensors(loaded.state_dict(), expected)
        ignored = {"architectures": None, "attention_levels": None}
        assert loaded.config.to_dict() | ignored == model.config.to_dict() | ignored
        assert loaded.config.levels_with_attention == model.config.levels_with_attention


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_files_of_other_precision(load, weights, dtype):
    model = load({name: tensor.to(dtype) for name, tensor in weights.items()}, patch_nums=small_maps(load))
    exported = EXPORTS[load](model)
    for name, tensor in weights.items():
        is_codebook = name.startswith("quantize")
        assert exported[name].dtype == (torch.float32 if is_codebook else dtype), name
        assert torch.equal(exported[name].double(), tensor.to(dtype).double()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.conv_in.bias": None}, r"is not an official .*missing keys \['encoder.conv_in.bias'\]"),
        ({"encoder.mid.attn_1.k.weight": None}, r"missing keys \['encoder.mid.attn_1.k.weight'\]"),
        ({"encoder.mid.attn_1.k.weight": torch.zeros(64, 64, 1)}, r"attn_1.k.weight has the shape \(64, 64, 1\)"),
        ({"encoder.mid.attn_1.v.bias": torch.zeros(63)}, r"attn_1.v.bias has the shape \(63,\)"),
        ({"encoder.mid.attn_1.v.bias": torch.full((64,), torch.nan)}, r"NaN or infinite values, \['encoder.mid.attn_1.v"),
        ({"encoder.mid.attn_1.q.bias": torch.zeros(64).long()}, "got encoder.mid.attn_1.q.bias of torch.int64"),
        ({"decoder.up.0.attn.0.q.bias": torch.zeros(32)}, r"left over \['decoder.up.0.attn.0.q.bias'\]"),
        ({"encoder.down.0.attn.0.q.bias": torch.zeros(32)}, "missing keys"),
        ({"quant_conv.weight": None}, r"\['quant_conv.weight'\] are missing"),
        ({"extra": torch.zeros(1)}, r"left over \['extra'\]"),
    ],
)  # fmt: skip
def test_other_files_are_refused(load, weights, change, message):
    weights = {**weights, **change}
    with pytest.raises(ValueError, match=message):
        load({name: tensor for name, tensor in weights.items() if tensor is not None}, patch_nums=small_maps(load))


def test_bad_arguments_are_refused(load):
    with pytest.raises(ValueError, match="`patch_num` is not a field of VQVAEConfig. Did you mean `patch_nums`"):
        load({}, patch_num=[16])
    with pytest.raises(ValueError, match="missing"):
        load({})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantizer": "fsq", "fsq_levels": (3, 3), "latent_channels": 2, "codebook_size": 9}, "`quantizer` must be"),
        ({"normalize_codebook": True}, "`normalize_codebook` must be False for .*, got True"),
        ({"refinement_ratio": 0.5}, "`refinement_ratio` must be 0.0 for .*, got 0.5"),
        ({"quant_conv_kernel_size": 3}, "`quant_conv_kernel_size` must be 1 for .*, got 3"),
        ({"mid_block_attention": False}, "`mid_block_attention` must be True for .*, got False"),
        ({"norm_num_groups": 16}, "`norm_num_groups` must be 32 for .*, got 16"),
        ({"patch_nums": [1, 2]}, r"`patch_nums` must be .*, got \[1, 2\]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_that_code_cannot_be(fields, message):
    for export in EXPORTS.values():
        with pytest.raises(ValueError, match=message):
            export(make_model(**fields))


def test_what_the_code_of_var_cannot_be():
    expected = "`attention_levels` and `encoder_out_channels` must be None for the official code, got"
    for fields in ({"attention_levels": [0]}, {"encoder_out_channels": 8}):
        with pytest.raises(ValueError, match=expected):
            export_official_vqvae(make_model(**fields))
    # Averages have no place there, and begin at zero here.
    model = make_model(codebook_averages=True)
    loaded = load_official_vqvae(export_official_vqvae(model), patch_nums=[2], codebook_averages=True)
    assert torch.equal(loaded.codebook.weight, model.codebook.weight)
    assert not loaded.codebook.has_averages


# --- VQGAN -----------------------------------------------------------------------------------------------------------


def net2net(**parts):
    """The state dict of a `Net2NetTransformer`: the parts by their names, and what else there is."""
    weights = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    return weights | {"transformer.pos_emb": torch.zeros(1, 4, 8), "permuter.forward_shuffle_idx": torch.arange(4)}


def with_other_parts(weights):
    """What stands beside a tokenizer's weights in its own file."""
    others = {
        "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(3),
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
        "colorize": torch.zeros(3, 7, 1, 1),
        "quantize.used": torch.arange(5),
    }
    return {**weights, **others}


def test_what_stands_beside_a_tokenizer_is_left_out(tmp_path):
    weights = export_taming_vqgan(make_model())
    torch.save({"state_dict": with_other_parts(weights), "global_step": 7}, tmp_path / "last.ckpt")
    model = load_taming_vqgan(tmp_path / "last.ckpt", patch_nums=[2])
    assert_same_tensors(export_taming_vqgan(model), weights)


def test_sections_of_a_net2net_transformer(tmp_path, capsys):
    image, condition = export_taming_vqgan(make_model()), export_taming_vqgan(make_model(in_channels=9))
    file = net2net(first_stage_model=with_other_parts(image), cond_stage_model=condition)
    torch.save({"state_dict": file}, tmp_path / "last.ckpt")
    for section, weights in (("first_stage_model", image), ("cond_stage_model", condition)):
        for checkpoint in (file, tmp_path / "last.ckpt"):
            model = load_taming_vqgan(checkpoint, section=section, patch_nums=[2])
            assert_same_tensors(export_taming_vqgan(model), weights)
    assert model.config.sample_type == "class_map"
    command = ["convert", "--taming-vqgan", str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "out")]
    assert main([*command, "--section", "cond_stage_model", "--patch-nums", "2"]) == 0
    assert VQVAEModel.from_pretrained(tmp_path / "out").config.in_channels == 9
    assert main(command) == 2
    assert "`section` must be one of ['first_stage_model', 'cond_stage_model']" in capsys.readouterr().err


def test_sections_that_are_not_there():
    weights = export_taming_vqgan(make_model())
    with pytest.raises(ValueError, match="`section` = 'cond_stage_model' is not in `checkpoint`, which holds"):
        load_taming_vqgan(net2net(first_stage_model=weights), section="cond_stage_model")
    with pytest.raises(
        ValueError, match=r"`section` must be one of \['first_stage_model'\] for the file of a Net2Net"
    ):
        load_taming_vqgan(net2net(first_stage_model=weights))
    with pytest.raises(ValueError, match="`section` = 'first_stage_model' is not in"):
        load_taming_vqgan(weights, section="first_stage_model")
    with pytest.raises(ValueError, match="`section` must be None, first_stage_model or cond_stage_model, got 'gpt'"):
        load_taming_vqgan(weights, section="gpt")
    with pytest.raises(ValueError, match=r"`section` must be None, first_stage_model or cond_stage_model, got array"):
        load_taming_vqgan(weights, section=np.zeros(2))


def test_a_gumbel_quantizer_is_refused():
    weights = export_taming_vqgan(make_model())
    del weights["quantize.embedding.weight"]
    weights |= {"quantize.proj.weight": torch.zeros(7, 4, 1, 1), "quantize.embed.weight": torch.zeros(7, 4)}
    with pytest.raises(ValueError, match=r"must be a VQModel, .* got a GumbelVQ .*quantize\.proj\.weight"):
        load_taming_vqgan(weights)


@pytest.mark.parametrize(
    ("fields", "overrides", "expected"),
    [
        ({"in_channels": 4}, {}, "image"),
        ({"in_channels": 5}, {}, "class_map"),
        ({"in_channels": 183}, {}, "class_map"),
        ({"in_channels": 5, "out_channels": 3}, {}, "image"),
        ({"in_channels": 4}, {"sample_type": "class_map"}, "class_map"),
        ({"in_channels": 6}, {"sample_type": "image"}, "image"),
    ],
    ids=str,
)
def test_the_number_of_channels_tells_class_maps(fields, overrides, expected):
    weights = export_taming_vqgan(make_model(**fields))
    assert load_taming_vqgan(weights, **overrides).config.sample_type == expected


@pytest.mark.parametrize(("multipliers", "side"), [((1, 1, 2, 2, 4), 16), ((1, 2, 2), 64)])
def test_maps_are_those_of_images_of_256_pixels(multipliers, side):
    config = load_taming_vqgan(export_taming_vqgan(make_model(channel_multipliers=multipliers))).config
    assert (config.patch_nums, config.image_size) == ([side], (256, 256))


# --- RQ-VAE ----------------------------------------------------------------------------------------------------------


def test_a_codebook_without_averages_exports_those_of_the_beginning():
    exported = export_rqvae(make_model(patch_nums=[2, 2]))
    for depth in range(2):
        prefix = f"quantizer.codebooks.{depth}."
        assert exported[f"{prefix}weight"].shape == (8, 4)
        assert not exported[f"{prefix}weight"][-1].any()
        assert torch.equal(exported[f"{prefix}embed_ema"], exported[f"{prefix}weight"][:-1])
        assert torch.equal(exported[f"{prefix}cluster_size_ema"], torch.zeros(7))
    # A file without them is a whole model, too.
    bare = {name: tensor for name, tensor in exported.items() if not name.endswith("_ema")}
    model = load_rqvae(bare, patch_nums=[2, 2])
    assert not model.config.codebook_averages
    assert_same_tensors(export_rqvae(model), exported)
    with_room = load_rqvae(bare, patch_nums=[2, 2], codebook_averages=True)
    assert not with_room.codebook.has_averages
    without = load_rqvae(exported, patch_nums=[2, 2], codebook_averages=False)
    assert "average_hits" not in dict(without.codebook.named_buffers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer.codebooks.1.weight": torch.ones(8, 4)}, r"shares one codebook, .*codebooks.1.weight'\]"),
        ({"quantizer.codebooks.1.embed_ema": None}, r"shares one codebook, .* \['quantizer.codebooks.1.embed_ema'\]"),
        ({"quantizer.codebooks.1.extra": torch.ones(1)}, r"shares one codebook, .* \['quantizer.codebooks.1.extra'\]"),
        ({"quantizer.codebooks.3.weight": torch.ones(1)}, "must number its keys"),
        ({"quantizer.codebooks.0.weight": torch.ones(8)}, "has 1 instead of 2 dimensions"),
        ({"quantizer.codebooks.0.weight": None}, "are missing"),
    ],
)  # fmt: skip
def test_depths_must_share_a_codebook(change, message):
    weights = {**export_rqvae(make_model(patch_nums=[2, 2])), **change}
    with pytest.raises(ValueError, match=message):
        load_rqvae({name: tensor for name, tensor in weights.items() if tensor is not None}, patch_nums=[2, 2])


def test_the_last_row_must_be_padding():
    weights = export_rqvae(make_model())
    weights["quantizer.codebooks.0.weight"] = torch.ones(8, 4)
    with pytest.raises(ValueError, match=r"the last of whose code vectors is padding, zeros, got .*\(8, 4\)"):
        load_rqvae(weights)


def test_depths_are_those_of_the_file():
    weights = export_rqvae(make_model(patch_nums=[2, 2, 2]))
    assert load_rqvae(weights).config.patch_nums == [128] * 3
    with pytest.raises(ValueError, match=r"`patch_nums` must be 3 maps, one for each depth of the file, got \[2, 2\]"):
        load_rqvae(weights, patch_nums=[2, 2])


def test_convert_by_command_line(load, weights, tmp_path):
    flag = "--taming-vqgan" if load is load_taming_vqgan else "--rqvae"
    torch.save({"state_dict": weights}, tmp_path / "model.pt")
    command = ["convert", flag, str(tmp_path / "model.pt"), "--output", str(tmp_path / "out")]
    assert main([*command, "--patch-nums", *map(str, small_maps(load))]) == 0
    model = VQVAEModel.from_pretrained(tmp_path / "out")
    assert model.config.image_size == (4, 4)
    assert_same_tensors(EXPORTS[load](model), weights)
