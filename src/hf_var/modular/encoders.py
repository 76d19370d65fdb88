# SPDX-License-Identifier: Apache-2.0
"""Blocks that read what the caller gives: class labels, texts, images and masks."""

from collections.abc import Mapping, Sequence
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
from ..pipelines.conditions import Labels, class_condition
from ..pipelines.editing import first_sampled_scale
from ..pipelines.images import check_pasting, image_pixels, mask_pixels
from ..pipelines.options import PromptOptions
from ..pipelines.text_encoding import Prompts, prompt_condition, run_text_encoders
from ..text_encoders import TextEmbeddings
from .block import VARBlock
from .parameters import (
    CONDITION,
    MASK,
    NUM_GIVEN,
    PIXELS,
    SETTINGS,
    TEXT_ENCODERS,
    TEXT_TRANSFORMER,
    TRANSFORMER,
    VQVAE,
    Images,
    loaded,
    made,
    needed,
    option,
    options_of,
)


class VARClassStep(VARBlock):
    """Makes the condition of images from class labels, also as texts, or class embeddings, see [`VARPipeline.__call__`]."""

    model_name = "hf-var"

    @property
    def description(self) -> str:
        return "Reads class labels, or class embeddings in their place."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [TRANSFORMER]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            option("class_labels", Labels),
            option("prompt", str | list[str]),
            option("class_embeds", torch.Tensor),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(CONDITION)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        (transformer,) = loaded(components, "transformer")
        block_state.condition = class_condition(
            transformer, block_state.class_labels, block_state.class_embeds, block_state.prompt
        )


class VARTextEncoderStep(VARBlock):
    """Makes the condition of images from texts or their embeddings, see [`VARTextToImagePipeline.encode_prompt`]."""

    model_name = "hf-var-text"

    @property
    def description(self) -> str:
        return "Encodes texts, and negative ones if there is guidance, or reads embeddings in their place."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [TEXT_TRANSFORMER, *TEXT_ENCODERS]

    @property
    def inputs(self) -> list[InputParam]:
        return [*needed(SETTINGS), option("prompt", str | list[str]), *options_of(PromptOptions)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(CONDITION)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        (transformer,) = loaded(components, "transformer")

        def encode(texts: Mapping[str, Sequence[str]]) -> dict[str, TextEmbeddings]:
            with evaluation_mode(components.text_encoder, components.text_encoder_2):
                return run_text_encoders(components.components, texts, components._execution_device)

        config = transformer.config
        guided = block_state.settings.sampling.last_guided_scale(len(config.patch_nums)) >= 0
        values = {name: block_state[name] for name in self.input_names if name not in ("settings", "original_size")}
        block_state.condition = prompt_condition(Prompts(**values), block_state.original_size, config, guided, encode)


class VARNoImageStep(VARBlock):
    """Refuses what goes with images where there are none."""

    @property
    def description(self) -> str:
        return "Makes sure that nothing is asked of images that are not there."

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        _refuse(state, "needs `image`", "strength", "num_kept_scales")
        _refuse(state, "needs `mask_image`", "paste_original", "feather_width")
        # A state that is continued may have them from another workflow.
        state.set("pixels", None)
        state.set("mask", None)


class VARImageStep(VARBlock):
    """Reads images whose coarse scales are kept, see [`VARImg2ImgPipeline.__call__`]."""

    @property
    def description(self) -> str:
        return "Reads images, whose coarse scales are kept."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [VQVAE]

    @property
    def inputs(self) -> list[InputParam]:
        image = option("image", Images, required=True)
        return [image, option("strength", float), option("num_kept_scales", int)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(PIXELS, NUM_GIVEN)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        (vqvae,) = loaded(components, "vqvae")
        _refuse(state, "needs `mask_image`", "paste_original", "feather_width")
        strength, num_kept_scales = block_state.strength, block_state.num_kept_scales
        num_scales = len(vqvae.config.patch_nums)
        block_state.num_given_scales = first_sampled_scale(strength, num_kept_scales, num_scales)
        block_state.pixels = image_pixels(block_state.image, vqvae.config)
        state.set("mask", None)


class VARInpaintStep(VARBlock):
    """Reads images and masks of what is repainted in them, see [`VARInpaintPipeline.__call__`]."""

    @property
    def description(self) -> str:
        return "Reads images and masks: what is black in a mask is kept."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [VQVAE]

    @property
    def inputs(self) -> list[InputParam]:
        images = [option(name, Images, required=True) for name in ("image", "mask_image")]
        return [*images, option("paste_original", bool), option("feather_width", int), option("output_type", str)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(PIXELS, MASK)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        (vqvae,) = loaded(components, "vqvae")
        _refuse(state, "is for images without `mask_image`", "strength", "num_kept_scales")
        config = vqvae.config
        check_pasting(block_state.paste_original, block_state.feather_width, block_state.output_type, config)
        block_state.pixels = image_pixels(block_state.image, config)
        block_state.mask = mask_pixels(block_state.mask_image, config)


class VARAutoImageStep(AutoPipelineBlocks):
    """[`VARInpaintStep`] if there is a mask, [`VARImageStep`] if there are only images, nothing without."""

    block_classes = [VARInpaintStep, VARImageStep, VARNoImageStep]
    block_names = ["inpainting", "image2image", "without_images"]
    block_trigger_inputs = ["mask_image", "image", None]

    @property
    def description(self) -> str:
        return "Reads images, and masks if there are some."


def _refuse(state: PipelineState, why: str, *names: str) -> None:
    """Raise a `ValueError` if the caller has passed an argument of another workflow."""
    for name in names:
        value = state.get(name)
        if value is not None and value is not False:
            raise ValueError(f"`{name}` = {value!r} {why}.")
