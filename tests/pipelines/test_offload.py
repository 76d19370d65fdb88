# SPDX-License-Identifier: Apache-2.0
"""
Offloading, without an accelerator: weights that are away between the calls are on the meta device or overwritten, so
that whatever computes without its module's hook fails instead of reading them unnoticed.
"""

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_layerwise_casting

from pipelines.tiny import make_pipeline, seeded


CPU = torch.device("cpu")
LABELS = [0, 1, None, 3]
SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"smooth": True}, id="smooth"),
    pytest.param({"guidance_scale": 1.0}, id="unguided"),
    pytest.param({"callback_on_step_end": lambda pipe, step, timestep, tensors: tensors}, id="callback"),
]
GROUPS = [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]


def draw(pipe, **settings):
    return pipe(LABELS, generator=seeded(), output_type="pt", **settings)


def assert_equal(output, expected):
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)


def devices(module: torch.nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


class WholeModelOffload(ModelHook):
    """
    Like the hook of `enable_model_cpu_offload`, with the meta device in place of another memory: the whole model comes
    when it is called, and leaves when it is told to.
    """

    execution_device = CPU

    def init_hook(self, module):
        self.module, self.loads = module, 0
        self.weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self.offload()
        return module

    def offload(self):
        self.module.to("meta")

    def pre_forward(self, module, *args, **kwargs):
        if devices(module) == {"meta"}:
            module.load_state_dict(self.weights, assign=True)
            self.loads += 1
        return args, kwargs


@pytest.mark.parametrize("settings", SETTINGS)
def test_sequential_offload(pipe, settings):
    expected = draw(pipe, **settings)
    for component in pipe.components.values():
        accelerate.cpu_offload(component, execution_device=CPU, offload_buffers=True)
    for _ in range(2):
        assert devices(pipe.transformer) == devices(pipe.vqvae) == {"meta"}
        assert pipe._execution_device == CPU
        assert_equal(draw(pipe, **settings), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_whole_models_are_loaded_once_per_call(pipe, settings):
    expected = draw(pipe, **settings)
    hooks = {name: WholeModelOffload() for name in pipe.components}
    for name, component in pipe.components.items():
        add_hook_to_module(component, hooks[name])
    for call in range(1, 3):
        assert devices(pipe.transformer) == devices(pipe.vqvae) == {"meta"}
        assert_equal(draw(pipe, **settings), expected)
        assert {name: hook.loads for name, hook in hooks.items()} == {"transformer": call, "vqvae": call}
        for hook in hooks.values():
            hook.offload()


@pytest.mark.parametrize("smooth", [False, True])
def test_every_scale_begins_with_a_hook(pipe, smooth):
    """Models that leave after each scale come back by themselves."""
    expected = draw(pipe, smooth=smooth)
    hooks = {name: WholeModelOffload() for name in pipe.components}
    for name, component in pipe.components.items():
        add_hook_to_module(component, hooks[name])

    def offload(pipe, step, timestep, tensors):
        for hook in hooks.values():
            hook.offload()

    assert_equal(draw(pipe, smooth=smooth, callback_on_step_end=offload), expected)
    # The last one is for the decoder, once more than there are scales.
    assert {name: hook.loads for name, hook in hooks.items()} == {"transformer": 3, "vqvae": 4}


def test_model_offload_has_no_chain_between_the_scales(pipe):
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = {name: component._hf_hook for name, component in pipe.components.items()}
    # A hook of the chain sends the model before it away, which would happen at every scale.
    assert [hook.prev_module_hook for hook in hooks.values()] == [None, None]
    assert {id(hook.hook) for hook in pipe._all_hooks} == {id(hook) for hook in hooks.values()}
    assert_equal(draw(pipe), expected)
    # The end of a call sends everything away: diffusers does so by attaching new hooks.
    renewed = {name: component._hf_hook for name, component in pipe.components.items()}
    assert all(renewed[name] is not hook for name, hook in hooks.items())
    assert_equal(draw(pipe), expected)


def test_model_offload_survives_an_exception(pipe):
    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("stop")

    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, callback_on_step_end=fail)
    assert_equal(draw(pipe), expected)
    pipe.remove_all_hooks()
    assert_equal(draw(pipe), expected)


@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: groups["offload_type"])
@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_group_offload(pipe, tmp_path, groups, settings):
    expected = draw(pipe, **settings)
    # With a folder, a group's memory is given up between its calls and filled from the folder.
    pipe.enable_group_offload(onload_device=CPU, offload_to_disk_path=str(tmp_path), **groups)

    def overwrite(*args):
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.fill_(float("nan"))

    for _ in range(2):
        overwrite()
        assert_equal(draw(pipe, callback_on_step_end=overwrite, **settings), expected)


@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: groups["offload_type"])
@pytest.mark.parametrize("excluded", [None, "vqvae", ["vqvae"], ["transformer"]], ids=str)
def test_group_offload_leaves_the_vqvae_out(pipe, groups, excluded):
    expected = draw(pipe)
    pipe.enable_group_offload(onload_device=CPU, exclude_modules=excluded, **groups)
    hooked = {
        name
        for name, component in pipe.components.items()
        for module in component.modules()
        if hasattr(module, "_diffusers_hook")
    }
    assert hooked == (set() if excluded == ["transformer"] else {"transformer"})
    assert_equal(draw(pipe), expected)


def test_layerwise_casting(pipe):
    expected = draw(pipe, top_k=1)
    for component in pipe.components.values():
        apply_layerwise_casting(component, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = [parameter.dtype for parameter in pipe.transformer.layers.parameters()]
    assert stored.count(torch.float8_e4m3fn) > len(stored) / 2
    assert {parameter.dtype for parameter in pipe.vqvae.quantizer.parameters()} == {torch.float32}
    output = draw(pipe, top_k=1)
    # Three bits of mantissa: the same picture only roughly.
    assert (output.codes == expected.codes).float().mean() > 0.3
    with torch.no_grad():
        decoded = make_pipeline().vqvae.decode(output.codes).sample / 2 + 0.5
    assert (output.images - decoded).abs().mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_offload_from_an_accelerator(settings, kind):
    accelerator = torch.accelerator.current_accelerator()
    pipe = make_pipeline().to(accelerator)
    expected = draw(pipe, **settings)
    pipe = make_pipeline()
    if kind == "model":
        pipe.enable_model_cpu_offload(device=accelerator)
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload(device=accelerator)
    else:
        pipe.enable_group_offload(onload_device=accelerator, offload_type=kind, num_blocks_per_group=1)
    for _ in range(2):
        output = draw(pipe, **settings)
        assert torch.equal(output.codes.cpu(), expected.codes.cpu())
        torch.testing.assert_close(output.images.cpu(), expected.images.cpu(), rtol=0, atol=1e-4)
    if kind == "model":
        assert devices(pipe.transformer) == devices(pipe.vqvae) == {"cpu"}


@pytest.mark.gpu
def test_model_offload_moves_nothing_between_the_scales():
    accelerator = torch.accelerator.current_accelerator()
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device=accelerator)
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append([parameter.data_ptr() for parameter in pipe.transformer.parameters()])
        seen[-1] += [parameter.data_ptr() for parameter in pipe.vqvae.parameters()]
        assert devices(pipe.transformer) == devices(pipe.vqvae) == {accelerator.type}

    draw(pipe, callback_on_step_end=look)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
