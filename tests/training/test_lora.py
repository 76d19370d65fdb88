# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by LoRA: what is trained, what is saved, and that it comes back whole."""

import json

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import PeftModel
from safetensors.torch import load_file

from hf_var import VARTransformer
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.training.lora import LORA_TARGETS, add_lora, save_lora
from priors.tiny import logits_block_by_block, tiny_inputs, tiny_model


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TABLE = "embeddings.class_embedding.modules_to_save.default.weight"
NEW_LABELS = {0: "newt", 1: "LABEL_3", 2: "toad"}


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def inputs(model):
    return tiny_inputs(model.config) | {"class_labels": torch.tensor([0, 1, 2])}


def train(model, inputs, steps=4):
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**inputs).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits_of(model, inputs):
    return model(inputs["class_labels"], inputs["scale_inputs"]).logits


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_begins_as_nothing_and_trains_alone(model, inputs):
    expected = logits_of(model, inputs)
    parameters = add_lora(model, rank=2)
    assert torch.equal(logits_of(model, inputs), expected)
    names = trainable_names(model)
    lora = {name for name in names if ".lora_" in name}
    assert names == lora | {TABLE}
    assert {name.split(".")[3] for name in lora} == set(LORA_TARGETS)
    assert len(lora) == 2 * len(LORA_TARGETS) * model.config.num_hidden_layers
    assert [id(parameter) for parameter in parameters] == [id(p) for p in model.parameters() if p.requires_grad]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, inputs)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == names


def test_rank_and_strength(model, inputs):
    add_lora(model, rank=3, alpha=6, target_modules=["q_proj", "mlp.fc1"], train_labels=False)
    layer = model.layers[0].attention.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling["default"] == 2
    assert {name.rpartition(".lora_")[0] for name in trainable_names(model)} == {
        f"layers.{layer}.{part}" for layer in range(2) for part in ("attention.q_proj", "mlp.fc1")
    }
    default = tiny_model()
    add_lora(default, rank=3)
    assert default.layers[0].mlp.fc2.scaling["default"] == 1


def test_dropout_acts_in_training_alone(model, inputs):
    add_lora(model, rank=4, dropout=0.5)
    train(model, inputs)
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs))
    model.train()
    model.config.class_dropout_prob = 0.0
    assert not torch.allclose(logits_of(model, inputs), logits_of(model, inputs), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, "`rank` must be an integer of at least 1, got 2.0"),
        ({"alpha": 0}, "`alpha` must be positive, got 0"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"target_modules": ["q_proj", "query"]}, r"`target_modules` must be among .*'fc1'.*got \['query'\]"),
        ({"target_modules": ["proj"]}, r"got \['proj'\]"),
        ({"target_modules": ["class_embedding"]}, r"got \['class_embedding'\]"),
        ({"target_modules": []}, r"`target_modules` must be among the linear layers .*got \[\]"),
    ],
    ids=str,
)
def test_bad_arguments_leave_the_model_alone(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model, **arguments)
    assert {parameter.requires_grad for parameter in model.parameters()} == {True}
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_a_second_adapter_and_labels_left_behind_are_refused(model):
    model.set_labels(NEW_LABELS)
    with pytest.raises(ValueError, match=r"`train_labels` must be true: the labels \['newt', 'toad'\] are new"):
        add_lora(model, train_labels=False)
    add_lora(model)
    with pytest.raises(ValueError, match="`transformer` has an adapter already"):
        add_lora(model)


@pytest.mark.parametrize("train_labels", [True, False])
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln_per_layer", "shared_adaln"])
def test_saved_adapters_come_back(inputs, train_labels, shared_adaln, tmp_path):
    model = tiny_model(shared_adaln=shared_adaln)
    expected_base = logits_of(model, inputs)
    add_lora(model, rank=2, train_labels=train_labels)
    expected = logits_of(train(model, inputs), inputs)
    assert not torch.allclose(expected, expected_base, atol=0.1)
    save_lora(model, tmp_path / "lora")
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
    }
    assert (
        "class_embedding" in str(load_file(tmp_path / "lora" / "adapter_model.safetensors").keys())
    ) == train_labels
    wrapped = PeftModel.from_pretrained(tiny_model(shared_adaln=shared_adaln), tmp_path / "lora")
    assert torch.equal(logits_of(wrapped, inputs), expected)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), expected, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    loaded, report = VARTransformer.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits_of(loaded, inputs), logits_of(merged, inputs))


def test_changed_labels_travel_with_the_adapter(model, inputs, tmp_path):
    model.set_labels(NEW_LABELS)
    add_lora(model, rank=2)
    before = model.get_parameter(TABLE).detach().clone()
    train(model, inputs)
    # Every label of the batch was learned.
    assert (model.get_parameter(TABLE) != before).any(dim=1).tolist()[:3] == [True] * 3
    save_lora(model, tmp_path)
    names = {
        int(label): name for label, name in json.loads((tmp_path / "labels.json").read_text())["id2label"].items()
    }
    assert names == NEW_LABELS
    other = tiny_model()
    other.set_labels(names)
    assert torch.equal(logits_of(PeftModel.from_pretrained(other, tmp_path), inputs), logits_of(model, inputs))


def test_saving_from_a_state_dictionary_and_what_cannot_be_saved(model, inputs, tmp_path):
    with pytest.raises(ValueError, match=r"`transformer` must have one adapter, got \[\]"):
        save_lora(model, tmp_path)
    add_lora(model, rank=2)
    # As under FSDP, where the weights are gathered from all processes first.
    gathered = {name: weight + 1 for name, weight in model.state_dict().items()}
    save_lora(model, tmp_path, gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    name = "layers.1.mlp.fc2.lora_B"
    assert torch.equal(saved[f"base_model.model.{name}.weight"], gathered[f"{name}.default.weight"])
    assert len(saved) == len(trainable_names(model))


def test_saving_asks_nobody_else_about_the_model(model, tmp_path, recwarn):
    """PEFT would look on the Hub for the configuration of the model beneath."""
    model.name_or_path = "nobody/nothing"
    add_lora(model, rank=2)
    save_lora(model, tmp_path)
    assert not [warning for warning in recwarn if "config file" in str(warning.message)]


@pytest.mark.parametrize("name", ["user/model", None])
def test_the_model_beneath_is_named_but_no_folder_is(model, name, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base") if name is None else name
    add_lora(model, rank=2)
    save_lora(model, tmp_path / "lora")
    text = (tmp_path / "lora" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == name
    assert str(tmp_path) not in text
    # That of the live adapter stays.
    assert model.peft_config["default"].base_model_name_or_path == model.name_or_path


def test_moving_average_of_an_adapter(model, inputs, tmp_path):
    parameters = add_lora(model, rank=2)
    train(model, inputs)
    average = EMAModel(parameters, decay=0.5, min_decay=0.5)
    average.step(parameters)
    first = [parameter.detach().clone() for parameter in parameters]
    train(model, inputs)
    second = [parameter.detach().clone() for parameter in parameters]
    average.step(parameters)
    expected = logits_of(model, inputs)
    average.store(parameters)
    average.copy_to(parameters)
    for parameter, old, new in zip(parameters, first, second, strict=True):
        torch.testing.assert_close(parameter.detach(), (old + new) / 2)
    averaged = logits_of(model, inputs)
    assert not torch.allclose(averaged, expected, atol=1e-3)
    save_lora(model, tmp_path)
    average.restore(parameters)
    assert torch.equal(logits_of(model, inputs), expected)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits_of(loaded, inputs), averaged)


@pytest.mark.parametrize("train_labels", [True, False])
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("before", [True, False], ids=["enabled_before", "enabled_after"])
def test_checkpointing_gives_the_same_gradients(inputs, options, before, train_labels):
    gradients = {}
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = tiny_model(class_dropout_prob=0.0)
        if checkpointed and before:
            enable_activation_checkpointing(model, options)
        add_lora(model, rank=2, train_labels=train_labels)
        if checkpointed and not before:
            enable_activation_checkpointing(model, options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        model.train()(**inputs).loss.backward()
        gradients[checkpointed] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients[False].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)


def test_stepping_goes_through_the_adapter(model, inputs):
    add_lora(model, rank=2)
    train(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(logits_block_by_block(model, inputs), logits_of(model, inputs), **CLOSE)
