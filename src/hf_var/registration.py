# SPDX-License-Identifier: Apache-2.0
"""Make transformers' Auto classes and diffusers' loaders accept our classes like their own."""

import sys

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from transformers import AutoConfig, AutoModel

from .autoencoders import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VQVAEConfig, VQVAEModel
from .pipelines import ARPipeline, VARImg2ImgPipeline, VARInpaintPipeline, VARPipeline
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

    diffusers has no entry point for other libraries, so three kinds of its attributes are set: a key which makes it save
    `["hf_var", class name]` for our components instead of a module path, our package as a source of components, which
    it asks for when it loads from the Hub, and the pipeline classes, by whose names `DiffusionPipeline.from_pretrained`
    finds them.
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
    for pipeline_class in (VARPipeline, VARInpaintPipeline, VARImg2ImgPipeline, ARPipeline):
        setattr(diffusers, pipeline_class.__name__, pipeline_class)
