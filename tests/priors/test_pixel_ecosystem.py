# SPDX-License-Identifier: Apache-2.0
"""PixelCNN and PixelSNAIL as models of transformers: saving, precision, checkpointing, compilation."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_var import PixelPriorOutput
from hf_var.compatibility import enable_activation_checkpointing
from priors.pixels import KINDS, pixel_inputs, pixel_prior


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=KINDS)
def model(request):
    return pixel_prior(request.param)


@pytest.fixture(params=["cnn_dropped_classes", "snail_fine_classes", "snail_classes"])
def typical_model(request):
    return pixel_prior(request.param)


@torch.no_grad()
def test_a_folder_gives_the_model_back(model, tmp_path):
    inputs = pixel_inputs(model.config)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert loaded.config.map_size == model.config.map_size
    expected = model(**inputs).logits
    assert torch.equal(loaded(**inputs).logits, expected)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    automatic = AutoModel.from_pretrained(tmp_path)
    assert type(automatic) is type(model)
    assert torch.equal(automatic(**inputs).logits, expected)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type


def test_fields_are_overridden_and_checked_while_loading(tmp_path):
    pixel_prior("snail").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dropout=0.5, map_size=5)
    assert (model.config.dropout, model.config.map_size, model.config.patch_nums) == (0.5, (5, 5), [[5, 5]])
    with pytest.raises(ValueError, match="`dropout` must be"):
        AutoModel.from_pretrained(tmp_path, dropout=1.5)


def test_label_names_are_kept(tmp_path):
    names = {0: "cat", 1: "dog"}
    pixel_prior("cnn", num_labels=None, id2label=names).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.id2label, config.label2id, config.num_labels) == (names, {"cat": 0, "dog": 1}, 2)


@torch.no_grad()
def test_nothing_but_the_weights_makes_a_model(model):
    """Built without memory and given its state dictionary, a model has no buffer or attribute that stays garbage."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    inputs = pixel_inputs(model.config)
    assert torch.equal(empty.eval()(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(typical_model, tmp_path, dtype):
    inputs = pixel_inputs(typical_model.config)
    expected = typical_model(**inputs).logits
    typical_model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    logits = loaded(**inputs).logits
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).std() < 0.1 * expected.std()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = typical_model(**inputs, labels=inputs["codes"])
    assert mixed.logits.dtype == mixed.loss.dtype == torch.float32
    assert (mixed.logits - expected).std() < 0.1 * expected.std()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(typical_model, use_reentrant):
    inputs = pixel_inputs(typical_model.config)
    model = typical_model.train()
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        model(**inputs, labels=inputs["codes"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        enable_activation_checkpointing(model, {"use_reentrant": use_reentrant})
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first)
    calls = []
    layer = (model.layers if hasattr(model, "layers") else model.blocks)[0]
    next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    next(next(layer.children()).children(), torch.nn.Identity()).register_forward_hook(lambda *_: calls.append(1))
    model(**inputs, labels=inputs["codes"]).loss.backward()
    assert len(calls) == 2


def test_outputs(typical_model):
    inputs = pixel_inputs(typical_model.config)
    with torch.no_grad():
        output = typical_model(**inputs, labels=inputs["codes"])
        assert isinstance(output, PixelPriorOutput)
        loss, logits = typical_model(**inputs, labels=inputs["codes"], return_dict=False)
        assert torch.equal(loss, output.loss)
        assert torch.equal(logits, output.logits)
        assert typical_model(**inputs).loss is None
        assert len(typical_model(**inputs, return_dict=False)) == 1


def test_embeddings():
    model = pixel_prior("cnn")
    assert model.get_input_embeddings() is model.embedding
    assert not model.can_generate()
    assert model.main_input_name == "codes"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["cnn_dropped_classes", "snail_fine_classes", "snail_classes"])
def test_training_forward_compiles_into_one_graph(kind):
    model, twin = (pixel_prior(kind, **({"dropout": 0.0} if "snail" in kind else {})) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        inputs = pixel_inputs(model.config, seed=seed)
        found, expected = (each(**inputs, labels=inputs["codes"]) for each in (compiled, twin))
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        for each, output in ((model, found), (twin, expected)):
            each.zero_grad()
            output.loss.backward()
        for (name, parameter), reference in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, reference.grad, msg=name, **CLOSE)


@torch.no_grad()
def test_defaults_have_the_published_sizes():
    from hf_var import PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig

    bottom = PixelSNAILConfig(map_size=64, condition_map_size=32, attention=False)
    with torch.device("meta"):
        models = [PixelCNN(PixelCNNConfig(num_labels=10)), PixelSNAIL(PixelSNAILConfig()), PixelSNAIL(bottom)]
    millions = [round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) for model in models]
    assert millions[0] == 1.84
    assert [round(number, 1) for number in millions[1:]] == [84.9, 89.8]
