# SPDX-License-Identifier: Apache-2.0
"""Visual autoregressive models for the Hugging Face ecosystem."""

from pathlib import Path

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
    VARCache,
    VARConfig,
    VARTransformer,
    VARTransformerOutput,
    stack_codes,
    unstack_codes,
)
from .registration import register


__version__ = "0.1.0"

# Folders of the checkpoints that ship with the package: handwritten digits, 16x16 pixels, labels 0 to 9, and emoji of 32x32
# pixels from texts.
DIGITS_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "digits")
EMOJI_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "emoji")

register()

__all__ = [
    "DIGITS_CHECKPOINT",
    "EMOJI_CHECKPOINT",
    "ARPipeline",
    "HierarchicalVQVAEConfig",
    "HierarchicalVQVAEModel",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelPriorOutput",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "RQTransformer",
    "RQTransformerConfig",
    "RQTransformerOutput",
    "RowCache",
    "TextVARConfig",
    "TextVARTransformer",
    "VARAutoBlocks",
    "VARCache",
    "VARConfig",
    "VARImg2ImgPipeline",
    "VARInpaintPipeline",
    "VARModularPipeline",
    "VARPipeline",
    "VARPipelineOutput",
    "VARTextAutoBlocks",
    "VARTextImg2ImgPipeline",
    "VARTextInpaintPipeline",
    "VARTextModularPipeline",
    "VARTextToImagePipeline",
    "VARTransformer",
    "VARTransformerOutput",
    "VQVAEConfig",
    "VQVAEDecoderOutput",
    "VQVAEEncoderOutput",
    "VQVAEModel",
    "VQVAEOutput",
    "register",
    "stack_codes",
    "unstack_codes",
]
