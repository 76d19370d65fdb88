# SPDX-License-Identifier: Apache-2.0
"""The first block: all numbers and choices of a call, checked before anything is computed."""

from typing import Any

import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    OutputParam,
    PipelineState,
)

from ..pipelines import VARPipeline, VARTextToImagePipeline
from ..pipelines.checks import check_output
from ..pipelines.components import check_components
from ..pipelines.options import SamplingOptions, TextSamplingOptions, check_layers, resolve_call
from ..pipelines.text_encoding import check_text_encoders
from ..priors import TextVARConfig, VARConfig
from .block import VARBlock
from .parameters import (
    NUMBERS,
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


class VARSettingsStep(VARBlock):
    """Checks the arguments of sampling and that the models belong together, see [`VARPipeline.__call__`]."""

    model_name = "hf-var"
    sampling_options: type = SamplingOptions
    number_names: tuple[str, ...] = NUMBERS

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
        numbers = [option(name, int) for name in self.number_names]
        others = [option("generator", torch.Generator | list[torch.Generator]), option("output_type", str)]
        return [*options_of(self.sampling_options), *numbers, *others]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return made(SETTINGS)

    def check_models(self, components: Any) -> None:
        """Raise a `ValueError` unless the models are there and belong together."""
        transformer, vqvae = loaded(components, "transformer", "vqvae")
        check_components(transformer, vqvae, VARConfig)

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        self.check_models(components)
        given = {name: block_state[name] for name in self.input_names}
        # One name of the two that mean the same is enough.
        options = {name: value for name, value in given.items() if value is not None or name not in NUMBERS}
        config = components.vqvae.config
        settings = resolve_call(options.keys(), config, components.config, options)
        check_output(settings.output_type, config)
        check_layers(components.transformer, settings.sampling)
        block_state.settings = settings


class VARTextSettingsStep(VARSettingsStep):
    """The same for images from texts, see [`VARTextToImagePipeline.__call__`]."""

    model_name = "hf-var-text"
    sampling_options = TextSamplingOptions
    number_names = ("num_images_per_prompt",)

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
