# SPDX-License-Identifier: Apache-2.0
"""What a transformer reads in training."""

from typing import Any, cast

import numpy as np
import torch

from ..autoencoders import VQVAEModel


class TeacherForcing:
    """
    Makes the arguments of [`VARTransformer`] of a batch of images or codes: every scale reads the image's own coarser
    scales.

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer.
        input_noise (`float`, *optional*, defaults to 0.0):
            Share of the codes that are replaced by random ones where the transformer reads them, not where it predicts
            them: when sampling it reads its own mistakes.
        seed (`int`, *optional*, defaults to 0): Seed of the replacements.
    """

    def __init__(self, vqvae: VQVAEModel, input_noise: float = 0.0, seed: int = 0):
        self.vqvae = vqvae
        self.input_noise = input_noise
        self.seed = seed

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor], position: int | None = None) -> dict[str, Any]:
        """
        Arguments for a batch.

        Args:
            batch (`dict[str, torch.Tensor]`):
                `codes` of shape `(batch, length)` or `pixel_values` in [-1, 1], and perhaps `class_labels`.
            position (`int`, *optional*):
                Number of the batch, which fixes, with the seed, what is replaced; nothing is without it.
        """
        vqvae = self.vqvae
        batch = {name: values.to(vqvae.device, non_blocking=True) for name, values in batch.items()}
        codes: Any = batch["codes"] if "codes" in batch else cast(Any, vqvae.encode(batch["pixel_values"])).codes
        read = codes
        if position is not None and self.input_noise > 0:
            # On the CPU, where the draws are the same whatever the device is.
            # torch's generator there looks at the lowest 32 bits of a seed alone, so the numbers are mixed first.
            (seed,) = np.random.SeedSequence((self.seed, position)).generate_state(1)
            generator = torch.Generator().manual_seed(int(seed))
            replaced = torch.rand(codes.shape, generator=generator) < self.input_noise
            others = torch.randint(vqvae.config.codebook_size, codes.shape, generator=generator)
            read = torch.where(replaced.to(codes.device), others.to(codes.device), codes)
        scale_inputs = vqvae.teacher_forcing(read)
        return {"class_labels": batch.get("class_labels"), "scale_inputs": scale_inputs, "labels": codes}
