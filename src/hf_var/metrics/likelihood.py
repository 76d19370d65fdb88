# SPDX-License-Identifier: Apache-2.0
"""Likelihood metrics of a transformer, in total and per scale."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..modes import evaluation_mode
from ..priors.likelihood import log_probs
from ..priors.stacks import unstack_codes


Batch = dict[str, torch.Tensor]


class CodePredictions:
    """Accumulates the cross-entropy of codes over many images, and the accuracy of the likeliest code."""

    def __init__(self, scale_lengths: Sequence[int], device: torch.device | str):
        self.scale_lengths = list(scale_lengths)
        # Images, then the losses and the hits of every token.
        self.sums = torch.zeros(1 + 2 * sum(self.scale_lengths), device=device)

    @torch.no_grad()
    def add(self, logits: torch.Tensor, codes: torch.Tensor) -> None:
        """Add logits `(batch, length, codebook_size)` of codes `(batch, length)`, or both in stacks, see [`stack_codes`]."""
        if codes.ndim == 3:
            logits, codes = unstack_codes(logits), unstack_codes(codes)
        losses = -log_probs(logits, codes)  # (batch, length)
        hits = logits.argmax(dim=-1) == codes
        images = self.sums.new_tensor([len(codes)])
        self.sums += torch.cat([images, losses.sum(dim=0), hits.sum(dim=0)])

    def reset(self) -> None:
        """Reset the sums."""
        self.sums.zero_()

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Means over the images of all processes, which have to call this together: cross-entropy in nats (`loss`,
        without label smoothing) and in bits, and the share of tokens that are the likeliest ones, of all tokens and of
        each scale.
        """
        sums = cast(torch.Tensor, accelerator.reduce(self.sums, reduction="sum")).cpu()
        losses, hits = (sums[1:] / sums[0]).chunk(2)
        metrics = {
            "loss": losses.mean().item(),
            "bits_per_token": losses.mean().item() / math.log(2),
            "accuracy": hits.mean().item(),
        }
        parts = zip(losses.split(self.scale_lengths), hits.split(self.scale_lengths), strict=True)
        for scale, (scale_losses, scale_hits) in enumerate(parts):
            metrics[f"loss_{scale}"] = scale_losses.mean().item()
            metrics[f"accuracy_{scale}"] = scale_hits.mean().item()
        return metrics


@torch.no_grad()
def measure_likelihood(
    prior: nn.Module,
    make_inputs: Callable[[Batch], dict[str, Any]],
    validation: Iterable[Batch],
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    How well a prior, which is not wrapped, predicts the codes of this process's share of `validation`, in evaluation mode
    and without class dropout. `make_inputs` maps a batch to its arguments, with the codes as `labels`. All processes have
    to call this together.
    """
    predictions = CodePredictions(cast(Any, prior.config).scale_lengths, accelerator.device)
    with evaluation_mode(prior):
        for batch, is_own in _in_step(validation, accelerator):
            inputs = make_inputs(batch)
            codes = inputs.pop("labels")
            with accelerator.autocast():
                logits = prior(**inputs).logits
            if is_own:
                predictions.add(logits, codes)
    metrics = predictions.compute(accelerator)
    if not math.isfinite(metrics["loss"]) and float(cast(torch.Tensor, accelerator.reduce(predictions.sums[0]))) == 0:
        raise ValueError("`validation_data` has no image that can be read.")
    return metrics


def _in_step(batches: Iterable[Batch], accelerator: Accelerator) -> Iterator[tuple[Batch, bool]]:
    """
    The batches of this process, and whether they are its own: a sharded model runs in all processes or in none, and one that
    waits for others repeats its last batch or, if it never had one, another's first item.
    """
    iterator = iter(batches)
    last: Batch | None = None
    while True:
        batch = next(iterator, None)
        remaining = torch.tensor(int(batch is not None), device=accelerator.device)
        if accelerator.num_processes > 1:
            remaining = cast(torch.Tensor, accelerator.reduce(remaining, reduction="sum"))
        if int(remaining) == 0:
            return
        if last is None:
            last = batch if accelerator.num_processes == 1 else _first_item(batch)
        last = last if batch is None else batch
        yield cast(Batch, last), batch is not None


def _first_item(batch: Batch | None) -> Batch:
    """The first item of the first process that has a batch; for all processes together."""
    own = None if batch is None else {name: values[:1].cpu() for name, values in batch.items()}
    return next(item for item in gather_object([own]) if item is not None)
