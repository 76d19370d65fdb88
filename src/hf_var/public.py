# SPDX-License-Identifier: Apache-2.0
"""The public names of the package, loaded and registered; they belong to `hf_var` itself."""

from .autoencoders import (
    HierarchicalVQVAEConfig,
    HierarchicalVQVAEModel,
    VQVAEConfig,
    VQVAEDecoderOutput,
    VQVAEEncoderOutput,
    VQVAEModel,
    VQVAEOutput,
)
from .modular import VARAutoBlocks, VARModularPipeline, VARTextAutoBlocks, VARTextModularPipeline
from .pipelines import (
    ARPipeline,
    VARImg2ImgPipeline,
    VARInpaintPipeline,
    VARPipeline,
    VARPipelineOutput,
    VARTextImg2ImgPipeline,
    VARTextInpaintPipeline,
    VARTextToImagePipeline,
)
from .priors import (
    CacheBudget,
    LayerCall,
    LayerHook,
    PixelCNN,
    PixelCNNConfig,
    PixelPriorOutput,
    PixelSNAIL,
    PixelSNAILConfig,
    RowCache,
    RQTransformer,
    RQTransformerConfig,
    RQTransformerOutput,
    TextVARConfig,
    TextVARTransformer,
    TokenPruning,
    VARCache,
    VARConfig,
    VARTransformer,
    VARTransformerOutput,
    stack_codes,
    unstack_codes,
)
from .registration import register


register()
