# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of VQGAN's GPT and of the RQ-Transformer, to our models and back, without losing a bit or a setting."""

import re
import sys
import types

import pytest
import torch

from hf_var import RQTransformer, RQTransformerConfig
from hf_var.conversion import (
    export_rq_transformer,
    export_taming_gpt,
    imagenet_id2label,
    load_rq_transformer,
    load_taming_gpt,
)
from parity import assert_same_tensors, load_lineage_case, make_contrast
from priors.rq import KINDS, SIZES, rq_inputs, rq_model


def weights_of(system, name):
    return load_lineage_case(system, name).weights


# --- VQGAN's GPT -----------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("name", ["class", "prefix", "window16"])
def test_gpt_to_ours_to_gpt(name):
    weights = weights_of("gpt", name)
    model = load_taming_gpt(weights, num_attention_heads=2)
    assert not model.training
    assert_same_tensors(export_taming_gpt(model), weights)


@pytest.mark.parametrize(
    ("name", "expected"), [("class", ([4], 1, 16)), ("prefix", ([4], 16, 32)), ("window16", ([16], 256, 512))]
)
def test_fields_of_gpts(name, expected):
    arguments = load_lineage_case("gpt", name).manifest["gpt_args"][name]
    config = load_taming_gpt(weights_of("gpt", name), num_attention_heads=2).config
    assert (config.patch_nums, config.condition_length, config.max_position_embeddings) == expected
    assert config.codebook_size == arguments["vocab_size"]
    assert config.hidden_size == arguments["n_embd"]
    assert config.num_hidden_layers == arguments["n_layer"]
    assert (config.depth, config.num_depth_layers, config.num_labels, config.mlp_ratio) == (1, 0, 0, 4)
    assert config.shared_embedding
    assert not config.head_bias
    assert config.dropout == 0


def test_the_whole_file_of_a_net2net_transformer(tmp_path):
    weights = weights_of("gpt", "class")
    others = {
        name: torch.randn(3)
        for name in (
            "first_stage_model.encoder.conv_in.weight",
            "first_stage_model.loss.logvar",
            "cond_stage_model.quantize.embedding.weight",
            "loss.discriminator.main.0.weight",
            "permuter.forward_shuffle_idx",
        )
    }
    masks = {f"transformer.blocks.{layer}.attn.mask": torch.ones(1, 1, 16, 16) for layer in range(2)}
    file = {**{f"transformer.{name}": tensor for name, tensor in weights.items()}, **masks, **others}
    torch.save({"state_dict": file, "epoch": 3, "optimizer_states": [{}]}, tmp_path / "last.ckpt")
    for checkpoint in (file, tmp_path / "last.ckpt"):
        assert_same_tensors(export_taming_gpt(load_taming_gpt(checkpoint, num_attention_heads=2)), weights)
    file["transformer.blocks.1.attn.bias"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"not an official GPT .* left over \['blocks.1.attn.bias'\]"):
        load_taming_gpt(file, num_attention_heads=2)


@pytest.fixture
def callback(monkeypatch):
    """A class of Lightning's, which is not installed, whose objects say when they are made from a file."""
    restored = []

    class ModelCheckpoint:
        def __setstate__(self, state):
            restored.append(state)

        def __reduce__(self):
            return type(self), (), {"monitor": "loss"}

    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = ModelCheckpoint
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ModelCheckpoint.restored = restored
    return ModelCheckpoint


def test_classes_of_lightning_are_left_out_and_others_refused(callback, tmp_path):
    weights = weights_of("gpt", "class")
    path = tmp_path / "last.ckpt"
    callbacks = {callback: {"best_model_score": torch.tensor(3.0)}, "object": callback()}
    torch.save({"state_dict": weights, "callbacks": callbacks}, path)
    assert_same_tensors(export_taming_gpt(load_taming_gpt(path, num_attention_heads=2)), weights)
    assert callback.restored == []
    torch.save({"state_dict": weights, "callbacks": {"function": re.compile}}, path)
    with pytest.raises(ValueError, match=r"cannot be read as weights and nothing else: it refers to re\.compile"):
        load_taming_gpt(path, num_attention_heads=2)


def released_gpt(num_layers, width, num_positions):
    """A state dict of the sizes of a released model, without its numbers."""
    fields = {"code_inputs": "tokens", "shared_embedding": True, "head_bias": False, "num_depth_layers": 0}
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": 1, "codebook_size": 1024}
    config = RQTransformerConfig(
        num_labels=0, patch_nums=[16], max_position_embeddings=num_positions, **fields, **sizes
    )
    with torch.device("meta"):
        return export_taming_gpt(RQTransformer(config))


@pytest.mark.parametrize(
    ("num_layers", "width", "num_positions", "expected"),
    [
        (48, 1536, 256, (24, [16], 1, 1000)),
        (24, 1024, 512, (16, [16], 256, 0)),
        (24, 1664, 256, (16, [16], 1, 0)),
    ],
)
def test_released_sizes(num_layers, width, num_positions, expected):
    from hf_var.conversion.taming import _infer_fields

    config = RQTransformerConfig(**_infer_fields(released_gpt(num_layers, width, num_positions), {}))
    assert (config.num_attention_heads, config.patch_nums, config.condition_length, config.num_labels) == expected
    if config.num_labels:
        assert config.id2label == imagenet_id2label()
    scenes = _infer_fields(released_gpt(40, 1408, 348), {"patch_nums": [16]})
    assert (scenes["num_attention_heads"], scenes["condition_length"]) == (16, 92)


def test_what_a_gpt_leaves_open():
    with pytest.raises(
        ValueError, match="`num_attention_heads` cannot be inferred from a GPT of 2 layers of width 64"
    ):
        load_taming_gpt(weights_of("gpt", "class"))
    weights = {**weights_of("gpt", "class"), "pos_emb": torch.zeros(1, 17, 64)}
    with pytest.raises(ValueError, match="`patch_nums` cannot be inferred from a GPT of 17 positions"):
        load_taming_gpt(weights, num_attention_heads=2)
    model = load_taming_gpt(weights, num_attention_heads=2, patch_nums=[(3, 5)], bidirectional_condition=True)
    assert model.config.condition_length == 2
    assert model.config.bidirectional_condition
    with_classes = load_taming_gpt(weights, num_attention_heads=2, patch_nums=[(3, 5)], num_labels=10)
    assert with_classes.config.condition_length == 1
    assert_same_tensors(export_taming_gpt(with_classes), weights)
    named = load_taming_gpt(weights_of("gpt", "class"), num_attention_heads=2, id2label={0: "cat", 1: "dog"})
    assert named.config.num_labels == 2


# --- RQ-Transformer --------------------------------------------------------------------------------------------------

HEADS = {"num_attention_heads": 2}
OVERRIDES = {"class": HEADS, "text": {"num_attention_heads": 4}, "tokens": {**HEADS, "patch_nums": [(3, 4)] * 2}}


@pytest.mark.parity
@pytest.mark.parametrize("name", OVERRIDES)
def test_rq_transformer_to_ours_to_rq_transformer(name):
    weights = weights_of("rqtransformer", name)
    assert_same_tensors(export_rq_transformer(load_rq_transformer(weights, **OVERRIDES[name])), weights)


def test_the_whole_file_of_an_rq_transformer(tmp_path):
    weights = weights_of("rqtransformer", "class")
    torch.save({"epoch": 3, "state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "model.pt")
    assert_same_tensors(export_rq_transformer(load_rq_transformer(tmp_path / "model.pt", **HEADS)), weights)


@pytest.mark.parametrize("name", OVERRIDES)
def test_fields_of_rq_transformers(name):
    arch = load_lineage_case("rqtransformer", name).manifest["arch"][name]
    config = load_rq_transformer(weights_of("rqtransformer", name), **OVERRIDES[name]).config
    assert config.codebook_size == arch["vocab_size"]
    assert [*config.scale_sizes[0], config.depth] == arch["block_size"]
    assert config.hidden_size == arch["embed_dim"]
    assert config.code_inputs == ("vectors" if arch["input_emb_vqvae"] else "tokens")
    if arch["input_emb_vqvae"]:
        assert config.latent_channels == arch["input_embed_dim"]
    assert config.separate_depth_embeddings != arch["shared_tok_emb"]
    assert config.separate_depth_heads != arch["shared_cls_emb"]
    assert config.condition_length == arch["block_size_cond"]
    assert (config.num_hidden_layers, config.num_depth_layers) == (arch["body"]["n_layer"], arch["head"]["n_layer"])
    expected = {"class": (10, None, 0.0), "text": (0, 30, 0.1), "tokens": (0, None, 0.0)}[name]
    assert (config.num_labels, config.condition_vocab_size, config.condition_loss_weight) == expected
    assert config.dropout == 0.1


def test_sizes_of_the_released_imagenet_model():
    from hf_var.conversion.rq import _infer_fields

    with torch.device("meta"):
        model = RQTransformer(RQTransformerConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 480_921_088 - 1536  # which nothing reads
    config = RQTransformerConfig(**_infer_fields(export_rq_transformer(model), {}))
    expected = RQTransformerConfig(id2label=imagenet_id2label(), max_position_embeddings=65)
    assert config.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 5},
        {"num_labels": 0, "patch_nums": [(2, 3)]},
        {"num_labels": 0, "code_inputs": "tokens", "separate_depth_heads": True},
        {"num_labels": 7, "code_inputs": "tokens", "separate_depth_embeddings": True},
        {"condition_length": 3, "condition_vocab_size": 4},
        {"condition_length": 3, "condition_vocab_size": 4, "condition_loss_weight": 0.1, "hidden_act": "quick_gelu"},
    ],
    ids=str,
)
def test_ours_to_official_to_ours(fields):
    config = RQTransformerConfig(**{**SIZES, **fields})
    model = make_contrast(RQTransformer(config))
    overrides = {name: getattr(config, name) for name in ("patch_nums", "num_attention_heads", "hidden_act")}
    loaded = load_rq_transformer(export_rq_transformer(model), **overrides)
    inputs = rq_inputs(config)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert_same_tensors(export_rq_transformer(loaded), export_rq_transformer(model))


def test_what_an_rq_transformer_leaves_open():
    with pytest.raises(ValueError, match="`patch_nums` cannot be inferred from this RQ-Transformer of 12 positions"):
        load_rq_transformer(weights_of("rqtransformer", "tokens"), **HEADS)
    config = load_rq_transformer(weights_of("rqtransformer", "class"), **HEADS, num_labels=10).config
    assert (config.hidden_act, config.cumulative_depth_inputs) == ("gelu", True)
    overrides = {"hidden_act": "quick_gelu", "cumulative_depth_inputs": False, "dropout": 0.0}
    config = load_rq_transformer(weights_of("rqtransformer", "class"), **HEADS, **overrides).config
    assert (config.hidden_act, config.cumulative_depth_inputs, config.dropout) == ("quick_gelu", False, 0.0)


# --- what both refuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "system", "kind"),
    [(load_taming_gpt, "gpt", "GPT"), (load_rq_transformer, "rqtransformer", "RQ-Transformer")],
)
def test_broken_checkpoints(load, system, kind):
    weights = weights_of(system, "class")
    with pytest.raises(ValueError, match="`num_head` is not a field of RQTransformerConfig"):
        load(weights, num_head=2)
    for name in weights:
        broken = {other: tensor for other, tensor in weights.items() if other != name}
        with pytest.raises(ValueError, match=rf"not an official {kind}.*{re.escape(name)}"):
            load(broken, **HEADS)
    with pytest.raises(ValueError, match=f"not an official {kind}: the keys"):
        load({"weight": torch.zeros(3)}, **HEADS)
    narrow = {name: tensor[..., :-1] if name.endswith("mlp.2.weight") else tensor for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=f"`checkpoint` does not fit its {kind} configuration: .*mlp.2.weight"):
        load(narrow, **HEADS)
    loaded = load(weights, **HEADS)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for parameter in loaded.parameters():
        parameter.data.zero_()
    assert_same_tensors(weights, before)


def test_models_that_the_official_code_cannot_be():
    for kind in KINDS:
        is_gpt = "gpt" in kind
        model = rq_model(kind)
        if is_gpt:
            export_taming_gpt(model)
        else:
            with pytest.raises(ValueError, match="`model` must have one depth.* for taming-transformers, got depth 3"):
                export_taming_gpt(model)
        if is_gpt or kind == "bidirectional":
            with pytest.raises(
                ValueError, match="`model` must have depth layers.*for the official RQ-Transformer, got"
            ):
                export_rq_transformer(model)
    with pytest.raises(ValueError, match="`max_position_embeddings` must be at most 7 .*, got 8"):
        export_rq_transformer(rq_model("classes", max_position_embeddings=8))
