# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a tokenizer in training, with or without the quantizer."""

import torch
from torch import nn

from ..autoencoders import VQVAEModel, VQVAEOutput


class VQVAEWarmup(nn.Module):
    """A tokenizer whose `forward`, all that distributed training wraps, can skip the quantizer."""

    def __init__(self, vqvae: VQVAEModel):
        super().__init__()
        self.vqvae = vqvae

    def forward(self, pixel_values: torch.Tensor, quantize: bool = True) -> VQVAEOutput:
        """Output of [`VQVAEModel`], without codes unless `quantize`."""
        # Distributed training waits for a gradient of every parameter: the quantizer may not be used at all, and a
        # schedule of few scales does not use all refinement convolutions.
        parameters = [item for name, item in self.vqvae.named_parameters() if name.startswith("quantizer.")]
        nothing = 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum() if parameters else 0.0
        output = self.vqvae(pixel_values, quantize=quantize)
        output.loss = output.loss + nothing
        return output
