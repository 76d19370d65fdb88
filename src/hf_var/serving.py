# SPDX-License-Identifier: Apache-2.0
"""The plugin of vLLM-Omni, which serves our pipelines with its diffusers adapter."""

from .pipelines import ARPipeline, VARImg2ImgPipeline, VARInpaintPipeline, VARPipeline, VARTextInpaintPipeline


# What the server's trial run at its start fails with: its prompt, "dummy run", is no label, and it sends no mask.
WITHOUT_TRIAL_RUN = (VARPipeline, VARImg2ImgPipeline, VARInpaintPipeline, VARTextInpaintPipeline, ARPipeline)


class NoTrialRun:
    """What the server reads of a pipeline before it loads it with the adapter."""

    dummy_run_num_frames = 0


def register_in_vllm_omni() -> None:
    """
    What vLLM-Omni calls in each of its processes, by the entry point `vllm_omni.general_plugins`. The import of this
    package has registered our pipelines with diffusers; here the server's trial run of some is switched off.
    """
    try:
        from vllm_omni.diffusion.registry import register_diffusion_model  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    for pipeline_class in WITHOUT_TRIAL_RUN:
        register_diffusion_model(pipeline_class.__name__, NoTrialRun.__module__, NoTrialRun.__name__)
