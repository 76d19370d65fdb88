# SPDX-License-Identifier: Apache-2.0
"""Make transformers' Auto classes and diffusers' loaders accept our classes like their own."""

import sys
from typing import Any

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from transformers import AutoConfig, AutoModel

from .autoencoders import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VQVAEConfig, VQVAEModel
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

    diffusers has no entry point for other libraries, so four kinds of its attributes are set: a key which makes it
    save `["hf_var", class name]` for our components instead of a module path, our package as a source of components,
    which it asks for when it loads from the Hub, the pipeline classes, by whose names
    `DiffusionPipeline.from_pretrained` finds them, and those of texts among the classes that
    `AutoPipelineForText2Image` and its like choose from.
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
