# SPDX-License-Identifier: Apache-2.0
"""Blocks that turn latents into images."""

from typing import Any

import torch
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    ComponentSpec,
    InputParam,
    OutputParam,
    PipelineState,
)

from ..modes import evaluation_mode
from ..pipelines.checks import check_output
from ..pipelines.images import check_pasting, make_processor, paste_kept
from .block import VARBlock
from .parameters import IMAGES, LATENTS, MASK, PIXELS, VQVAE, loaded, made, needed, option


class VARDecodeStep(VARBlock):
    """Decodes latents."""

    @property
    def description(self) -> str:
        return "Turns latents into images."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [VQVAE]

    @property
    def inputs(self) -> list[InputParam]:
        return [*needed(LATENTS), option("output_type", str)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(IMAGES)

    def finish(self, sample: torch.Tensor, block_state: Any, config: Any) -> torch.Tensor:
        """The decoded images as they are returned."""
        return sample

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        (vqvae,) = loaded(components, "vqvae")
        latents, output_type = block_state.latents, block_state.output_type
        check_output(output_type, vqvae.config)
        block_state.images = latents
        if output_type != "latent":
            with evaluation_mode(vqvae):
                sample = vqvae.decode(latents=latents).sample
            sample = self.finish(sample, block_state, vqvae.config)
            block_state.images = make_processor(vqvae.config).postprocess(sample, output_type=output_type)


class VARInpaintDecodeStep(VARDecodeStep):
    """Decodes latents, and pastes the original pixels where the mask is black if that is asked for."""

    @property
    def description(self) -> str:
        return "Turns latents into images, with the original pixels where they are kept, if asked for."

    @property
    def inputs(self) -> list[InputParam]:
        pasting = [option("paste_original", bool), option("feather_width", int)]
        return [*super().inputs, *needed(PIXELS, MASK), *pasting]

    def finish(self, sample: torch.Tensor, block_state: Any, config: Any) -> torch.Tensor:
        paste_original, output_type = block_state.paste_original, block_state.output_type
        feather_width = check_pasting(paste_original, block_state.feather_width, output_type, config)
        if not paste_original:
            return sample
        pixels, mask = (values.to(sample.device) for values in (block_state.pixels, block_state.mask))
        return paste_kept(sample, pixels, mask, feather_width)


class VARAutoDecodeStep(AutoPipelineBlocks):
    """[`VARInpaintDecodeStep`] if there is a mask, else [`VARDecodeStep`]."""

    block_classes = [VARInpaintDecodeStep, VARDecodeStep]
    block_names = ["inpainting", "decode"]
    block_trigger_inputs = ["mask", None]

    @property
    def description(self) -> str:
        return "Turns latents into images."
