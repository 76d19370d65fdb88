# SPDX-License-Identifier: Apache-2.0
"""
vLLM-Omni's diffusers adapter, plugins and registry, the real files of its wheel. What they import of the server beside
each other is replaced by the least that they touch, since the server itself needs CUDA.
"""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


REQUIREMENT = "vllm-omni==0.30.0"
PACKAGES = ["vllm", "vllm_omni", "vllm_omni.diffusion", "vllm_omni.diffusion.models"]
ADAPTER = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"


def unpack_wheel(folder: Path) -> Path:
    """The wheel's contents, from the package index and without its dependencies; without an index the test is skipped."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "0", "--timeout", "15"]
    try:
        subprocess.run([*command, "--dest", folder, REQUIREMENT], check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{REQUIREMENT} cannot be downloaded: {error}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return folder / "wheel"


class Profiler:
    def setup_diffusion_pipeline_profiler(self, **_):
        pass


class Models(dict):
    """The part of vLLM's registry that is used here: `module:class` by name."""

    def register_model(self, name, target):
        self[name] = target

    def _try_load_model_cls(self, name):
        if name not in self:
            return None
        module, _, class_name = self[name].partition(":")
        return getattr(sys.modules[module], class_name)


def stubs(folder: Path) -> dict[str, ModuleType]:
    """Modules by their names: packages without their `__init__`, and what the real files import of others."""
    modules = {name: ModuleType(name) for name in PACKAGES}
    for name, module in modules.items():
        module.__path__ = [str(folder.joinpath(*name.split(".")))]

    def add(name, **contents):
        modules[name] = ModuleType(name)
        vars(modules[name]).update(contents)

    class Output(SimpleNamespace):
        pass

    add("vllm.envs", VLLM_PLUGINS=None)
    modules["vllm"].envs = modules["vllm.envs"]
    add("vllm.plugins", load_general_plugins=lambda: None)
    add("vllm.logger", init_logger=lambda name: SimpleNamespace(info=lambda *_: None, warning=lambda *_: None))
    add("vllm.model_executor.model_loader.utils", configure_quant_config=None)
    # The registry of the server's own models is of no use here, so that it is empty at first.
    add("vllm.model_executor.models.registry", _LazyRegisteredModel=SimpleNamespace, _ModelRegistry=lambda _: Models())
    platform = SimpleNamespace(get_device_capability=lambda: None, is_cuda=lambda: False)
    for kind in ("rocm", "xpu", "musa"):
        setattr(platform, f"is_{kind}", lambda: False)
    add("vllm_omni.platforms", current_omni_platform=platform)
    add("vllm_omni.inputs.data", OmniPromptType=object, OmniTextPrompt=dict, OmniDiffusionSamplingParams=object)
    omni = "vllm_omni.diffusion."
    add(omni + "data", DiffusionOutput=Output, OmniDiffusionConfig=object, uses_diffusers_adapter=lambda _: True)
    add(omni + "profiler.diffusion_pipeline_profiler", DiffusionPipelineProfilerMixin=Profiler)
    add(omni + "request", resolve_video_num_frames=None)
    add(omni + "worker.request_batch", DiffusionRequestBatch=object)
    add(omni + "config", set_current_diffusion_config=None)
    add(omni + "distributed.autoencoders.distributed_vae_executor", DistributedVaeMixin=object)
    add(omni + "distributed.sp_plan", SequenceParallelConfig=None, get_sp_plan_from_model=None)
    add(omni + "forward_context", get_forward_context=None)
    add(omni + "hooks.sequence_parallel", apply_sequence_parallel=None)
    add(omni + "utils.tf_utils", find_module_with_attr=None)
    return modules


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let the real files be imported from the unpacked wheel, and be forgotten afterwards."""
    before = set(sys.modules)
    sys.modules.update(stubs(folder))
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "vllm_omni")]:
            if name not in before:
                del sys.modules[name]


def configuration(model: str, **changes) -> SimpleNamespace:
    """The fields of the server's configuration that the adapter reads, with the server's defaults, in fp32."""
    parallel = SimpleNamespace(tensor_parallel_size=1, cfg_parallel_size=1, sequence_parallel_size=1)
    fields = {
        "model": model,
        "dtype": torch.float32,
        "diffusers_load_kwargs": {},
        "diffusers_call_kwargs": {},
        "output_type": "pil",
        "parallel_config": parallel,
        "diffusion_attention_config": SimpleNamespace(default=None),
        "cache_backend": "none",
    }
    unset = ["diffusion_offload_config", "quantization_config", "model_class_name", "diffusers_pipeline_cls"]
    switches = ["enforce_eager", "enable_layerwise_offload", "enable_cpu_offload", "vae_use_slicing", "vae_use_tiling"]
    switches.append("enable_diffusion_pipeline_profiler")
    return SimpleNamespace(**{**dict.fromkeys(unset), **dict.fromkeys(switches, False), **fields, **changes})


def request(*prompts, seed: int | None = None, num_outputs_per_prompt: int = 1, **sampling) -> SimpleNamespace:
    """A batch of prompts as the adapter gets it. The server fills in a guidance scale of 1 where a request has none."""
    of_video = {"enable_frame_interpolation": False, "num_frames": 1}
    unset = dict.fromkeys(["generator", "generator_device", "output_type", "height", "width", "num_inference_steps"])
    own = {"seed": seed, "num_outputs_per_prompt": num_outputs_per_prompt, "guidance_scale": 1.0}
    parameters = SimpleNamespace(**{**of_video, **unset, **own, **sampling})
    return SimpleNamespace(prompts=list(prompts), sampling_params=parameters)
