# SPDX-License-Identifier: Apache-2.0
"""Stage 1: images to codes and back."""

from .auto import load_tokenizer
from .configuration_vqvae import VQVAEConfig
from .modeling_outputs import VQVAEDecoderOutput, VQVAEEncoderOutput, VQVAEOutput
from .modeling_vqvae import VQVAEModel


__all__ = ["VQVAEConfig", "VQVAEDecoderOutput", "VQVAEEncoderOutput", "VQVAEModel", "VQVAEOutput", "load_tokenizer"]
