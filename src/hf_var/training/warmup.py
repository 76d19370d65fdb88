# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a tokenizer in training, which can leave the quantizer out."""

from typing import cast

import torch
from torch import nn

from ..autoencoders import VQVAEModel, VQVAEOutput


class VQVAEWarmup(nn.Module):
    """
    A tokenizer whose `forward` can leave the quantizer out, as if the codebook were infinitely fine. Both ways are one
    `forward`, because that is what distributed training watches.
    """

    def __init__(self, vqvae: VQVAEModel):
        super().__init__()
        self.vqvae = vqvae

    def forward(self, pixel_values: torch.Tensor, quantize: bool = True) -> VQVAEOutput:
        """Output of [`VQVAEModel`], without codes unless `quantize`."""
        # Distributed training waits for a gradient of every parameter: the quantizer may not be used at all, and a
        # schedule of few scales does not use all refinement convolutions.
        nothing = 0.0 * torch.stack([parameter.sum() for parameter in self.vqvae.quantizer.parameters()]).sum()
        if quantize:
            output = self.vqvae(pixel_values)
            output.loss = output.loss + nothing
            return output
        features = self.vqvae.quant_conv(self.vqvae.encoder(pixel_values))
        sample = self.vqvae.decoder(self.vqvae.post_quant_conv(features))
        return VQVAEOutput(loss=cast(torch.FloatTensor, nothing), sample=sample, features=features)
