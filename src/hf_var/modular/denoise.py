# SPDX-License-Identifier: Apache-2.0
"""The loop over the scales, with a block for each part of a step."""

from typing import Any

import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)

from ..modes import evaluation_mode
from ..pipelines.scale_sampling import ScaleSampling, scale_predictor
from .parameters import CODES, CONDITION, GIVEN, LATENTS, SETTINGS, TRANSFORMER, VQVAE, loaded, made, needed


class VARPredictStep(ModularPipelineBlocks):
    """Part of a step: `logits` `(batch, length of scale k, codebook_size)`, guided by `guidance_scale`."""

    @property
    def description(self) -> str:
        return "Predicts the guided logits of a scale."

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, k: int) -> Any:
        block_state.logits = block_state.sampling.predict(k, block_state.guidance_scale)
        return components, block_state


class VARSampleStep(ModularPipelineBlocks):
    """
    Part of a step: from `logits` to `scale_codes` `(batch, length)` and `scale_content`, which is these codes, or vectors
    `(batch, length, channels)` in their place.
    """

    @property
    def description(self) -> str:
        return "Samples the codes of a scale."

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, k: int) -> Any:
        block_state.scale_codes, block_state.scale_content = block_state.sampling.sample(k, block_state.logits)
        return components, block_state


class VARAddScaleStep(ModularPipelineBlocks):
    """Part of a step: adds the content of a scale to `latents`, from which the next scale is predicted."""

    @property
    def description(self) -> str:
        return "Adds a scale to the latents."

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, k: int) -> Any:
        block_state.sampling.add(k, block_state.scale_codes, block_state.scale_content)
        block_state.latents = block_state.sampling.latents
        return components, block_state


class VARScaleLoop(LoopSequentialPipelineBlocks):
    """
    Samples the token maps scale by scale. Its blocks are called with the scale `k` and share `logits`, `scale_codes`,
    `scale_content`, `latents`, `guidance_scale` and `sampling`, a `ScaleSampling`; others may be put between them.
    """

    block_classes = [VARPredictStep, VARSampleStep, VARAddScaleStep]
    block_names = ["predict", "sample", "add_scale"]

    @property
    def description(self) -> str:
        return "Samples the token maps, one scale after the other."

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return [TRANSFORMER, VQVAE]

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [*needed(SETTINGS, CONDITION), InputParam(**GIVEN)]

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        return made(LATENTS, CODES)

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> Any:
        block_state: Any = self.get_block_state(state)
        transformer, vqvae = loaded(components, "transformer", "vqvae")
        settings, given = block_state.settings, block_state.given
        sampling, first_scale = settings.sampling, 0 if given is None else given.num_scales
        device = components._execution_device
        with (
            evaluation_mode(transformer, vqvae, sampling.refiner),
            scale_predictor(transformer, sampling, block_state.condition, first_scale, device) as predictor,
        ):
            loop = ScaleSampling(vqvae, predictor, sampling, settings.generator, given)
            block_state.sampling, block_state.guidance_scale = loop, sampling.guidance_scale
            block_state.latents = loop.latents
            with self.progress_bar(total=len(loop.scales)) as progress_bar:  # pyright: ignore
                for k in loop.scales:
                    components, block_state = self.loop_step(components, block_state, k=k)
                    progress_bar.update()
        block_state.codes = torch.cat(loop.codes, dim=1)
        self.set_block_state(state, block_state)
        return components, state
