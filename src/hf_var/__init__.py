# SPDX-License-Identifier: Apache-2.0
"""Visual autoregressive models for the Hugging Face ecosystem."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .lazy import names_on_use


__version__ = "0.1.0"

# Folders of the checkpoints that ship with the package: handwritten digits, 16x16 pixels, labels 0 to 9, and emoji of 32x32
# pixels from texts.
DIGITS_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "digits")
EMOJI_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "emoji")

__all__ = [
    "DIGITS_CHECKPOINT",
    "EMOJI_CHECKPOINT",
    "ARPipeline",
    "CacheBudget",
    "HierarchicalVQVAEConfig",
    "HierarchicalVQVAEModel",
    "LayerCall",
    "LayerHook",
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
    "TokenPruning",
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


def _is_command() -> bool:
    """Whether this process is `hf-var` or `python -m hf_var`."""
    # Python sets the first argument so while it looks for the module that comes with -m, which imports this package.
    is_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("hf_var", "hf_var.cli")
    return is_module or getattr(sys.modules.get("hf_var_command"), "is_running", False)


# What follows imports torch, transformers and diffusers and takes seconds. The command answers --help and mistakes without
# it, and then calls `register`.
if TYPE_CHECKING or not _is_command():
    from .public import *
else:
    __getattr__, __dir__ = names_on_use(__name__, __all__, lambda: import_module("hf_var.public"))
