# SPDX-License-Identifier: Apache-2.0
"""Make transformers' Auto classes and diffusers' loaders accept our classes like their own."""

import sys
from functools import partial
from typing import Any

import diffusers
from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    SUPPORTED_TASKS_MAPPINGS,
)
from transformers import AutoConfig, AutoModel

from .autoencoders import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VQVAEConfig, VQVAEModel
from .modular import VARAutoBlocks, VARModularPipeline, VARTextAutoBlocks, VARTextModularPipeline
from .pipelines import (
    ARPipeline,
    VARImg2ImgPipeline,
    VARInpaintPipeline,
    VARPipeline,
    VARTextImg2ImgPipeline,
    VARTextInpaintPipeline,
    VARTextToImagePipeline,
)
from .priors import (
    PixelCNN,
    PixelCNNConfig,
    PixelSNAIL,
    PixelSNAILConfig,
    RQTransformer,
    RQTransformerConfig,
    TextVARConfig,
    TextVARTransformer,
    VARConfig,
    VARTransformer,
)
from .priors.attention import register_attention


def register() -> None:
    """
    Register models, an attention and pipelines; calling it again changes nothing.

    diffusers has no entry point for other libraries, so five kinds of its attributes are set: a key which makes it
    save `["hf_var", class name]` for our components instead of a module path, our package as a source of components,
    which it asks for when it loads from the Hub, the classes of pipelines and blocks, by whose names
    `DiffusionPipeline.from_pretrained` and `ModularPipeline.from_pretrained` find them, those of texts among the classes
    that `AutoPipelineForText2Image` and its like choose from, and which modular pipeline a pipeline's folder makes.
    """
    for config_class, model_class in (
        (VQVAEConfig, VQVAEModel),
        (HierarchicalVQVAEConfig, HierarchicalVQVAEModel),
        (VARConfig, VARTransformer),
        (TextVARConfig, TextVARTransformer),
        (RQTransformerConfig, RQTransformer),
        (PixelCNNConfig, PixelCNN),
        (PixelSNAILConfig, PixelSNAIL),
    ):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    register_attention()
    package = __package__ or "hf_var"
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(package, {})
    setattr(diffusers.pipelines, package, sys.modules[package])
    of_texts = (VARTextToImagePipeline, VARTextImg2ImgPipeline, VARTextInpaintPipeline)
    for pipeline_class in (VARPipeline, VARInpaintPipeline, VARImg2ImgPipeline, ARPipeline, *of_texts):
        setattr(diffusers, pipeline_class.__name__, pipeline_class)
    tasks: list[Any] = [AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING]
    tasks.append(AUTO_INPAINT_PIPELINES_MAPPING)
    for mapping, pipeline_class in zip(tasks, of_texts, strict=True):
        mapping["hf-var-text"] = pipeline_class
    for model_name, modular_class, blocks_class in (
        ("hf-var", VARModularPipeline, VARAutoBlocks),
        ("hf-var-text", VARTextModularPipeline, VARTextAutoBlocks),
    ):
        modular: Any = MODULAR_PIPELINE_MAPPING
        modular[model_name] = partial(_class_name, modular_class)
        setattr(diffusers, modular_class.__name__, modular_class)
        setattr(diffusers, blocks_class.__name__, blocks_class)
    # Not among those of `AutoPipelineForText2Image`, which pass a prompt: this list alone is asked for a model's name.
    for pipeline_class in (VARPipeline, VARImg2ImgPipeline, VARInpaintPipeline):
        if {"hf-var": pipeline_class} not in SUPPORTED_TASKS_MAPPINGS:
            SUPPORTED_TASKS_MAPPINGS.append({"hf-var": pipeline_class})


def _class_name(modular_class: type, config: Any = None) -> str:
    """The modular pipeline of a folder with this `model_index.json`."""
    return modular_class.__name__
