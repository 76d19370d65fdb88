# SPDX-License-Identifier: Apache-2.0
"""Weights that live elsewhere between calls: whatever brings them back does so around a module's `forward` alone."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

from priors.tiny import logits_block_by_block, tiny_inputs, tiny_model


CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["adaln_per_layer", "shared_adaln"])
def models(request):
    """A model to be offloaded, and its twin that is not."""
    return tuple(tiny_model(shared_adaln=request.param) for _ in range(2))


@torch.no_grad()
def all_logits(model):
    """Logits by every route: in one call, step by step, of embeddings, without a class, and of nothing at all."""
    inputs = tiny_inputs(model.config)
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    return [
        model(**inputs).logits,
        logits_block_by_block(model, inputs),
        model(class_embeds=embeds).logits,
        model(scale_inputs=inputs["scale_inputs"]).logits,
        model().logits,
    ]


def devices(model):
    return {parameter.device.type for parameter in model.parameters()}


def test_cpu_offload_keeps_no_weight_between_calls(models):
    model, twin = models
    cpu_offload(model, execution_device=CPU)
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)
        assert devices(model) == {"meta"}


def test_disk_offload(models, tmp_path):
    model, twin = models
    disk_offload(model, tmp_path, execution_device=CPU)
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)
        assert devices(model) == {"meta"}


@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln_per_layer", "shared_adaln"])
def test_device_map_cuts_between_layers_only(shared_adaln):
    model = tiny_model(num_hidden_layers=4, shared_adaln=shared_adaln)
    layer = sum(parameter.nbytes for parameter in model.layers[0].parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - 4 * layer

    def device_map(room, no_split):
        return infer_auto_device_map(model, {0: room, "cpu": 10**9}, no_split_module_classes=no_split)

    def inside_layers(device_map):
        return [name for name in device_map if name.startswith("layers") and name.count(".") > 1]

    maps = [device_map(rest + layer * eighths // 8, model._no_split_modules) for eighths in range(8, 40)]
    assert not any(inside_layers(each) for each in maps)
    assert any({each.get(f"layers.{index}") for index in range(4)} == {0, "cpu"} for each in maps)
    # Without the declaration it would cut inside.
    assert any(inside_layers(device_map(rest + layer * eighths // 8, [])) for eighths in range(8, 40))


def test_layers_on_two_devices(models, tmp_path):
    model, twin = models
    children = [name for name, child in model.named_children() if name not in ("layers", "shared_adaln")]
    device_map = dict.fromkeys(children, "cpu") | {"layers.0": "cpu", "layers.1": "disk"}
    if model.shared_adaln is not None:
        device_map["shared_adaln"] = "disk"
    dispatch_model(
        model, device_map, main_device="cpu", offload_dir=tmp_path, skip_keys=model._skip_keys_device_placement
    )
    assert devices(model) == {"cpu", "meta"}
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "arguments",
    [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}],
    ids=["block", "leaf"],
)
def test_group_offloading_of_diffusers(models, arguments):
    model, twin = models
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **arguments)
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)


def test_no_weight_is_read_outside_the_forward_of_its_module(models):
    """
    What offloading of any kind rests upon: each module's own weights are spoilt but while its forward runs.

    On one device group offloading moves nothing, so that it would not notice.
    """
    model, twin = models
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            weights = {name: parameter.detach().clone() for name, parameter in own.items()}

            def restore(module, args, kwargs, weights=weights):
                for name, weight in weights.items():
                    getattr(module, name).data.copy_(weight)

            def spoil(module, args, kwargs, output, weights=weights):
                for name in weights:
                    getattr(module, name).data.fill_(torch.nan)

            module.register_forward_pre_hook(restore, with_kwargs=True)
            module.register_forward_hook(spoil, with_kwargs=True)
            spoil(module, None, None, None)
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert torch.equal(found, expected)


def test_layerwise_casting_of_diffusers(models):
    model, twin = models
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    # diffusers leaves out what is called a norm, and with it the projection of the last one's modulation.
    linears = [
        each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and "norm" not in name
    ]
    assert len(linears) >= 14
    for found, expected in zip(all_logits(model), all_logits(twin), strict=True):
        assert {linear.weight.dtype for linear in linears} == {torch.float8_e4m3fn}
        assert found.dtype == torch.float32
        assert 0 < (found - expected).std() < 0.1 * expected.std()
