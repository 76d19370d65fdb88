# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: whole, in pieces, in half precision, with parts missing, and with other labels."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_var import VARConfig, VARTransformer
from loading_checks import incomplete
from priors.tiny import logits_block_by_block, tiny_config, tiny_inputs, tiny_model


@pytest.fixture(params=[False, True], ids=["adaln_per_layer", "shared_adaln"])
def model(request):
    return tiny_model(shared_adaln=request.param, block_sizes=[1, 4, 2, 4])


@pytest.fixture
def inputs(model):
    return tiny_inputs(model.config)


def assert_equal_weights(found, expected, but=()):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name in expected.keys() - set(but):
        assert torch.equal(found[name], expected[name]), name


def test_a_folder_gives_the_model_back(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded, report = VARTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training
    assert_equal_weights(loaded, model)
    expected = logits_block_by_block(model, inputs)
    assert torch.equal(logits_block_by_block(loaded, inputs), expected)
    automatic = AutoModel.from_pretrained(tmp_path)
    assert type(automatic) is VARTransformer
    assert torch.equal(logits_block_by_block(automatic, inputs), expected)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["VARTransformer"]


def test_pieces_give_the_model_back(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_equal_weights(VARTransformer.from_pretrained(tmp_path), model)


def test_variants_are_kept_apart(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = tiny_model(**{name: getattr(model.config, name) for name in ("shared_adaln", "block_sizes")}).half()
    other.save_pretrained(tmp_path, variant="fp16")
    # The configuration, which both share, names the dtype of the last one saved.
    assert_equal_weights(VARTransformer.from_pretrained(tmp_path, dtype=torch.float32), model)
    assert_equal_weights(VARTransformer.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision(model, inputs, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = VARTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    expected, logits = (logits_block_by_block(each, inputs) for each in (model, loaded))
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).std() < 0.05 * expected.std()
    # What was saved in half precision comes back in it unless another is asked for.
    loaded.save_pretrained(tmp_path)
    assert VARTransformer.from_pretrained(tmp_path).dtype == dtype
    assert VARTransformer.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    assert VARTransformer.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_nothing_but_the_weights_makes_a_model(model, inputs):
    """Built without memory and given its state dictionary, a model has no buffer or attribute that stays garbage."""
    with torch.device("meta"):
        empty = VARTransformer(model.config)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"cpu"}
    expected = logits_block_by_block(model, inputs)
    assert torch.equal(logits_block_by_block(empty.eval(), inputs), expected)


def kinds_of_weights():
    with torch.device("meta"):
        models = [VARTransformer(tiny_config(shared_adaln=shared_adaln)) for shared_adaln in (False, True)]
    return [
        pytest.param(index, name, id=f"{('adaln_per_layer', 'shared_adaln')[index]}-{name}")
        for index, model in enumerate(models)
        for name in model.state_dict()
        if "layers.1" not in name
    ]


@pytest.mark.parametrize(("shared_adaln", "name"), kinds_of_weights())
def test_a_missing_weight_is_initialised_and_all_others_kept(shared_adaln, name, tmp_path):
    """Raw memory or a second initialisation would go unnoticed until a training run fails."""
    model = tiny_model(shared_adaln=bool(shared_adaln))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing .*{name}"):
        VARTransformer.from_pretrained(tmp_path)
    loaded, report = incomplete(VARTransformer).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    assert_equal_weights(loaded, model, but=[name])
    torch.manual_seed(0)
    fresh = VARTransformer(model.config).state_dict()[name]
    values = loaded.state_dict()[name]
    assert values.shape == missing.shape
    if fresh.std() == 0 or fresh.numel() == 1:
        assert torch.equal(values, fresh)
    else:
        assert values.std().item() == pytest.approx(fresh.std().item(), rel=0.5)


def test_other_labels_take_a_new_table_and_keep_all_else(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = {0: "cat", 1: "dog"}
    with pytest.raises(ValueError, match=r"class_embedding.weight: F32 \(.*ignore_mismatched_sizes"):
        VARTransformer.from_pretrained(tmp_path, id2label=names)
    loaded = VARTransformer.from_pretrained(tmp_path, id2label=names, ignore_mismatched_sizes=True)
    assert loaded.config.num_labels == 2
    assert loaded.config.id2label == names
    assert loaded.config.label2id == {"cat": 0, "dog": 1}
    table = "embeddings.class_embedding.weight"
    assert_equal_weights(loaded, model, but=[table])
    assert loaded.state_dict()[table].shape == (3, 32)
    # Table and configuration go on together.
    loaded.save_pretrained(tmp_path)
    again = VARTransformer.from_pretrained(tmp_path)
    assert again.config.id2label == names
    assert_equal_weights(again, loaded)
    with pytest.raises(ValueError, match="`num_labels` is 3 but `id2label` names 2 labels"):
        VARTransformer.from_pretrained(tmp_path, num_labels=3)


def test_two_classes_without_names_survive(tmp_path):
    model = tiny_model(num_labels=2)
    model.save_pretrained(tmp_path)
    assert_equal_weights(VARTransformer.from_pretrained(tmp_path), model)


def test_construction_is_silent_and_independent_of_the_class_used(capfd):
    config = tiny_config()
    for build in (VARTransformer, VARTransformer._from_config, AutoModel.from_config):
        assert type(build(config)) is VARTransformer
    assert capfd.readouterr() == ("", "")
    assert AutoConfig.for_model("hf_var").to_dict() == VARConfig().to_dict()
    assert VARTransformer(config).config is not None
