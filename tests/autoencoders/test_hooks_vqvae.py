# SPDX-License-Identifier: Apache-2.0
"""Offloading, casting, checkpointing and compilation: whatever hooks into modules sees all weights being used."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

from hf_var.compatibility import enable_activation_checkpointing


def decode_tiles(model, codes):
    model.enable_slicing()
    model.enable_tiling(tile_sample_min_size=4)
    try:
        return model.decode(codes).sample
    finally:
        model.disable_slicing()
        model.disable_tiling()


METHODS = {
    "forward": lambda model, images, codes, latents: model(images).sample,
    "encode": lambda model, images, codes, latents: model.encode(images).latents,
    "decode_codes": lambda model, images, codes, latents: model.decode(codes).sample,
    "decode_tiles": lambda model, images, codes, latents: decode_tiles(model, codes),
    "decode_latents": lambda model, images, codes, latents: model.decode(latents=latents).sample,
    "teacher_forcing": lambda model, images, codes, latents: model.teacher_forcing(codes),
    "latents": lambda model, images, codes, latents: model.latents(codes),
    "running_latents": lambda model, images, codes, latents: model.running_latents(codes)[1],
    "quantizer_inputs": lambda model, images, codes, latents: model.quantizer_inputs(latents),
    "soft_codes": lambda model, images, codes, latents: model.soft_codes(latents, stochastic=False)[1],
    "next_scale": lambda model, images, codes, latents: model.next_scale(latents, codes[:, 1:5], 1)[1],
    "scale_inputs": lambda model, images, codes, latents: model.scale_inputs(latents, 1),
    "code_vectors": lambda model, images, codes, latents: model.code_vectors(codes),
    "mix_code_vectors": lambda model, images, codes, latents: model.mix_code_vectors(torch.eye(32)[codes]),
}


@pytest.fixture(scope="module")
def arguments(vqvae, images, codes):
    with torch.no_grad():
        return images, codes, vqvae.encode(images).latents


@pytest.fixture(params=METHODS)
def call(request, arguments):
    return lambda model: METHODS[request.param](model, *arguments)


@torch.no_grad()
def test_cpu_offload(make_vqvae, vqvae, call):
    model = make_vqvae()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    # Between calls no weights are there, so whatever goes past the hooks fails.
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(call(model), call(vqvae))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@torch.no_grad()
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading(make_vqvae, vqvae, call, offload_type, tmp_path):
    model = make_vqvae()
    settings = {"onload_device": "cpu", "offload_device": "cpu", "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(model, offload_type=offload_type, num_blocks_per_group=1, **settings)
    # The hooks take the weights from the disk; what is in memory is wrong for all that goes past them.
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(call(model), call(vqvae))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting(make_vqvae, vqvae, call, images, dtype):
    model, rounded = make_vqvae().to(dtype), make_vqvae().to(dtype)
    storage = torch.float8_e4m3fn
    apply_layerwise_casting(model, storage_dtype=storage, compute_dtype=dtype)
    for module in (rounded.encoder, rounded.decoder, rounded.quant_conv, rounded.post_quant_conv):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.copy_(layer.weight.to(storage))
                layer.bias.copy_(layer.bias.to(storage))
    assert model.encoder.conv_in.weight.dtype == storage
    assert torch.equal(call(model), call(rounded))
    assert model.encoder.conv_in.weight.dtype == storage
    for name, weight in model.quantizer.state_dict().items():
        assert torch.equal(weight, vqvae.quantizer.state_dict()[name])


def gradients(model, images):
    output = model(images)
    (output.loss + output.sample.square().mean()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"attention_levels": (0,), "encoder_out_channels": 12}], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(make_vqvae, images, use_reentrant, fields):
    model, calls = make_vqvae(**fields).train(), []
    expected = gradients(make_vqvae(**fields).train(), images)
    enable_activation_checkpointing(model, {"use_reentrant": use_reentrant})
    for stage in (model.encoder, model.decoder):
        stage.levels[0].resnets[0].register_forward_hook(lambda *_: calls.append(1))
        stage.mid_block.resnet1.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model, images)
    assert len(calls) == 8  # each of the four twice: in the forward and again in the backward pass
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-6, msg=name)


@torch.no_grad()
def test_channels_last(make_vqvae, vqvae, images, codes):
    model = make_vqvae().to(memory_format=torch.channels_last)
    output = model(images.to(memory_format=torch.channels_last))
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.sample, vqvae(images).sample, rtol=0, atol=1e-5)
    assert torch.equal(model.decode(codes).sample, model.decode(latents=model.encode(images).latents).sample)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_compile(make_vqvae, images, backend):
    model, expected = make_vqvae().train(), gradients(make_vqvae().train(), images)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    output = compiled(images)
    assert torch.equal(output.codes, model(images).codes)
    actual = gradients(compiled, images)
    for name, gradient in expected.items():
        # The compiled model's names have a prefix.
        torch.testing.assert_close(actual[f"_orig_mod.{name}"], gradient, rtol=0, atol=1e-4, msg=name)


@torch.no_grad()
def test_a_step_compiles_into_one_graph(vqvae, codes):
    expected = vqvae.latents(codes, 2)
    first, _ = vqvae.next_scale(None, codes[:, :1], 0)
    torch._dynamo.reset()
    step = torch.compile(vqvae.next_scale, fullgraph=True, backend="eager")
    latents, inputs = step(first, codes[:, 1:5], 1)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs, vqvae.scale_inputs(expected, 2), rtol=0, atol=1e-5)
