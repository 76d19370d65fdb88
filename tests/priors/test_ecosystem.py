# SPDX-License-Identifier: Apache-2.0
"""What users of transformers, PEFT and diffusers' training tools expect of any model."""

import inspect

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import is_peft_greater_or_equal

from hf_var import VARTransformer, VARTransformerOutput
from hf_var.compatibility import enable_activation_checkpointing
from priors.tiny import logits_block_by_block, tiny_inputs, tiny_model


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def inputs(model):
    return tiny_inputs(model.config)


def training_step(model, inputs):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model.train()(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def test_main_input_is_the_first_argument():
    names = list(inspect.signature(VARTransformer.forward).parameters)
    assert names[1] == VARTransformer.main_input_name == "class_labels"
    # Without a `generate` of its own the model must not claim one.
    assert not VARTransformer.can_generate()


@pytest.mark.parametrize("first", ["sdpa", "eager"])
def test_attention_can_be_changed_on_a_live_model(first):
    model = tiny_model(first)
    inputs = tiny_inputs(model.config)
    second = {"sdpa": "eager", "eager": "sdpa"}[first]
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation(second)
        assert model.config._attn_implementation == second
        seen = []
        handle = model.layers[0].attention.register_forward_hook(lambda _, args, output: seen.append(output[1]))
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        handle.remove()
    assert (seen[0] is not None) == (second == "eager")


def test_sdpa_is_the_default(model):
    assert VARTransformer(model.config).config._attn_implementation == "sdpa"


def test_hidden_states_by_argument_and_configuration(model, inputs):
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        assert model(**inputs).hidden_states is None
        seen.clear()
        hidden_states = model(**inputs, output_hidden_states=True).hidden_states
        assert len(hidden_states) == len(model.layers) + 1 == 3
        assert torch.equal(hidden_states[0], seen[0][0])
        for state, (_, output) in zip(hidden_states[1:], seen, strict=True):
            assert torch.equal(state, output)
            assert state.shape == (3, 11, 32)
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == 3
        assert model(**inputs, output_hidden_states=False).hidden_states is None


def test_attentions_by_argument_and_configuration(inputs):
    model = tiny_model("eager")
    with torch.no_grad():
        assert model(**inputs).attentions is None
        attentions = model(**inputs, output_attentions=True).attentions
        model.config.output_attentions = True
        assert len(model(**inputs).attentions) == 2
    assert len(attentions) == 2
    blocks = torch.tensor([0] * 1 + [1] * 4 + [2] * 6)
    for weights in attentions:
        assert weights.shape == (3, 2, 11, 11)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 11))
        assert ((weights > 0) == (blocks[None, :] <= blocks[:, None])).all()


def test_a_plain_tuple_begins_with_the_loss(model, inputs):
    with torch.no_grad():
        expected = model(**inputs)
        assert isinstance(expected, VARTransformerOutput)
        plain = model(**inputs, return_dict=False, use_cache=True, output_hidden_states=True)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], expected.loss)
        assert torch.equal(plain[1], expected.logits)
        assert plain[2].get_seq_length() == 11
        assert len(plain[3]) == 3
        del inputs["labels"]
        (logits,) = model(**inputs, return_dict=False)
        assert torch.equal(logits, expected.logits)
        model.config.return_dict = False
        assert isinstance(model(**inputs), tuple)


def test_embeddings_are_found_and_can_be_replaced(model, inputs):
    assert model.get_input_embeddings() is model.embeddings.input_proj
    assert model.get_output_embeddings() is model.head
    expected = model(**inputs).logits
    replacement = torch.nn.Linear(4, 32)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is model.embeddings.input_proj is replacement
    assert not torch.allclose(model(**inputs).logits, expected, atol=0.1)
    head = torch.nn.Linear(32, model.config.codebook_size)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.head is head


def test_adapters_train_through_reentrant_checkpointing(model, inputs):
    """With all weights frozen, nothing that enters the first layer needs a gradient unless it is asked to."""
    model.requires_grad_(False)
    model.layers[0].attention.q_proj.requires_grad_(True)
    enable_activation_checkpointing(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()(**inputs).loss.backward()
    assert model.layers[0].attention.q_proj.weight.grad.abs().sum() > 0
    model.disable_input_require_grads()
    assert not model._require_grads_hooks


def test_lora_trains_its_adapters_alone_and_merges(model, inputs, tmp_path):
    torch.manual_seed(0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(**inputs).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=ADAPTED, r=4))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * len(ADAPTED)
    with torch.no_grad():
        assert torch.equal(adapted.eval()(**inputs).logits, expected)
    first_loss = adapted(**inputs).loss
    # The second matrix begins at zero, so the first one learns from the second step on.
    adapters = {name: p.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    for _ in range(2):
        training_step(adapted, inputs)
    for name, parameter in adapted.named_parameters():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, adapters[name] if name in adapters else before[plain_name]) != (name in adapters)
    with torch.no_grad():
        tuned = adapted(**inputs)
        assert tuned.loss < first_loss
        # Stepping goes through the adapters as well.
        torch.testing.assert_close(logits_block_by_block(adapted.base_model.model, inputs), tuned.logits, **CLOSE)
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
        torch.testing.assert_close(loaded.eval()(**inputs).logits, tuned.logits, **CLOSE)
        merged = adapted.merge_and_unload()
        assert isinstance(merged, VARTransformer)
        assert merged.state_dict().keys() == before.keys()
        torch.testing.assert_close(merged(**inputs).logits, tuned.logits, **CLOSE)


@pytest.mark.skipif(
    not is_peft_greater_or_equal(MIN_PEFT_VERSION), reason=f"this transformers wants PEFT {MIN_PEFT_VERSION}"
)
def test_lora_through_the_interface_of_transformers(model, inputs, tmp_path):
    expected = model(**inputs).logits
    model.add_adapter(LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    # The output projection is not adapted; the projections of AdaLN and of the inputs are.
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert "head" not in adapted
    assert {"layers.0.attention.q_proj", "layers.1.mlp.fc2", "layers.0.adaln.linear"} < adapted
    with torch.no_grad():
        tuned = model(**inputs).logits
        assert not torch.allclose(tuned, expected, atol=0.1)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").exists()
        other = tiny_model()
        other.load_adapter(tmp_path)
        torch.testing.assert_close(other(**inputs).logits, tuned, **CLOSE)
        other.disable_adapters()
        torch.testing.assert_close(other(**inputs).logits, expected, **CLOSE)


def test_moving_average_of_the_weights(model, inputs):
    average = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    # The first step only copies.
    average.step(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    training_step(model, inputs)
    after = [parameter.detach().clone() for parameter in model.parameters()]
    average.step(model.parameters())
    expected = [(old + new) / 2 for old, new in zip(before, after, strict=True)]
    average.store(model.parameters())
    average.copy_to(model.parameters())
    for parameter, mean in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), mean)
    average.restore(model.parameters())
    for parameter, new in zip(model.parameters(), after, strict=True):
        assert torch.equal(parameter, new)


def test_capabilities_are_declared():
    assert issubclass(VARTransformer, PreTrainedModel)
    assert VARTransformer.supports_gradient_checkpointing
    assert VARTransformer._no_split_modules == ["VARBlock"]
    assert VARTransformer._skip_keys_device_placement == ["cache", "past_key_values"]
    assert VARTransformer.config_class.keys_to_ignore_at_inference == ["cache", "past_key_values"]
    model = tiny_model()
    assert {type(layer).__name__ for layer in model.layers} == {"VARBlock"}
    assert dict(model.named_buffers()) == {}
