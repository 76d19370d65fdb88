# SPDX-License-Identifier: Apache-2.0
"""What transformers, PEFT, accelerate, diffusers and torch.compile expect of transformers that read texts."""

import copy
import inspect
import math

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModel

from hf_var import TextVARConfig, TextVARTransformer, VARCache
from hf_var.compatibility import add_adapter, enable_activation_checkpointing
from loading_checks import incomplete
from priors.text import (
    logits_by_calls,
    logits_in_one_call,
    logits_scale_by_scale,
    text_config,
    text_inputs,
    text_model,
    text_of,
)
from priors.tiny import tiny_model


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CPU = torch.device("cpu")
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "own_scale": {},
    "causal": {"is_causal": True},
    "plain": {"crop_conditioning": False, "intermediate_size": 40},
}


@pytest.fixture(params=KINDS)
def model(request):
    return text_model(**KINDS[request.param])


@pytest.fixture
def inputs(model):
    return text_inputs(model.config)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def all_logits(model):
    """Logits by every route: in one call, scale by scale, and of the text alone."""
    inputs = text_inputs(model.config)
    text = {name: values for name, values in text_of(inputs).items() if name != "crop_sizes"}
    return [model(**inputs).logits, logits_scale_by_scale(model, inputs), model(**text).logits]


def assert_same_logits(model, twin):
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)


# --- transformers ----------------------------------------------------------------------------------------------------


def test_main_input_is_the_first_argument():
    names = list(inspect.signature(TextVARTransformer.forward).parameters)
    assert names[1] == TextVARTransformer.main_input_name == "encoder_hidden_states"
    assert not TextVARTransformer.can_generate()


def test_hidden_states_and_attentions(model, inputs):
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(3, 11, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(3, 2, 11, 11)] * 2
    assert [weights.shape for weights in output.cross_attentions] == [(3, 2, 11, 5)] * 2
    scales = torch.tensor([0] + [1] * 4 + [2] * 6)
    seen = scales[None] <= scales[:, None] if model.config.is_causal else scales[None] == scales[:, None]
    for weights in output.attentions:
        assert ((weights > 0) == seen).all()
    for weights in output.cross_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 11))
        assert ((weights > 0) == inputs["encoder_attention_mask"].bool()[:, None, None]).all()
    assert model(**inputs).cross_attentions is None


def test_a_plain_tuple_begins_with_the_loss(model, inputs):
    expected = model(**inputs)
    plain = model(**inputs, return_dict=False)
    assert torch.equal(plain[0], expected.loss)
    assert torch.equal(plain[1], expected.logits)


def test_embeddings_are_found_and_can_be_replaced(model, inputs):
    assert model.get_input_embeddings() is model.embeddings.input_proj
    assert model.get_output_embeddings() is model.head
    expected, head = model(**inputs).logits, torch.nn.Linear(32, 19)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.head is head
    assert not torch.allclose(model(**inputs).logits, expected, atol=0.1)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (TextVARTransformer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is TextVARTransformer
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert_same_logits(loaded, model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is TextVARConfig
    assert TextVARConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert (config.num_labels, config.id2label) == (0, {})
    assert AutoConfig.for_model("hf_var_text_var").to_dict() == TextVARConfig().to_dict()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert_same_logits(TextVARTransformer.from_pretrained(tmp_path / "shards"), model)


def test_a_folder_of_other_weights_or_of_another_model_is_refused(model, tmp_path):
    weights = {name: tensor for name, tensor in model.state_dict().items() if "condition_proj" not in name}
    model.save_pretrained(tmp_path / "parts", state_dict=weights)
    with pytest.raises(ValueError, match=r"do not fit its config.json: missing .*condition_proj"):
        TextVARTransformer.from_pretrained(tmp_path / "parts")
    tiny_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="type 'hf_var', but TextVARConfig needs 'hf_var_text_var'"):
        TextVARTransformer.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, tmp_path, dtype):
    for layer in model.layers:
        if layer.crop_scale is not None:
            # Angles of hundreds of radians are others in half precision, in the official code as well.
            torch.nn.init.zeros_(layer.crop_scale)
    model.save_pretrained(tmp_path)
    expected = all_logits(model)
    loaded = TextVARTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert {weight.dtype for weight in loaded.state_dict().values()} == {dtype}
    with torch.autocast("cpu", dtype):
        automatic = all_logits(model)
    for found in (automatic, all_logits(loaded), all_logits(model.to(dtype))):
        for logits, exact in zip(found, expected, strict=True):
            assert logits.dtype == torch.float32
            assert 0 < (logits - exact).std() < 0.06 * exact.std()


def test_meta_device(model):
    with torch.device("meta"):
        empty = TextVARTransformer(model.config)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {CPU.type}
    assert_same_logits(empty.eval(), model)


@pytest.mark.parametrize(
    "name", [name for name in TextVARTransformer(text_config()).state_dict() if "layers.1" not in name]
)
def test_a_missing_weight_is_initialised_and_all_others_kept(name, tmp_path):
    model = text_model(hidden_size=64)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = incomplete(TextVARTransformer).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    torch.manual_seed(0)
    fresh, found = TextVARTransformer(model.config).state_dict()[name], loaded.state_dict()
    if fresh.std() == 0:
        assert torch.equal(found[name], fresh)
    else:
        assert fresh.std() / 4 < found[name].std() < 4 * fresh.std()
    for other in weights:
        assert torch.equal(found[other], weights[other]), other


def test_a_new_model_is_initialised_as_the_official_one():
    torch.manual_seed(0)
    model = TextVARTransformer(
        text_config(hidden_size=256, num_hidden_layers=3, initializer_cross_attention_factor=0.1)
    )
    std, depth = math.sqrt(1 / (3 * 256)), 1 / math.sqrt(6)
    special = {
        "head.weight": 0.02 * std,
        "head_norm.adaln.linear.weight": 0.5 * std,
        "attention.o_proj.weight": depth * std,
        "frequencies": 1.0,
    }
    for name, weight in model.state_dict().items():
        if name.endswith("cross_attention_out_norm.weight"):
            assert (weight == 0.1).all(), name
        elif name.endswith("norm.weight"):
            assert (weight == 1).all(), name
        elif name.endswith(("bias", "crop_scale")):
            assert (weight == 0).all(), name
        elif name.startswith("layers") and name.endswith("adaln.linear.weight"):
            gates, others = weight[:512], weight[512:]
            assert (gates.std().item(), others.std().item()) == pytest.approx((1e-5 * std, 0.5 * std), rel=0.02), name
        else:
            expected = next((value for ending, value in special.items() if name.endswith(ending)), std)
            assert weight.std().item() == pytest.approx(expected, rel=0.25 if weight.numel() < 2000 else 0.05), name


# --- training --------------------------------------------------------------------------------------------------------


def test_every_weight_has_a_gradient(model, inputs):
    """With the initial weights of real training, whose gates are nearly closed."""
    fresh = TextVARTransformer(model.config).train()
    for name, gradient in gradients(fresh, inputs).items():
        # The projection of the crop learns once its scales have left zero.
        assert gradient.abs().sum() > 0 or "crop_embedding" in name, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(model, inputs, use_reentrant):
    expected, calls = gradients(model.train(), inputs), []
    model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    enable_activation_checkpointing(model, {"use_reentrant": use_reentrant})
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **CLOSE)
    assert len(calls) == 2
    assert model(**text_of(inputs), use_cache=True).cache is None


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_acts_in_training_only(field, attention):
    model, plain = text_model(attention, **{field: 0.5}), text_model(attention)
    inputs = text_inputs(model.config)
    expected, state = logits_in_one_call(plain, inputs), torch.get_rng_state()
    torch.testing.assert_close(logits_in_one_call(model, inputs), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits_in_one_call(plain.train(), inputs), expected)
    assert (logits_in_one_call(model.train(), inputs) - expected).abs().mean() > 0.05


def test_steps_of_training_lower_the_loss(model, inputs):
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=3e-3), []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_lora(model, inputs, tmp_path):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(**inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules=ADAPTED, r=4))
    # Of both attentions.
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * (len(ADAPTED) + 4)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        adapted.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tuned = adapted.eval()(**inputs)
        assert tuned.loss < expected.loss
        steps = logits_scale_by_scale(adapted.base_model.model, inputs)
        torch.testing.assert_close(steps, tuned.logits, **CLOSE)
        adapted.save_pretrained(tmp_path)
        twin = TextVARTransformer(model.config)
        twin.load_state_dict(before)
        loaded = PeftModel.from_pretrained(twin, tmp_path)
        torch.testing.assert_close(loaded.eval()(**inputs).logits, tuned.logits, **CLOSE)
        merged = adapted.merge_and_unload()
        assert merged.state_dict().keys() == before.keys()
        torch.testing.assert_close(merged(**inputs).logits, tuned.logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_added_to_the_model_itself(model, inputs):
    expected = model(**inputs).logits
    add_adapter(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {"layers.0.cross_attention.k_proj", "layers.1.mlp.down_proj", "embeddings.condition_proj"} < adapted
    assert not torch.allclose(model(**inputs).logits, expected, atol=0.1)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("attention", ["sdpa", "blockwise_sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["own_scale", "causal"])
def test_training_forward_compiles_into_one_graph(is_causal, attention):
    model, twin = (text_model(attention, is_causal=is_causal, num_hidden_layers=1).train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = text_inputs(model.config, seed=seed)
        torch.testing.assert_close(compiled(**inputs).logits, twin(**inputs).logits, **CLOSE)
        found = gradients(compiled, inputs)
        for name, gradient in gradients(twin, inputs).items():
            torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, msg=name, **CLOSE)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("is_causal", [False, True], ids=["own_scale", "causal"])
def test_steps_of_the_second_image_compile_nothing(is_causal):
    model = text_model(num_hidden_layers=1, patch_nums=(1, 2), is_causal=is_causal)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = text_inputs(model.config, seed=seed)
        logits = logits_by_calls(compiled, inputs, [1, 1], VARCache(model.config))
        torch.testing.assert_close(logits, logits_scale_by_scale(model, inputs), **CLOSE)
        # One graph for each scale.
        assert counter.frame_count == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_export():
    model = text_model(num_hidden_layers=1)
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = text_inputs(model.config)
    program = torch.export.export(
        model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs}, strict=False
    )
    for batch_size in (3, 2):
        inputs = text_inputs(model.config, batch_size)
        found, expected = program.module()(**inputs), model(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE)


# --- weights that live elsewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_disk", [False, True], ids=["cpu", "disk"])
def test_offloaded_weights(model, tmp_path, to_disk):
    twin = copy.deepcopy(model)
    disk_offload(model, tmp_path, execution_device=CPU) if to_disk else cpu_offload(model, execution_device=CPU)
    assert_same_logits(model, twin)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_layers_on_two_devices(model, tmp_path):
    twin = copy.deepcopy(model)
    children = [name for name, _ in model.named_children() if name != "layers"]
    device_map = dict.fromkeys(children, "cpu") | {"layers.0": "cpu", "layers.1": "disk"}
    dispatch_model(
        model, device_map, main_device="cpu", offload_dir=tmp_path, skip_keys=model._skip_keys_device_placement
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    assert_same_logits(model, twin)


def test_device_map_cuts_between_layers_only():
    model = text_model(num_hidden_layers=4)
    layer = sum(parameter.nbytes for parameter in model.layers[0].parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - 4 * layer

    def cuts_inside(room, no_split):
        device_map = infer_auto_device_map(model, {0: room, "cpu": 10**9}, no_split_module_classes=no_split)
        return any(name.startswith("layers") and name.count(".") > 1 for name in device_map)

    rooms = [rest + layer * eighths // 8 for eighths in range(8, 40)]
    assert not any(cuts_inside(room, model._no_split_modules) for room in rooms)
    # Without the declaration it would cut inside.
    assert any(cuts_inside(room, []) for room in rooms)


@pytest.mark.parametrize(
    "arguments",
    [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}],
    ids=["block", "leaf"],
)
def test_group_offloading_of_diffusers(model, arguments):
    twin = copy.deepcopy(model)
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **arguments)
    assert_same_logits(model, twin)


def test_no_weight_is_read_outside_the_forward_of_its_module(model):
    """What offloading of any kind rests upon: each module's own weights are spoilt but while its forward runs."""
    twin = copy.deepcopy(model)
    for module in model.modules():
        weights = {name: weight.detach().clone() for name, weight in module.named_parameters(recurse=False)}
        weights |= {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
        if weights:

            def restore(module, args, kwargs, weights=weights):
                for name, weight in weights.items():
                    getattr(module, name).data.copy_(weight)

            def spoil(module, args, kwargs, output, weights=weights):
                for name in weights:
                    getattr(module, name).data.fill_(torch.nan)

            module.register_forward_pre_hook(restore, with_kwargs=True)
            module.register_forward_hook(spoil, with_kwargs=True)
            spoil(module, None, None, None)
    assert_same_logits(model, twin)


def test_layerwise_casting_of_diffusers(model):
    twin = copy.deepcopy(model)
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - expected).std() < 0.15 * expected.std()


def test_capabilities_are_declared(model):
    assert TextVARTransformer.supports_gradient_checkpointing
    assert TextVARTransformer._no_split_modules == ["TextVARBlock"]
    assert {type(layer).__name__ for layer in model.layers} == {"TextVARBlock"}
    assert TextVARTransformer._skip_keys_device_placement == ["cache", "past_key_values"]
    assert TextVARConfig.keys_to_ignore_at_inference == ["cache", "past_key_values"]
