# SPDX-License-Identifier: Apache-2.0
"""Stage 1: images to codes and back."""

from .auto import Tokenizer, TokenizerConfig, load_tokenizer
from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig
from .configuration_vqvae import VQVAEConfig
from .modeling_hierarchical_vqvae import HierarchicalVQVAEModel
from .modeling_outputs import VQVAEDecoderOutput, VQVAEEncoderOutput, VQVAEOutput
from .modeling_vqvae import VQVAEModel


__all__ = [
    "HierarchicalVQVAEConfig",
    "HierarchicalVQVAEModel",
    "Tokenizer",
    "TokenizerConfig",
    "VQVAEConfig",
    "VQVAEDecoderOutput",
    "VQVAEEncoderOutput",
    "VQVAEModel",
    "VQVAEOutput",
    "load_tokenizer",
]
