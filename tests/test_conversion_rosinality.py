# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the public VQ-VAE-2 to our model and back, and what is refused."""

import pytest
import torch

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel
from hf_var.cli import main
from hf_var.conversion import export_vqvae2, load_vqvae2
from parity import assert_same_tensors, load_lineage_case, make_contrast


SMALL = {"image_size": (16, 24), "base_channels": 6, "residual_channels": 5, "latent_channels": 4, "codebook_size": 7}


def make_model(**fields):
    return make_contrast(HierarchicalVQVAEModel(HierarchicalVQVAEConfig(**{**SMALL, **fields})))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["vqvae1", "vqvae2"])
def test_theirs_to_ours_to_theirs(name, tmp_path):
    case = load_lineage_case(name)
    model = load_vqvae2(case.weights, image_size=32)
    assert_same_tensors(export_vqvae2(model), case.weights)
    # The moving averages are saved with the weights.
    model.save_pretrained(tmp_path)
    assert_same_tensors(export_vqvae2(HierarchicalVQVAEModel.from_pretrained(tmp_path)), case.weights)
    config, arguments = model.config, case.manifest["model_args"]
    assert config.strides == ([4] if name == "vqvae1" else [4, 2])
    assert (config.in_channels, config.num_output_channels) == (arguments["in_channel"],) * 2
    assert config.base_channels == arguments["channel"]
    assert config.num_res_blocks == arguments["n_res_block"]
    assert config.residual_channels == arguments["n_res_channel"]
    assert (config.latent_channels, config.codebook_size) == (arguments["embed_dim"], arguments["n_embed"])
    assert (config.commitment_loss_weight, config.codebook_loss_weight) == (0.25, 0.0)


@pytest.mark.parametrize("strides", [(4,), (4, 2)])
@pytest.mark.parametrize(
    "fields", [{}, {"in_channels": 1, "num_res_blocks": 3}, {"num_res_blocks": 0}, {"out_channels": 2}]
)
def test_ours_to_theirs_to_ours(strides, fields):
    model = make_model(strides=strides, **fields)
    overrides = {"residual_channels": 5} if fields.get("num_res_blocks") == 0 else {}
    loaded = load_vqvae2(export_vqvae2(model), image_size=(16, 24), codebook_loss_weight=1.0, **overrides)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("running_hits")}
    found = {name: tensor for name, tensor in loaded.state_dict().items() if not name.endswith("running_hits")}
    assert_same_tensors(found, expected)
    assert loaded.config.to_dict() | {"architectures": None} == model.config.to_dict() | {"architectures": None}
    assert not any(codebook.running_hits.any() for codebook in loaded.codebooks)


def test_a_model_without_averages_exports_usable_ones():
    model = make_model()
    for codebook in model.codebooks:
        codebook.forget_averages()
    exported = export_vqvae2(model)
    for level, suffix in enumerate(("_t", "_b")):
        assert torch.equal(exported[f"quantize{suffix}.embed"], model.codebooks[level].weight.T)
        assert torch.equal(exported[f"quantize{suffix}.embed_avg"], exported[f"quantize{suffix}.embed"])
        assert (exported[f"quantize{suffix}.cluster_size"] == 1).all()
    # A file without them is a whole model, too.
    bare = {name: tensor for name, tensor in exported.items() if not name.endswith(("cluster_size", "embed_avg"))}
    assert_same_tensors(export_vqvae2(load_vqvae2(bare, image_size=16)), exported)


def test_files_are_read_and_memory_is_not_shared(tmp_path):
    exported = export_vqvae2(make_model())
    torch.save(exported, tmp_path / "vqvae_560.pt")
    assert_same_tensors(export_vqvae2(load_vqvae2(tmp_path / "vqvae_560.pt", image_size=16)), exported)
    loaded = load_vqvae2(exported, image_size=16)
    exported["dec.blocks.0.bias"].zero_()
    assert loaded.decoder.conv_in.bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_t.blocks.0.weight": None}, r"not an official VQ-VAE-2.*missing keys \['enc_t.blocks.0.weight'\]"),
        ({"quantize_b.embed": None}, r"VQ-VAE-2.*quantize_b.embed.* missing"),
        ({"extra": torch.zeros(1)}, r"left over \['extra'\]"),
        ({"upsample_t.weight": torch.zeros(4, 4, 2, 2)}, "upsample_t.weight has the shape"),
        ({"quantize_t.embed": torch.zeros(4, 9)}, "quantize_t.embed has the shape"),
        ({"quantize_b.embed": torch.zeros(28)}, "quantize_b.embed has 1 instead of 2"),
        ({"quantize_b.embed_avg": torch.zeros(28)}, "quantize_b.embed_avg has the shape"),
    ],
)
def test_other_files_are_refused(change, message):
    weights = {**export_vqvae2(make_model()), **change}
    with pytest.raises(ValueError, match=message):
        load_vqvae2({name: tensor for name, tensor in weights.items() if tensor is not None}, image_size=16)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`image_sise` is not a field .*Did you mean `image_size`"):
        load_vqvae2({}, image_sise=16)
    with pytest.raises(ValueError, match=r"not an official VQ-VAE-2.*are missing"):
        load_vqvae2({})
    with pytest.raises(ValueError, match=r"`strides` must be \(4,\) or \(4, 2\).*got \(8, 2, 2\)"):
        export_vqvae2(make_model(strides=(8, 2, 2), image_size=32))


def test_convert_by_command_line(tmp_path, capsys):
    model = make_model()
    torch.save(export_vqvae2(model), tmp_path / "vqvae.pt")
    arguments = ["convert", "--vqvae2", str(tmp_path / "vqvae.pt"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--image-size", "16", "24"]) == 0
    loaded = HierarchicalVQVAEModel.from_pretrained(tmp_path / "out")
    assert loaded.config.image_size == (16, 24)
    assert_same_tensors(export_vqvae2(loaded), export_vqvae2(model))
    assert main([*arguments, "--image-size", "20"]) != 0
    assert "image_size" in capsys.readouterr().err
    assert main([*arguments, "--vqvae", "other.pth"]) != 0
