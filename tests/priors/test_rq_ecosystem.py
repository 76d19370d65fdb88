# SPDX-License-Identifier: Apache-2.0
"""What transformers, PEFT, accelerate and torch.compile expect of any model, of RQ-Transformers."""

import copy
import inspect

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModel, StaticCache, Trainer, TrainingArguments

from hf_var import RQTransformer, RQTransformerConfig
from hf_var.compatibility import enable_activation_checkpointing
from priors.rq import KINDS, condition_of, rq_inputs, rq_model, stacks_of
from priors.tiny import tiny_model


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CPU = torch.device("cpu")
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@pytest.fixture(params=["classes", "tokens", "prefix_gpt"])
def model(request):
    return rq_model(request.param)


@pytest.fixture
def inputs(model):
    return rq_inputs(model.config)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def all_logits(model):
    """Of all codes in one call, and of one code after a step with a cache."""
    inputs = rq_inputs(model.config)
    first, codes = condition_of(inputs), inputs["labels"]
    step = model(**first, **stacks_of(model.config, codes[:, :2]), use_cache=True)
    before = stacks_of(model.config, codes[:, 2, :1] if model.config.depth > 1 else None)
    return [model(**inputs).logits, model.predict_depth(step.context[:, -1], **before)]


# --- transformers ----------------------------------------------------------------------------------------------------


def test_main_input_is_the_first_argument():
    names = list(inspect.signature(RQTransformer.forward).parameters)
    assert names[1] == RQTransformer.main_input_name == "class_labels"
    assert not RQTransformer.can_generate()


def test_hidden_states_and_attentions_are_those_of_the_positions(inputs, model):
    config = model.config
    model.set_attn_implementation("eager")
    length = config.condition_length + config.num_positions - 1
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(3, length, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(3, 2, length, length)] * 2
    assert torch.equal(output.hidden_states[-1][:, config.condition_length - 1 :], output.context)
    assert (output.attentions[0].triu(1) == 0).all()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="`output_attentions` needs the attention implementation 'eager', not 'flex"):
        model(**inputs, output_attentions=True)


def test_a_plain_tuple_begins_with_the_loss(model, inputs):
    expected = model(**inputs)
    plain = model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], expected.loss)
    assert torch.equal(plain[1], expected.logits)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)
    assert model.predict_depth(expected.context[:, 0]).shape == (3, 11)


def test_embeddings_are_found_and_can_be_replaced(model, inputs):
    embeddings = model.embeddings
    assert model.get_input_embeddings() is (embeddings.input_proj or embeddings.code_embedding)
    assert model.get_output_embeddings() is model.head.projections[0]
    expected = model(**inputs).logits
    replacement = copy.deepcopy(model.get_input_embeddings())
    torch.nn.init.normal_(replacement.weight)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement
    assert not torch.allclose(model(**inputs).logits, expected, atol=0.1)
    head = torch.nn.Linear(32, 11)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.head.projections[0] is head


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    model = rq_model(kind)
    model.save_pretrained(tmp_path)
    for loaded in (RQTransformer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is RQTransformer
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for found, expected in zip(all_logits(loaded), all_logits(model), strict=True):
            assert torch.equal(found, expected)
    assert type(AutoConfig.from_pretrained(tmp_path)) is RQTransformerConfig
    assert AutoConfig.for_model("hf_var_rq").to_dict() == RQTransformerConfig().to_dict()


def test_a_folder_of_other_weights_or_of_another_model_is_refused(model, tmp_path):
    weights = {name: tensor for name, tensor in model.state_dict().items() if "position" not in name}
    model.save_pretrained(tmp_path / "parts", state_dict=weights)
    with pytest.raises(ValueError, match=r"do not fit its config.json: missing .*position_embedding"):
        RQTransformer.from_pretrained(tmp_path / "parts")
    tiny_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds a model of type 'hf_var', but RQTransformerConfig needs 'hf_var_rq'"):
        RQTransformer.from_pretrained(tmp_path / "other")


def test_a_new_model_is_initialised_as_the_official_one():
    config = rq_model("classes", hidden_size=256).config
    for name, tensor in RQTransformer(config).state_dict().items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name


def test_meta_device(model):
    with torch.device("meta"):
        empty = RQTransformer(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert dict(empty.named_buffers()) == {}
    empty.load_state_dict(model.state_dict(), assign=True)
    for found, expected in zip(all_logits(empty.eval()), all_logits(model), strict=True):
        assert torch.equal(found, expected)


def test_half_precision(model):
    expected = all_logits(model)
    for found, logits in zip(all_logits(model.to(torch.bfloat16)), expected, strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - logits).std() < 0.1 * logits.std()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(model, inputs, use_reentrant):
    expected = gradients(model.train(), inputs)
    calls = []
    for layer in (model.layers[0], *model.depth_layers[:1]):
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
    enable_activation_checkpointing(model, {"use_reentrant": use_reentrant})
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **CLOSE)
    assert len(calls) == 2 * (1 + bool(len(model.depth_layers)))
    with torch.no_grad():
        assert model(**condition_of(inputs), use_cache=True).cache.get_seq_length() > 0
    # A step that is trained through reads no cache.
    assert model(**condition_of(inputs), use_cache=True).cache is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_gradient(kind):
    """Distributed training waits for each."""
    model = rq_model(kind)
    inputs = rq_inputs(model.config)
    model.train()(**inputs).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_dropout_of_every_kind_acts_in_training_only(inputs, model):
    for name in ("dropout", "embedding_dropout", "attention_dropout"):
        other = RQTransformer(RQTransformerConfig.from_dict({**model.config.to_dict(), name: 0.5}))
        other.load_state_dict(model.state_dict())
        expected = model(**inputs).logits
        assert torch.equal(other.eval()(**inputs).logits, expected)
        assert not torch.allclose(other.train()(**inputs).logits, expected, atol=1e-3)


def test_lora(model, inputs, tmp_path):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(**inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules=ADAPTED, r=4))
    num_layers = len(model.layers) + len(model.depth_layers)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == num_layers * len(ADAPTED)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        adapted.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tuned = adapted.eval()(**inputs)
        assert tuned.loss < expected.loss
        adapted.save_pretrained(tmp_path)
        twin = RQTransformer(model.config)
        twin.load_state_dict(before)
        loaded = PeftModel.from_pretrained(twin, tmp_path)
        torch.testing.assert_close(loaded.eval()(**inputs).logits, tuned.logits, **CLOSE)
        merged = adapted.merge_and_unload()
        assert merged.state_dict().keys() == before.keys()
        torch.testing.assert_close(merged(**inputs).logits, tuned.logits, atol=1e-4, rtol=1e-4)


def test_batches_that_transformers_trainer_accumulates_are_one_large_batch(tmp_path):
    model = rq_model("tokens")
    inputs = rq_inputs(model.config, batch_size=8)
    rows = [{name: values[row] for name, values in inputs.items()} for row in range(8)]
    expected = gradients(copy.deepcopy(model), inputs)["head.norm.bias"]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
    )
    trainer, found = Trainer(model, arguments, train_dataset=rows), []
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: found.append(model.head.norm.bias.grad.clone()))
    trainer.train()
    torch.testing.assert_close(found[0], expected, **CLOSE)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("kind", "num_depth_layers"), [("text", 1), ("prefix_gpt", 0)])
def test_training_forward_compiles_into_one_graph(kind, num_depth_layers):
    sizes = {"num_hidden_layers": 1, "num_depth_layers": num_depth_layers}
    model = rq_model(kind, class_dropout_prob=0.0, **sizes).train()
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = rq_inputs(model.config, seed=seed)
        output, expected = compiled(**inputs), twin(**inputs)
        torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
        found = gradients(compiled, inputs)
        for name, gradient in gradients(twin, inputs).items():
            torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, msg=name, **CLOSE)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["classes", "gpt"])
def test_one_graph_serves_every_step_with_a_static_cache(kind):
    model = rq_model(kind, num_hidden_layers=1)
    inputs, config = rq_inputs(model.config), model.config
    expected, codes = model(**inputs).context, inputs["labels"]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache = StaticCache(config, config.num_positions)
    # The first call allocates the cache, which is not compiled.
    model(**condition_of(inputs), cache=cache)
    for position in range(1, config.num_positions):
        step = compiled(**stacks_of(config, codes[:, position - 1 : position]), cache=cache)
        torch.testing.assert_close(step.context[:, 0], expected[:, position], **CLOSE)
    assert counter.frame_count == 1
    # For the next images as well.
    cache.reset()
    other = compiled(inputs["class_labels"], cache=cache)
    torch.testing.assert_close(other.context[:, 0], expected[:, 0], **CLOSE)
    step = compiled(**stacks_of(config, codes[:, :1]), cache=cache)
    torch.testing.assert_close(step.context[:, 0], expected[:, 1], **CLOSE)
    assert counter.frame_count == 2


# --- weights that live elsewhere -------------------------------------------------------------------------------------


def test_cpu_offload(model):
    twin = copy.deepcopy(model)
    cpu_offload(model, execution_device=CPU)
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "arguments",
    [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}],
    ids=["block", "leaf"],
)
def test_group_offloading_of_diffusers(model, arguments):
    twin = copy.deepcopy(model)
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **arguments)
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)


def test_capabilities_are_declared(model):
    assert RQTransformer.supports_gradient_checkpointing
    assert RQTransformer._no_split_modules == ["RQLayer"]
    assert {type(layer).__name__ for layer in (*model.layers, *model.depth_layers)} == {"RQLayer"}
    assert RQTransformer._skip_keys_device_placement == ["cache", "past_key_values"]
