# SPDX-License-Identifier: Apache-2.0
"""Optimizer and averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from .arguments import TrainingArguments


# Tables of vectors: decay would pull positions, levels and codes towards each other.
UNDECAYED_NAMES = ("position", "level_embedding", "offset", "codebook")


class AveragedWeights(Protocol):
    """What is needed here of an exponential moving average of parameters: diffusers' `EMAModel` has it."""

    shadow_params: list[torch.Tensor]

    def to(self, device) -> None: ...

    def store(self, parameters) -> None: ...

    def copy_to(self, parameters) -> None: ...

    def restore(self, parameters) -> None: ...


def make_optimizer(
    model: nn.Module, args: TrainingArguments, learning_rate: float | None = None, beta1: float | None = None
) -> torch.optim.AdamW:
    """
    AdamW whose weight decay acts on matrices and convolutions alone.

    Args:
        model (`nn.Module`): Its parameters that need a gradient are optimized.
        args ([`TrainingArguments`]): Weight decay, learning rate and betas.
        learning_rate (`float`, *optional*): In place of that of `args`.
        beta1 (`float`, *optional*): In place of that of `args`.
    """
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
    betas = (args.adam_beta1 if beta1 is None else beta1, args.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=args.learning_rate if learning_rate is None else learning_rate, betas=betas, fused=True
    )


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


@torch.no_grad()
def restart_average(
    average: AveragedWeights, model: nn.Module, parameter: nn.Parameter, rows: torch.Tensor | None = None
) -> None:
    """
    Let the average of `parameter` of `model` begin at its present value, because it jumped.

    Args:
        average (`EMAModel`): Average of `model.parameters()`.
        model (`nn.Module`): The model.
        parameter (`nn.Parameter`): One of its parameters.
        rows (`torch.LongTensor`, *optional*): Only these rows jumped.
    """
    index = next(index for index, other in enumerate(model.parameters()) if other is parameter)
    shadow = average.shadow_params[index]
    chosen = slice(None) if rows is None else rows
    shadow[chosen] = parameter[chosen].to(shadow)
