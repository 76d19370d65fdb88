# SPDX-License-Identifier: Apache-2.0
"""Optimizer and averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from .arguments import TrainingArguments


# Raw parameters of VARTransformer that are tables of vectors: decay would pull positions and levels towards each other.
UNDECAYED_NAMES = ("position", "level_embedding", "offset")


class AveragedWeights(Protocol):
    """What `averaged_weights` needs of an exponential moving average: diffusers' `EMAModel` has it."""

    def store(self, parameters) -> None: ...

    def copy_to(self, parameters) -> None: ...

    def restore(self, parameters) -> None: ...


def make_optimizer(model: nn.Module, args: TrainingArguments) -> torch.optim.AdamW:
    """AdamW whose weight decay acts on matrices and convolutions alone."""
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not any(part in name for part in UNDECAYED_NAMES)
            (decayed if is_matrix else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    # One kernel for all parameters: with small models the loop over them takes longer than the arithmetic.
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), fused=True)


@contextmanager
def averaged_weights(average: AveragedWeights | None, model: nn.Module) -> Iterator[nn.Module]:
    """`model` with the averaged weights inside the block and with its own ones after it."""
    if average is None:
        yield model
        return
    parameters = list(model.parameters())
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield model
    finally:
        average.restore(parameters)
