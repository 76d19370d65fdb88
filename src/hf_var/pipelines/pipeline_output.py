# SPDX-License-Identifier: Apache-2.0
"""Outputs of the pipelines."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class VARPipelineOutput(BaseOutput):
    """
    Output of the VAR pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            `batch` PIL images; an array `(batch, height, width, channels)` or a tensor
            `(batch, channels, height, width)` in `[0, 1]`; or, with `output_type="latent"`, the latents
            `(batch, latent_channels, latent height, latent width)`. Where the tokenizer codes class maps, the pixels
            of PIL images are the ids of the likeliest classes, and arrays and tensors hold the probability of each
            class, which is the sigmoid of its logit.
        codes (`torch.LongTensor` of shape `(batch, length)`):
            The token maps that were sampled, coarse to fine.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    codes: torch.Tensor
