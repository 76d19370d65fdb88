# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a tokenizer in training, with or without the quantizer."""

import torch
from torch import nn

from ..autoencoders import Tokenizer, VQVAEOutput


class VQVAEWarmup(nn.Module):
    """
    A tokenizer whose `forward` can skip the quantizer, as if the codebook were infinitely fine. Both variants are one
    `forward`, because distributed training wraps only this method.
    """

    def __init__(self, vqvae: Tokenizer):
        super().__init__()
        self.vqvae = vqvae

    def forward(self, pixel_values: torch.Tensor, quantize: bool = True) -> VQVAEOutput:
        """Output of [`VQVAEModel`], without codes unless `quantize`."""
        # Distributed training waits for a gradient of every parameter: the quantizer may not be used at all, and a
        # schedule of few scales does not use all refinement convolutions.
        names = ("quantizer.", "codebooks.")
        parameters = [item for name, item in self.vqvae.named_parameters() if name.startswith(names)]
        nothing = 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum() if parameters else 0.0
        output = self.vqvae(pixel_values, quantize=quantize)
        output.loss = output.loss + nothing
        return output
