# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the public PixelCNN and PixelSNAIL to our models and back."""

import argparse

import pytest
import torch

from hf_var import PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig
from hf_var.conversion import export_pixelcnn, export_pixelsnail, load_pixelcnn, load_pixelsnail
from parity import assert_same_tensors, load_lineage_case, make_contrast


@pytest.mark.parity
def test_public_to_ours_to_public():
    case = load_lineage_case("pixelcnn")
    assert_same_tensors(export_pixelcnn(load_pixelcnn(case.weights, map_size=6)), case.weights)
    for name in ("pixelsnail_top", "pixelsnail_bottom"):
        case = load_lineage_case(name)
        assert_same_tensors(export_pixelsnail(load_pixelsnail(case.weights)), case.weights)


@pytest.mark.parity
def test_inferred_configurations():
    case = load_lineage_case("pixelcnn")
    arguments, config = case.manifest["model_args"], load_pixelcnn(case.weights, map_size=(6, 6)).config
    assert config.codebook_size == arguments["input_dim"]
    assert config.hidden_size == arguments["dim"]
    assert config.num_hidden_layers == arguments["n_layers"]
    assert config.num_labels == arguments["n_classes"]
    for name in ("pixelsnail_top", "pixelsnail_bottom"):
        case = load_lineage_case(name)
        arguments, config = case.manifest["model_args"], load_pixelsnail(case.weights).config
        assert list(config.map_size) == arguments["shape"]
        assert config.codebook_size == arguments["n_class"]
        assert config.hidden_size == arguments["channel"]
        assert config.residual_size == arguments["res_channel"]
        assert config.kernel_size == arguments["kernel_size"]
        assert config.num_blocks == arguments["n_block"]
        assert config.num_res_blocks == arguments["n_res_block"]
        assert config.attention == arguments["attention"]
        assert config.num_output_res_blocks == arguments.get("n_out_res_block", 0)
        assert config.dropout == arguments["dropout"]
        assert config.num_labels == 0
        if name == "pixelsnail_bottom":
            assert config.condition_map_size == (4, 4)
            assert config.num_condition_res_blocks == arguments["n_cond_res_block"]
            assert config.condition_hidden_size == arguments["cond_res_channel"]
        else:
            assert config.condition_map_size is None


CNN = {"map_size": (3, 5), "codebook_size": 11, "hidden_size": 6}
SNAIL = {
    "codebook_size": 11,
    "hidden_size": 32,
    "residual_size": 6,
    "num_condition_res_blocks": 2,
    "condition_hidden_size": 5,
}


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 3, "num_hidden_layers": 2},
        {"num_labels": 0, "num_hidden_layers": 1},
        {"num_labels": 2, "num_hidden_layers": 11, "class_dropout_prob": 0.1},
    ],
    ids=str,
)
def test_pixelcnn_round_trip(fields):
    model = make_contrast(PixelCNN(PixelCNNConfig(**CNN, **fields)))
    public = export_pixelcnn(model)
    unknown = {"map_size": (3, 5), "class_dropout_prob": fields.get("class_dropout_prob", 0.0)}
    loaded = load_pixelcnn(public, **unknown)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert_same_tensors(export_pixelcnn(loaded), public)
    assert not any(weight.data_ptr() == public[name].data_ptr() for name, weight in export_pixelcnn(loaded).items())


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"map_size": (4, 6), "kernel_size": 3, "num_blocks": 1, "num_res_blocks": 3},
        {"map_size": (5, 3), "num_blocks": 11, "num_res_blocks": 1, "attention": False},
        {"map_size": (4, 6), "condition_map_size": (2, 3), "num_blocks": 2, "num_output_res_blocks": 2},
        {"map_size": 6, "condition_map_size": 3, "num_blocks": 1, "attention": False, "kernel_size": 7},
    ],
    ids=str,
)
def test_pixelsnail_round_trip(fields):
    model = make_contrast(PixelSNAIL(PixelSNAILConfig(**SNAIL, **fields)))
    public = export_pixelsnail(model)
    loaded = load_pixelsnail(public)
    left_out = set() if "condition_map_size" in fields else {"num_condition_res_blocks", "condition_hidden_size"}
    expected = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    assert {name: value for name, value in loaded.config.to_dict().items() if name not in left_out} == expected
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert_same_tensors(export_pixelsnail(loaded), public)


def test_overrides():
    weights = load_lineage_case("pixelsnail_top").weights
    assert load_pixelsnail(weights, dropout=0.3).config.dropout == 0.3
    with pytest.raises(ValueError, match="`drop_out` is not a field of PixelSNAILConfig. Did you mean `dropout`"):
        load_pixelsnail(weights, drop_out=0.3)
    names = {label: f"animal {label}" for label in range(5)}
    weights = load_lineage_case("pixelcnn").weights
    assert load_pixelcnn(weights, id2label=names).config.id2label == names
    assert load_pixelcnn(weights).config.map_size == (8, 8)
    with pytest.raises(ValueError, match="`num_labels` is 5 but `id2label` names 1 labels"):
        load_pixelcnn(weights, id2label={0: "animal"})


@pytest.mark.parametrize("name", ["pixelcnn", "pixelsnail_top", "pixelsnail_bottom"])
def test_weights_that_do_not_fit(name):
    weights = load_lineage_case(name).weights
    load, kind = (load_pixelcnn, "PixelCNN") if name == "pixelcnn" else (load_pixelsnail, "PixelSNAIL")
    with pytest.raises(ValueError, match=r"left over \['extra'\]"):
        load({**weights, "extra": torch.zeros(1)})
    last = [key for key in weights if key.endswith("bias")][-1]
    with pytest.raises(ValueError, match=f"is not an official {kind} that this package knows: missing keys.*{last}"):
        load({key: weight for key, weight in weights.items() if key != last})
    with pytest.raises(ValueError, match=f"does not fit its {kind} configuration: {last}"):
        load({**weights, last: torch.zeros(2)})
    other = load_pixelsnail if name == "pixelcnn" else load_pixelcnn
    with pytest.raises(ValueError, match="`checkpoint` is not an official"):
        other(weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 3}, "`num_labels` must be 0 for that code"),
        ({"num_attention_heads": 4}, "`num_attention_heads` must be 8 for that code, got 4"),
        ({"condition_map_size": 2, "condition_codebook_size": 7}, "must be that of the model.*got 7 and 11"),
        ({"condition_map_size": 1}, r"must be half of `map_size` for that code, got \(1, 1\) and \(4, 4\)"),
    ],
    ids=str,
)
def test_pixelsnail_that_the_public_code_cannot_hold(fields, message):
    model = PixelSNAIL(PixelSNAILConfig(**SNAIL, map_size=4, num_blocks=1, num_res_blocks=1, **fields))
    with pytest.raises(ValueError, match=message):
        export_pixelsnail(model)


def test_pixelcnn_that_the_public_code_cannot_hold():
    for name, value, fixed in (("kernel_size", 5, 3), ("first_kernel_size", 5, 7), ("head_hidden_size", 8, 512)):
        with pytest.raises(ValueError, match=f"`{name}` must be {fixed} for the code of pytorch-vqvae, got {value}"):
            export_pixelcnn(PixelCNN(PixelCNNConfig(**CNN, num_hidden_layers=2, **{name: value})))


def test_files_of_the_public_trainer(tmp_path):
    """It keeps its command line beside the model, whose names those of DDP may precede."""
    for name, prefix in (("pixelsnail_top", ""), ("pixelsnail_bottom", "module.")):
        weights = load_lineage_case(name).weights
        wrapped = {f"{prefix}{key}": weight for key, weight in weights.items()}
        torch.save({"model": wrapped, "args": argparse.Namespace(lr=3e-4, hier="top")}, tmp_path / "prior.pt")
        assert_same_tensors(export_pixelsnail(load_pixelsnail(tmp_path / "prior.pt")), weights)
