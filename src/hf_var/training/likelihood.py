# SPDX-License-Identifier: Apache-2.0
"""What a transformer reads in training, and how well it predicts codes, scale by scale."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from ..autoencoders import VQVAEModel
from .data import ValidationBatches


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


class CodePredictions:
    """
    Adds up how likely a model finds the codes of many images, and how often its first guess is right.

    Args:
        scale_lengths (`list[int]`): Tokens of every scale.
        device (`torch.device`): Where the logits are.
    """

    def __init__(self, scale_lengths: Sequence[int], device: torch.device | str):
        self.scale_lengths = list(scale_lengths)
        # Images, then the losses and the hits of every token.
        self.sums = torch.zeros(1 + 2 * sum(self.scale_lengths), device=device)

    @torch.no_grad()
    def add(self, logits: torch.Tensor, codes: torch.Tensor) -> None:
        """Note `(batch, length, codebook_size)` logits for `(batch, length)` codes."""
        losses = functional.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")  # (batch, length)
        hits = logits.argmax(dim=-1) == codes
        images = self.sums.new_tensor([len(codes)])
        self.sums += torch.cat([images, losses.sum(dim=0), hits.sum(dim=0)])

    def reset(self) -> None:
        """Begin anew."""
        self.sums.zero_()

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Means over the images of all processes, which have to call this together.

        Returns:
            `dict[str, float]`: `loss` (cross-entropy in nats per token, without label smoothing), `bits_per_token` (the
            same in bits) and `accuracy` (share of the tokens that are the likeliest ones) of all tokens; `loss_k` and
            `accuracy_k` of those of scale k.
        """
        sums = cast(torch.Tensor, accelerator.reduce(self.sums, reduction="sum")).cpu()
        losses, hits = (sums[1:] / sums[0]).chunk(2)
        figures = {
            "loss": losses.mean().item(),
            "bits_per_token": losses.mean().item() / math.log(2),
            "accuracy": hits.mean().item(),
        }
        parts = zip(losses.split(self.scale_lengths), hits.split(self.scale_lengths), strict=True)
        for scale, (scale_losses, scale_hits) in enumerate(parts):
            figures[f"loss_{scale}"] = scale_losses.mean().item()
            figures[f"accuracy_{scale}"] = scale_hits.mean().item()
        return figures


@torch.no_grad()
def measure_likelihood(
    transformer: nn.Module, teacher_forcing: TeacherForcing, validation: ValidationBatches, accelerator: Accelerator
) -> dict[str, float]:
    """
    How well `transformer` predicts the codes of `validation`, in evaluation mode: without dropout of any kind, that of
    classes among it.

    Args:
        transformer ([`VARTransformer`]): The model, not wrapped.
        teacher_forcing ([`TeacherForcing`]): Makes its inputs.
        validation ([`ValidationBatches`]): The part of this process; all of them have to call this together.
        accelerator (`Accelerator`): Its precision is used.

    Returns:
        `dict[str, float]`: The figures of [`CodePredictions`].

    Raises:
        `ValueError`: If there was no image.
    """
    config = teacher_forcing.vqvae.config
    predictions = CodePredictions(config.scale_lengths, accelerator.device)
    nothing = {"codes": torch.zeros(1, sum(config.scale_lengths), dtype=torch.long)}
    was_training = transformer.training
    transformer.eval()
    for batch in _in_step(validation, accelerator):
        inputs = teacher_forcing(nothing if batch is None else batch)
        codes = inputs.pop("labels")
        with accelerator.autocast():
            logits = transformer(**inputs).logits
        if batch is not None:
            predictions.add(logits, codes)
    transformer.train(was_training)
    figures = predictions.figures(accelerator)
    if not math.isfinite(figures["loss"]) and float(cast(torch.Tensor, accelerator.reduce(predictions.sums[0]))) == 0:
        raise ValueError("`validation_data` has no image that can be read.")
    return figures


def _in_step(batches: ValidationBatches, accelerator: Accelerator) -> Iterator[dict[str, torch.Tensor] | None]:
    """
    The batches, and `None` while other processes still have some: a sharded model runs in all processes or in none.
    """
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        remaining = torch.tensor(int(batch is not None), device=accelerator.device)
        if accelerator.num_processes > 1:
            remaining = cast(torch.Tensor, accelerator.reduce(remaining, reduction="sum"))
        if int(remaining) == 0:
            return
        yield batch
