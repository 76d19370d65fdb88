# SPDX-License-Identifier: Apache-2.0
"""The first block: all numbers and choices of a call, checked before anything is computed."""

from typing import Any

import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)

from ..pipelines import VARPipeline, VARTextToImagePipeline
from ..pipelines.checks import check_output
from ..pipelines.components import check_components
from ..pipelines.options import SamplingOptions, TextSamplingOptions, check_refiner, resolve_call
from ..pipelines.text_encoding import check_text_encoders
from ..priors import TextVARConfig, VARConfig
from .parameters import (
    SETTINGS,
    TEXT_ENCODERS,
    TEXT_TRANSFORMER,
    TRANSFORMER,
    VQVAE,
    configs_of,
    loaded,
    made,
    option,
    options_of,
)


class VARSettingsStep(ModularPipelineBlocks):
    """Checks the arguments of sampling and that the models belong together, see [`VARPipeline.__call__`]."""

    model_name = "hf-var"
    sampling_options: type = SamplingOptions
    number_options: tuple[str, ...] = ("num_images_per_label", "num_images_per_prompt")

    @property
    def description(self) -> str:
        return "Checks how images are sampled, and fills in what the checkpoint chooses."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [TRANSFORMER, VQVAE]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return configs_of(VARPipeline)

    @property
    def inputs(self) -> list[InputParam]:
        numbers = [option(name, int) for name in self.number_options]
        others = [option("generator", torch.Generator | list[torch.Generator]), option("output_type", str)]
        return [*options_of(self.sampling_options), *numbers, *others]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(SETTINGS)

    def check_models(self, components: Any) -> None:
        """Raise a `ValueError` unless the models are there and belong together."""
        transformer, vqvae = loaded(components, "transformer", "vqvae")
        check_components(transformer, vqvae, VARConfig)

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> Any:
        block_state: Any = self.get_block_state(state)
        self.check_models(components)
        options = {name: block_state[name] for name in self.input_names}
        for name in self.number_options:
            # Two names that mean the same: the one that was not passed has its default.
            if len(self.number_options) > 1 and options[name] in (None, 1):
                del options[name]
        config = components.vqvae.config
        settings = resolve_call(options.keys(), config, components.config, options)
        check_output(settings.output_type, config)
        check_refiner(components.transformer, settings.sampling.refiner)
        block_state.settings = settings
        self.set_block_state(state, block_state)
        return components, state


class VARTextSettingsStep(VARSettingsStep):
    """The same for images from texts, see [`VARTextToImagePipeline.__call__`]."""

    model_name = "hf-var-text"
    sampling_options = TextSamplingOptions
    number_options = ("num_images_per_prompt",)

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [TEXT_TRANSFORMER, VQVAE, *TEXT_ENCODERS]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return configs_of(VARTextToImagePipeline)

    def check_models(self, components: Any) -> None:
        transformer, vqvae = loaded(components, "transformer", "vqvae")
        check_components(transformer, vqvae, TextVARConfig)
        encoders = components.text_encoder, components.text_encoder_2
        check_text_encoders(transformer.config, encoders, (components.tokenizer, components.tokenizer_2))
