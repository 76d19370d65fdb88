# SPDX-License-Identifier: Apache-2.0
"""Blocks that assign the inputs to the images of a call, and encode those that are pixels."""

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
from ..pipelines.editing import match_condition
from ..pipelines.images import given_tokens
from ..pipelines.scale_sampling import GivenCodes
from .block import VARBlock
from .parameters import CONDITION, GIVEN, MASK, NUM_GIVEN, PIXELS, SETTINGS, VQVAE, loaded, made, needed


class VARInputsStep(VARBlock):
    """Repeats the condition for each image of a call."""

    @property
    def description(self) -> str:
        return "Makes the condition that of each image."

    @property
    def inputs(self) -> list[InputParam]:
        return needed(SETTINGS, CONDITION)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(CONDITION, GIVEN)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        self._match(block_state)
        block_state.given = None

    def _match(self, block_state: Any, **sizes: int) -> dict[str, list[int]]:
        """The items of other inputs for each image; `sizes` says how many of them there are."""
        settings = block_state.settings
        block_state.condition, items = match_condition(
            block_state.condition, settings.num_images, settings.generator, **sizes
        )
        return items


class VARImageInputsStep(VARInputsStep):
    """Encodes images, whose coarse scales replace sampled ones."""

    @property
    def description(self) -> str:
        return "Makes the condition that of each image, and encodes images."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [VQVAE]

    @property
    def inputs(self) -> list[InputParam]:
        return needed(SETTINGS, CONDITION, PIXELS, NUM_GIVEN)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        pixels = block_state.pixels
        codes = self._encode(components, pixels, self._match(block_state, image=len(pixels))["image"])
        lengths = components.vqvae.config.scale_lengths
        block_state.given = GivenCodes(codes, lengths, block_state.num_given_scales)

    def _encode(self, components: Any, pixels: torch.Tensor, items: list[int]) -> torch.Tensor:
        """Codes `(batch, length)` of the image of each item."""
        (vqvae,) = loaded(components, "vqvae")
        with evaluation_mode(vqvae):
            return vqvae.encode(pixels.to(components._execution_device)).codes[items]


class VARInpaintInputsStep(VARImageInputsStep):
    """Encodes images, whose codes replace sampled ones where their masks are black."""

    @property
    def description(self) -> str:
        return "Makes the condition that of each image, and encodes images and masks."

    @property
    def inputs(self) -> list[InputParam]:
        return needed(SETTINGS, CONDITION, PIXELS, MASK)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        pixels, mask = block_state.pixels, block_state.mask
        items = self._match(block_state, image=len(pixels), mask_image=len(mask))
        config = components.vqvae.config
        kept = given_tokens(mask, config)[items["mask_image"]].to(components._execution_device)
        codes = self._encode(components, pixels, items["image"])
        block_state.given = GivenCodes(codes, config.scale_lengths, kept=kept)
        # As many as the images, for those who paste the originals.
        block_state.pixels, block_state.mask = pixels[items["image"]], mask[items["mask_image"]]


class VARAutoInputsStep(AutoPipelineBlocks):
    """[`VARInpaintInputsStep`], [`VARImageInputsStep`] or [`VARInputsStep`], whichever the workflow needs."""

    block_classes = [VARInpaintInputsStep, VARImageInputsStep, VARInputsStep]
    block_names = ["inpainting", "image2image", "without_images"]
    block_trigger_inputs = ["mask", "pixels", None]

    @property
    def description(self) -> str:
        return "Assigns conditions and images to the images of a call, and encodes images."
