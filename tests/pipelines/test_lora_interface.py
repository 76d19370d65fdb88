# SPDX-License-Identifier: Apache-2.0
"""The rest of diffusers' LoRA interface: adapters are listed, switched off and on, merged and taken out, deleted and saved."""

import inspect
import warnings

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.lora_base import LoraBaseMixin

from hf_var import VARPipeline
from pipelines.adapted import NEW_LABELS, assert_equal, assert_state, draw, logits_of, make_adapter, state_of
from pipelines.tiny import make_pipeline, make_transformer, make_vqvae


@pytest.fixture
def two(pipe, tmp_path):
    """A pipeline with the adapters `a`, which has an embedding of the labels, and `b`, which is active."""
    make_adapter(tmp_path / "a")
    make_adapter(tmp_path / "b", seed=1, train_labels=False)
    for name in "ab":
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    return pipe


def test_every_name_of_diffusers_is_there(pipe):
    """What a pipeline of diffusers has for adapters; those of single files and text encoders have no meaning here."""
    names = {name for name in dir(FluxPipeline) if ("lora" in name or name.endswith("adapters")) and name[0] != "_"}
    names -= {"lora_state_dict", "load_lora_into_text_encoder", "load_lora_into_transformer"}
    assert isinstance(pipe, LoraBaseMixin)
    assert names <= set(dir(pipe))
    for name in ("fuse_lora", "set_adapters", "delete_adapters", "set_lora_device"):
        theirs = list(inspect.signature(getattr(FluxPipeline, name)).parameters)
        ours = list(inspect.signature(getattr(VARPipeline, name)).parameters)
        assert [argument for argument in theirs if argument != "kwargs"] == ours


def test_the_round_trip_of_an_adapter(pipe, tmp_path):
    make_adapter(tmp_path / "lora")
    before, base = state_of(pipe.transformer), draw(pipe)
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    pipe.set_adapters("style", 0.7)
    adapted, logits = draw(pipe), logits_of(pipe)
    assert not torch.equal(adapted.images, base.images)
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    assert pipe.get_active_adapters() == ["style"]

    pipe.disable_lora()
    assert_equal(draw(pipe), base)
    assert pipe.get_active_adapters() == ["style"]
    pipe.enable_lora()
    assert_equal(draw(pipe), adapted)

    pipe.fuse_lora(lora_scale=0.5)
    assert (pipe.num_fused_loras, pipe.fused_loras, pipe.get_list_adapters()) == (1, {"style"}, {})
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    # Up to the rounding of what was added and subtracted.
    torch.testing.assert_close(logits_of(pipe), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw(pipe).images, adapted.images, atol=1e-5, rtol=1e-5)
    assert pipe.get_list_adapters() == {"transformer": ["style"]}

    pipe.save_lora_weights(tmp_path / "saved")
    other = make_pipeline()
    other.load_lora_weights(tmp_path / "saved")
    other.set_adapters("default_0", 0.7)
    assert_equal(draw(other), adapted)

    pipe.delete_adapters("style")
    assert (pipe.get_list_adapters(), pipe.get_active_adapters()) == ({}, [])
    assert state_of(pipe.transformer)[1:] == before[1:]
    torch.testing.assert_close(draw(pipe).images, base.images, atol=1e-5, rtol=1e-5)


def test_deleted_without_merging_nothing_is_left(pipe, tmp_path):
    make_adapter(tmp_path, labels=NEW_LABELS)
    before = state_of(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    pipe.delete_adapters(["default_0"])
    assert_state(pipe.transformer, before)


def test_the_others_stay_when_one_is_deleted(two, tmp_path):
    only_b = logits_of(two)
    two.set_adapters("a")
    only_a = logits_of(two)
    two.set_adapters(["a", "b"])
    with warnings.catch_warnings():
        # PEFT would say that it activates another one, for each layer.
        warnings.simplefilter("error")
        two.delete_adapters("b")
    assert torch.equal(logits_of(two), only_a)
    two.load_lora_weights(tmp_path / "b", adapter_name="b")
    two.set_adapters("a")
    two.delete_adapters("a")
    assert two.get_active_adapters() == ["b"]
    assert torch.equal(logits_of(two), only_b)
    table = two.transformer.embeddings.class_embedding
    assert type(table) is torch.nn.Embedding


def test_one_of_several_is_merged_and_taken_out(two, tmp_path):
    only_b = logits_of(two)
    two.set_adapters("a")
    only_a = logits_of(two)
    two.fuse_lora(adapter_names=["b"], safe_fusing=True)
    assert two.fused_loras == {"b"}
    torch.testing.assert_close(logits_of(two), only_b, atol=1e-4, rtol=1e-4)
    two.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(VARPipeline.from_pretrained(tmp_path / "merged")), logits_of(two))
    two.unfuse_lora()
    assert two.get_active_adapters() == ["a"]
    torch.testing.assert_close(logits_of(two), only_a, atol=1e-5, rtol=1e-5)


def test_merging_that_fails_changes_nothing(two, tmp_path):
    two.transformer.layers[1].mlp.fc2.lora_B["b"].weight.data.fill_(torch.nan)
    two.set_adapters("a")
    logits = logits_of(two)
    with pytest.raises(ValueError, match="NaN"):
        two.fuse_lora(adapter_names=["b"], safe_fusing=True)
    assert two.get_list_adapters() == {"transformer": ["a", "b"]}
    torch.testing.assert_close(logits_of(two), logits, atol=1e-5, rtol=1e-5)


def test_labels_come_back_out_of_merged_adapters(pipe, tmp_path):
    make_adapter(tmp_path, labels=NEW_LABELS)
    before = state_of(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    logits = logits_of(pipe)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    torch.testing.assert_close(logits_of(pipe), logits, atol=1e-5, rtol=1e-5)
    pipe.unload_lora_weights()
    assert state_of(pipe.transformer)[1:] == before[1:]
    for name, weight in pipe.transformer.state_dict().items():
        torch.testing.assert_close(weight, before[0][name], atol=1e-6, rtol=1e-6)


def test_what_can_no_longer_be_taken_out(pipe, tmp_path):
    make_adapter(tmp_path, train_labels=False)
    with pytest.raises(ValueError, match="`unfuse_lora` found nothing"):
        pipe.unfuse_lora()
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="`unfuse_lora` found nothing"):
        pipe.unfuse_lora()
    pipe.fuse_lora()
    fused = logits_of(pipe)
    pipe.transformer.set_labels({0: "crane"})
    with pytest.raises(ValueError, match="labels were changed after `fuse_lora`"):
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="`unfuse_lora` found nothing"):
        pipe.unfuse_lora()
    assert fused.isfinite().all()


def test_loading_switches_adapters_on(pipe, tmp_path):
    trained = make_adapter(tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="first")
    pipe.disable_lora()
    pipe.load_lora_weights(tmp_path, adapter_name="second")
    assert torch.equal(logits_of(pipe), logits_of(trained))


def test_adapters_are_moved_alone(two):
    logits = logits_of(two)
    two.set_lora_device(["a"], "meta")
    weights = dict(two.transformer.named_parameters())
    assert {weight.device.type for name, weight in weights.items() if ".a." in name} == {"meta"}
    assert any("class_embedding" in name and ".a." in name for name in weights)
    assert {weight.device.type for name, weight in weights.items() if ".a." not in name} == {"cpu"}
    assert torch.equal(logits_of(two), logits)


def test_a_compiled_transformer_has_adapters(tmp_path):
    make_adapter(tmp_path)
    pipe = VARPipeline(torch.compile(make_transformer(), backend="eager"), make_vqvae())
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert pipe.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.set_adapters(3), r"`adapter_names` must be among \['a', 'b'\], got 3"),
        (lambda pipe: pipe.set_adapters([3]), r"`adapter_names` must be among \['a', 'b'\], got \[3\]"),
        (lambda pipe: pipe.set_adapters([["a"]]), r"`adapter_names` must be among"),
        (lambda pipe: pipe.set_adapters("a", "1"), "`adapter_weights` must be a number or 1 of them, got '1'"),
        (lambda pipe: pipe.set_adapters("a", [True]), "`adapter_weights` must be a number"),
        (lambda pipe: pipe.set_adapters("a", float("nan")), "`adapter_weights` must be a number"),
        (lambda pipe: pipe.set_adapters("a", {"a": 1}), "`adapter_weights` must be a number"),
        (lambda pipe: pipe.delete_adapters(["a", "c"]), r"`adapter_names` must be among \['a', 'b'\]"),
        (lambda pipe: pipe.delete_adapters(None), "`adapter_names` must be among"),
        (lambda pipe: pipe.set_lora_device("c", "cpu"), "`adapter_names` must be among"),
        (lambda pipe: pipe.save_lora_weights("x"), r"`adapter_name` must be one of \['a', 'b'\], got None"),
        (lambda pipe: pipe.save_lora_weights("x", ["a"]), r"`adapter_name` must be one of"),
        (lambda pipe: pipe.fuse_lora(0.5), r"`components` must be \['transformer'\], got 0.5"),
        (lambda pipe: pipe.fuse_lora(["vqvae"]), r"`components` must be \['transformer'\]"),
        (lambda pipe: pipe.fuse_lora(lora_scale="1"), "`lora_scale` must be a finite number, got '1'"),
        (lambda pipe: pipe.fuse_lora(adapter_names=["c"]), "`adapter_names` must be among"),
        (lambda pipe: pipe.load_lora_weights(3), "`pretrained_model_name_or_path` must be a folder or repository"),
        (
            lambda pipe: pipe.load_lora_weights("x", adapter_name=3),
            "`adapter_name` must be a name without dots, got 3",
        ),
        (lambda pipe: pipe.load_lora_weights("x", adapter_name="a.b"), "`adapter_name` must be a name without dots"),
    ],
)
def test_wrong_arguments_change_nothing(two, call, message):
    logits = logits_of(two)
    with pytest.raises(ValueError, match=message):
        call(two)
    assert two.get_list_adapters() == {"transformer": ["a", "b"]}
    assert torch.equal(logits_of(two), logits)
