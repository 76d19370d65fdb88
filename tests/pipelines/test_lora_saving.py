# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters are never lost in saving, and those that do not fit are refused without a trace."""

import json

import pytest
import torch
from diffusers.utils import set_adapter_layers
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_var import VARPipeline, VARTransformer
from hf_var.compatibility import add_adapter
from pipelines.adapted import NEW_LABELS, assert_equal, assert_state, draw, logits_of, make_adapter, state_of
from pipelines.tiny import make_pipeline, make_transformer, make_vqvae


# --------------------------------------------------------------------------------------------------------------------
# Never lost in saving


def assert_not_saved(pipe, folder):
    message = r"`transformer` has live adapters.*`fuse_lora\(\)`.*`unload_lora_weights\(\)`"
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub("user/name")  # before anything is asked of a server
    assert not folder.exists()


def test_a_live_adapter_is_not_saved_by_half(pipe, tmp_path):
    make_adapter(tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    assert_not_saved(pipe, tmp_path / "pipeline")
    set_adapter_layers(pipe.transformer, enabled=False)
    assert_not_saved(pipe, tmp_path / "pipeline")


@pytest.mark.parametrize("wrap", ["peft", "injected", "compile"])
def test_adapters_from_elsewhere_are_not_saved_by_half(wrap, tmp_path):
    transformer = make_transformer()
    config = LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["class_embedding"], init_lora_weights=False)
    if wrap == "peft":
        # The layers are changed in place, and transformers does not know.
        get_peft_model(transformer, config)
    else:
        add_adapter(transformer, config)
    pipe = VARPipeline(torch.compile(transformer) if wrap == "compile" else transformer, make_vqvae())
    logits = logits_of(VARPipeline(transformer, make_vqvae()))
    assert_not_saved(pipe, tmp_path / "pipeline")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = VARPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(logits_of(loaded), logits, atol=1e-4, rtol=1e-4)


def test_a_model_wrapped_by_peft_is_refused(tmp_path):
    transformer = make_transformer()
    wrapped = get_peft_model(transformer, LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False))
    message = r"`transformer` must be the model itself, got PEFT's PeftModel around it: pass its `get_base_model\(\)`"
    with pytest.raises(ValueError, match=message):
        VARPipeline(wrapped, make_vqvae())
    make_pipeline().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        VARPipeline.from_pretrained(tmp_path / "base", transformer=wrapped)
    pipe = VARPipeline(wrapped.get_base_model(), make_vqvae())
    assert not torch.allclose(logits_of(pipe), logits_of(make_pipeline()), atol=0.1)
    # Slipped in afterwards.
    pipe.transformer = wrapped
    assert_not_saved(pipe, tmp_path / "pipeline")


def test_saved_names_are_those_of_a_plain_transformer(pipe, tmp_path):
    make_adapter(tmp_path / "lora", labels=NEW_LABELS)
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "transformer" / "model.safetensors")
    assert saved.keys() == make_transformer().state_dict().keys()
    loaded, report = VARTransformer.from_pretrained(tmp_path / "merged" / "transformer", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.id2label == NEW_LABELS


# --------------------------------------------------------------------------------------------------------------------
# What is refused, with the pipeline as before


def rewrite(folder, config=None, weights=None, labels=None):
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights is not None:
        path = folder / "adapter_model.safetensors"
        save_file(weights(load_file(path)), path, metadata={"format": "pt"})
    if labels is not None:
        labels(folder / "labels.json")


def without(part):
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        ({}, {"config": {"peft_type": "IA3"}}, "adapters of the type LORA, got IA3"),
        ({}, {"config": {"bias": "lora_only"}}, "changes the weights beneath .bias='lora_only'"),
        ({}, {"config": {"init_lora_weights": "pissa"}}, "changes the weights beneath .*'pissa'"),
        ({}, {"config": {"trainable_token_indices": [0]}}, "trains single rows"),
        ({}, {"weights": without("layers.1.mlp.fc2.lora_B")}, "made for another transformer: it lacks .*fc2"),
        ({}, {"config": {"target_modules": ["fc1"]}}, "made for another transformer: .*in excess .*k_proj"),
        ({}, {"config": {"target_modules": ["query"]}}, "No modules were targeted"),
        ({}, {"config": {"r": 3}}, "made for another transformer: its weights have other shapes"),
        (
            {"labels": NEW_LABELS},
            {"labels": lambda path: path.unlink()},
            "was made for 3 labels but has no labels.json",
        ),
        (
            {"labels": NEW_LABELS},
            {"weights": without("class_embedding")},
            r"made for other labels and has no embedding of them; .* does not know \['newt', 'toad'\]",
        ),
        (
            {"labels": NEW_LABELS},
            {"labels": lambda path: path.write_text('{"id2label": {"0": "newt"}}')},
            "its weights have other shapes",
        ),
    ],
)
def test_unfit_adapters_leave_no_trace(pipe, made, changes, message, tmp_path):
    make_adapter(tmp_path, **made)
    rewrite(tmp_path, **changes)
    before, expected = state_of(pipe.transformer), logits_of(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path)
    assert_state(pipe.transformer, before)
    assert torch.equal(logits_of(pipe), expected)
    # Beside another adapter that stays.
    good = make_adapter(tmp_path / "good", seed=3)
    pipe.load_lora_weights(tmp_path / "good", adapter_name="good")
    with pytest.raises(ValueError):
        pipe.load_lora_weights(tmp_path)
    assert list(pipe.transformer.peft_config) == ["good"]
    assert torch.equal(logits_of(pipe), logits_of(good))
    pipe.unload_lora_weights()
    assert_state(pipe.transformer, before)


def test_what_only_the_unfit_adapter_changed_is_plain_again(pipe, tmp_path):
    """The class embedding and some layers, beside an adapter of other layers."""
    good = make_adapter(tmp_path / "good", seed=3, train_labels=False, target_modules=["fc1"])
    make_adapter(tmp_path / "unfit")
    rewrite(tmp_path / "unfit", weights=without("layers.1.mlp.fc2.lora_B"))
    pipe.load_lora_weights(tmp_path / "good", adapter_name="good")
    kinds = [(name, type(module)) for name, module in pipe.transformer.named_modules()]
    trainable = [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    pipe.transformer.train()
    with pytest.raises(ValueError, match="made for another transformer"):
        pipe.load_lora_weights(tmp_path / "unfit")
    assert [(name, type(module)) for name, module in pipe.transformer.named_modules()] == kinds
    assert [parameter.requires_grad for parameter in pipe.transformer.parameters()] == trainable
    assert list(pipe.transformer.peft_config) == ["good"]
    assert pipe.transformer.training
    pipe.transformer.eval()
    assert torch.equal(logits_of(pipe), logits_of(good))


def test_another_type_of_adapter_is_refused(pipe, tmp_path):
    transformer = make_transformer()
    config = IA3Config(target_modules=["v_proj", "fc2"], feedforward_modules=["fc2"])
    get_peft_model(transformer, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapters of the type LORA, got IA3"):
        pipe.load_lora_weights(tmp_path)


def test_an_adapter_of_another_size_is_refused(pipe, tmp_path):
    make_adapter(tmp_path)
    for sizes in ({"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"hidden_size": 64}):
        other = make_pipeline(sizes)
        expected = state_of(other.transformer)
        with pytest.raises(ValueError, match="was made for another transformer"):
            other.load_lora_weights(tmp_path)
        assert_state(other.transformer, expected)


def test_wrong_places_and_arguments(pipe, tmp_path):
    with pytest.raises(OSError, match="adapter_config.json"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="`load_lora_weights` takes .*'revision'.*got {'weight_name'}"):
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")


def test_a_folder_within_a_folder(pipe, tmp_path):
    trained = make_adapter(tmp_path / "inner", labels=NEW_LABELS)
    pipe.load_lora_weights(str(tmp_path), subfolder="inner")
    assert_equal(draw(pipe), draw(trained))
