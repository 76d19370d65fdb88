# SPDX-License-Identifier: Apache-2.0
"""LoRA in a pipeline: it draws what was trained, can be mixed, merged and removed."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers.training_utils import EMAModel

from hf_var import VARPipeline
from hf_var.training.lora import save_lora
from pipelines.adapted import (
    NEW_LABELS,
    assert_equal,
    assert_state,
    draw,
    give_adapter,
    logits_of,
    make_adapter,
    state_of,
)
from pipelines.tiny import LABEL_NAMES, make_pipeline, make_transformer, make_vqvae


CASES = [
    pytest.param({}, id="same_labels"),
    pytest.param({"train_labels": False}, id="projections_alone"),
    pytest.param({"labels": NEW_LABELS}, id="other_labels"),
    pytest.param({"target_modules": ["q_proj", "linear", "head", "input_proj"]}, id="other_layers"),
]


@pytest.mark.parametrize("case", CASES)
def test_loaded_merged_and_removed(pipe, case, tmp_path):
    trained = make_adapter(tmp_path / "lora", **case)
    base, before = draw(pipe), state_of(pipe.transformer)
    expected, logits = draw(trained), logits_of(trained)
    assert not torch.allclose(logits, logits_of(pipe), atol=0.3)

    pipe.load_lora_weights(tmp_path / "lora")
    assert pipe.transformer.config.id2label == case.get("labels", LABEL_NAMES)
    assert_equal(draw(pipe), expected)
    pipe.unload_lora_weights()
    assert_state(pipe.transformer, before)
    assert_equal(draw(pipe), base)

    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    torch.testing.assert_close(logits_of(pipe), logits, atol=1e-4, rtol=1e-4)
    assert [(name, type(module)) for name, module in pipe.transformer.named_modules()] == before[1]
    assert pipe.transformer.state_dict().keys() == before[0].keys()
    assert pipe.transformer.config.id2label == case.get("labels", LABEL_NAMES)
    assert {parameter.requires_grad for parameter in pipe.transformer.parameters()} == {True}
    merged = draw(pipe)
    assert torch.equal(merged.codes, expected.codes)
    torch.testing.assert_close(merged.images, expected.images, atol=1e-4, rtol=1e-4)
    # As in diffusers, where fused layers are unloaded before saving: what is merged stays.
    pipe.unload_lora_weights()
    assert_equal(draw(pipe), merged)
    pipe.save_pretrained(tmp_path / "merged")
    loaded = VARPipeline.from_pretrained(tmp_path / "merged")
    assert_equal(draw(loaded), merged)
    assert loaded.transformer.config.id2label == pipe.transformer.config.id2label


def test_the_trained_pipeline_itself_is_merged_or_freed(tmp_path):
    """Without a folder in between, as at the end of a training."""
    trained = make_adapter(tmp_path, labels=NEW_LABELS)
    logits = logits_of(trained)
    trained.fuse_lora()
    torch.testing.assert_close(logits_of(trained), logits, atol=1e-4, rtol=1e-4)
    trained.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(VARPipeline.from_pretrained(tmp_path / "merged")), logits_of(trained))
    pipe = make_pipeline()
    pipe.transformer.set_labels(NEW_LABELS)
    base = logits_of(pipe)
    give_adapter(pipe.transformer)
    pipe.unload_lora_weights()
    assert torch.equal(logits_of(pipe), base)


def test_a_copy_is_merged_while_the_original_trains_on(tmp_path):
    """How a run saves a whole pipeline on its way, from averaged weights."""
    trained = make_adapter(tmp_path, labels=NEW_LABELS)
    parameters = list(trained.transformer.parameters())
    average = EMAModel(parameters, decay=0.5)
    logits = logits_of(trained)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(0.1)
    names, own = list(trained.transformer.state_dict()), logits_of(trained)
    average.store(parameters)
    average.copy_to(parameters)
    merged = VARPipeline(copy.deepcopy(trained.transformer), trained.vqvae)
    average.restore(parameters)
    merged.fuse_lora()
    merged.save_pretrained(tmp_path / "merged")
    loaded = VARPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(loaded), logits, atol=1e-4, rtol=1e-4)
    assert list(trained.transformer.state_dict()) == names
    assert torch.equal(logits_of(trained), own)
    assert not torch.allclose(own, logits, atol=0.1)


def test_labels_chosen_by_name_come_and_go(pipe, tmp_path):
    make_adapter(tmp_path, labels=NEW_LABELS)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_label_ids(["toad", "goldfish", None]) == [2, 1, 3]
    with pytest.raises(ValueError, match="unknown name 'snowy owl'"):
        pipe("snowy owl")
    pipe.unload_lora_weights()
    assert pipe.get_label_ids("snowy owl") == [3]


@pytest.mark.parametrize("base", [0, 3], ids=["unconditional", "conditional"])
def test_from_and_to_models_without_labels(base, tmp_path):
    labels = None if base else NEW_LABELS
    trained = make_pipeline({"num_labels": base})
    trained.transformer.set_labels(labels)
    save_lora(give_adapter(trained.transformer), tmp_path)
    pipe = make_pipeline({"num_labels": base})
    before = state_of(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    ids = [0, None, len(labels or {})]
    assert_equal(draw(pipe, ids), draw(trained, ids))
    pipe.unload_lora_weights()
    assert_state(pipe.transformer, before)


def test_fewer_labels_without_an_embedding_of_their_own(pipe, tmp_path):
    """Their rows are in the model beneath."""
    trained = make_adapter(tmp_path, labels={0: "goldfish", 1: "tench, Tinca tinca"}, train_labels=False)
    before = state_of(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    assert_equal(draw(pipe, [0, 1, 2]), draw(trained, [0, 1, 2]))
    pipe.unload_lora_weights()
    assert_state(pipe.transformer, before)


# --------------------------------------------------------------------------------------------------------------------
# Several adapters


def test_adapters_are_chosen_weighted_and_mixed(pipe, tmp_path):
    trained = {name: make_adapter(tmp_path / name, seed=seed, train_labels=False) for seed, name in enumerate("ab")}
    base = state_of(pipe.transformer)
    plain = logits_of(pipe)
    pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    pipe.load_lora_weights(tmp_path / "b", adapter_name="b")
    # The newest one is active.
    assert torch.equal(logits_of(pipe), logits_of(trained["b"]))
    pipe.set_adapters("a")
    assert torch.equal(logits_of(pipe), logits_of(trained["a"]))
    pipe.set_adapters("a", 0.0)
    assert torch.equal(logits_of(pipe), plain)
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    mixed = logits_of(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(logits_of(pipe), mixed, atol=1e-4, rtol=1e-4)
    name = "layers.1.mlp.fc1"
    weight = base[0][f"{name}.weight"].clone()
    for adapter, strength in (("a", 0.5), ("b", 2.0)):
        layer = trained[adapter].transformer.get_submodule(name)
        weight += strength * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    torch.testing.assert_close(pipe.transformer.state_dict()[f"{name}.weight"], weight)


def test_an_adapter_with_labels_beside_one_without(pipe, tmp_path):
    trained = make_adapter(tmp_path / "labels", labels=NEW_LABELS)
    make_adapter(tmp_path / "layers", labels={1: "goldfish", 0: "crane"}, seed=1, train_labels=False)
    (tmp_path / "layers" / "labels.json").unlink()
    before = state_of(pipe.transformer)
    pipe.load_lora_weights(tmp_path / "labels")
    pipe.load_lora_weights(tmp_path / "layers")
    both = list(pipe.transformer.peft_config)
    assert both == ["default_0", "default_1"]
    table = pipe.transformer.embeddings.class_embedding
    assert torch.equal(table(torch.tensor([0])), table.original_module(torch.tensor([0])))
    pipe.set_adapters("default_0")
    assert_equal(draw(pipe), draw(trained))
    pipe.set_adapters(both)
    assert torch.equal(table(torch.tensor([0])), table.modules_to_save["default_0"](torch.tensor([0])))
    pipe.unload_lora_weights()
    assert_state(pipe.transformer, before)


def test_what_cannot_be_chosen_or_mixed(pipe, tmp_path):
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, seed=seed)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    logits = logits_of(pipe)
    with pytest.raises(ValueError, match=r"`adapter_names` must be among \['a', 'b'\], got 'c'"):
        pipe.set_adapters("c")
    with pytest.raises(ValueError, match="`adapter_names` must be among"):
        pipe.set_adapters([])
    with pytest.raises(ValueError, match="`adapter_weights` must be a number or 1 of them"):
        pipe.set_adapters("a", [1.0, 2.0])
    with pytest.raises(ValueError, match="Only one adapter can be set"):
        pipe.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="`adapter_name` = 'a' is taken"):
        pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    make_adapter(tmp_path / "other", labels=NEW_LABELS)
    with pytest.raises(ValueError, match="has other labels than those already loaded: call `fuse_lora"):
        pipe.load_lora_weights(tmp_path / "other")
    assert torch.equal(logits_of(pipe), logits)


def test_strength_of_what_is_merged(pipe, tmp_path):
    make_adapter(tmp_path, train_labels=False)
    pipe.load_lora_weights(tmp_path)
    pipe.set_adapters("default_0", 0.5)
    expected = logits_of(pipe)
    pipe.set_adapters("default_0")
    pipe.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(logits_of(pipe), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="`fuse_lora` found no adapter: call `load_lora_weights` first"):
        pipe.fuse_lora()


# --------------------------------------------------------------------------------------------------------------------
# In company


def test_half_precision(tmp_path):
    make_adapter(tmp_path, labels=NEW_LABELS)
    pipe = make_pipeline().to(torch.bfloat16)
    before = state_of(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert draw(pipe).images.isfinite().all()
    pipe.unload_lora_weights()
    assert_state(pipe.transformer, before)


def test_a_transformer_shared_by_two_pipelines(pipe, tmp_path):
    before, second = state_of(pipe.transformer), VARPipeline.from_pipe(pipe)
    make_adapter(tmp_path, labels=NEW_LABELS)
    pipe.load_lora_weights(tmp_path)
    second.unload_lora_weights()
    assert_state(pipe.transformer, before)


def test_a_compiled_transformer(tmp_path):
    trained = make_adapter(tmp_path, labels=NEW_LABELS)
    transformer = make_transformer()
    before = state_of(transformer)
    pipe = VARPipeline(torch.compile(transformer, backend="eager"), make_vqvae())
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(logits_of(pipe), logits_of(trained), atol=1e-5, rtol=1e-5)
    pipe.unload_lora_weights()
    assert_state(transformer, before)


def test_offloading_comes_after_the_adapter(pipe, tmp_path):
    trained = make_adapter(tmp_path, labels=NEW_LABELS)
    pipe.load_lora_weights(tmp_path)
    expected = draw(trained)
    pipe.enable_model_cpu_offload(device="cpu")
    assert_equal(draw(pipe), expected)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert_equal(draw(pipe), expected)
    for call in (pipe.unload_lora_weights, pipe.fuse_lora, lambda: make_and_load(pipe, tmp_path)):
        with pytest.raises(ValueError, match="`transformer` is offloaded in parts"):
            call()


def make_and_load(pipe, folder):
    pipe.load_lora_weights(folder, adapter_name="second")


def test_whole_model_offload_may_come_first(pipe, tmp_path):
    trained = make_adapter(tmp_path, labels=NEW_LABELS)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_lora_weights(tmp_path)
    assert_equal(draw(pipe), draw(trained))


def test_nothing_of_this_needs_peft(tmp_path):
    """PEFT is an extra: without it a pipeline draws and saves, and says what is missing."""
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    script = """
import importlib.metadata, importlib.util, sys

class NoPeft:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")

sys.meta_path.insert(0, NoPeft())
find, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
from hf_var import VARPipeline

assert "peft" not in sys.modules
pipe = VARPipeline.from_pretrained(sys.argv[1] + "/pipeline")
pipe(0, output_type="pt")
pipe.save_pretrained(sys.argv[1] + "/again")
pipe.unload_lora_weights()
for call in (lambda: pipe.load_lora_weights("lora"), pipe.fuse_lora):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "PEFT is not installed" in result.stdout
    assert "`fuse_lora` found no adapter" in result.stdout
