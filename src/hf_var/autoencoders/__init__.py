# SPDX-License-Identifier: Apache-2.0
"""Stage 1: images to codes and back."""

from .configuration_vqvae import VQVAEConfig
from .modeling_vqvae import VQVAEDecoderOutput, VQVAEEncoderOutput, VQVAEModel, VQVAEOutput


__all__ = ["VQVAEConfig", "VQVAEDecoderOutput", "VQVAEEncoderOutput", "VQVAEModel", "VQVAEOutput"]
