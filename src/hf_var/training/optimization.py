# SPDX-License-Identifier: Apache-2.0
"""Optimizer, its schedules and averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import get_scheduler, get_wsd_schedule

from .arguments import DECAYS, TrainingArguments
from .sharding import is_sharded, saved_tensor, spread_like


# Tables of vectors: decay would pull positions, levels and codes towards each other.
UNDECAYED_NAMES = ("position", "level_embedding", "offset", "codebook")


class AveragedWeights(EMAModel):
    """
    diffusers' moving average of parameters, whose state holds whole tensors even where every process has a part of each.

    Args:
        model (`nn.Module`): All of its parameters are averaged.
        decay (`float`): Weight of the past, once enough steps were taken: before, it is `(1 + steps) / (10 + steps)`.
    """

    def __init__(self, model: nn.Module, decay: float):
        # One call for all parameters: with small models a loop over them costs as much as a layer. torch has none for
        # parameters that are spread over processes.
        super().__init__(model.parameters(), decay=decay, foreach=not is_sharded(model))
        # DeepSpeed trains in half precision, in which a slow average stands still.
        self.shadow_params = [parameter.float() for parameter in self.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate's checkpoints; all processes have to call it together."""
        state = super().state_dict()
        return state | {"shadow_params": [saved_tensor(parameter) for parameter in state["shadow_params"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For Accelerate's checkpoints."""
        own = self.shadow_params
        super().load_state_dict(state_dict)
        shadows = zip(self.shadow_params, own, strict=True)
        # Accelerate loads what is registered with it on the CPU.
        self.shadow_params = [spread_like(tensor, example).to(example.device) for tensor, example in shadows]


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


def make_scheduler(
    optimizer: torch.optim.Optimizer, args: TrainingArguments, first_step: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """
    The schedule of the learning rate: `lr_warmup_steps` up from zero, `lr_stable_steps` at its largest, then down to
    `lr_final_ratio` of it as `lr_scheduler` says.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        args ([`TrainingArguments`]): The arguments.
        first_step (`int`, *optional*, defaults to 0): Step of the run at which the schedule begins.
    """
    num_steps = args.max_train_steps - first_step
    if args.lr_scheduler in DECAYS and args.lr_stable_steps + args.lr_final_ratio > 0:
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_stable_steps=args.lr_stable_steps,
            num_decay_steps=max(num_steps - args.lr_warmup_steps - args.lr_stable_steps, 0),
            decay_type=args.lr_scheduler,
            min_lr_ratio=args.lr_final_ratio,
        )
    scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps
    )
    return cast(torch.optim.lr_scheduler.LambdaLR, scheduler)


def schedule_weight_decay(optimizer: Any, args: TrainingArguments, step: int) -> None:
    """Move the weight decay of [`make_optimizer`]'s first group along half a cosine to `weight_decay_end`, if there is one."""
    if args.weight_decay_end is not None:
        share = 0.5 + 0.5 * math.cos(math.pi * step / args.max_train_steps)
        weight_decay = args.weight_decay_end + (args.weight_decay - args.weight_decay_end) * share
        optimizer.param_groups[0]["weight_decay"] = weight_decay


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
        average ([`AveragedWeights`]): Average of the parameters of `model`.
        model (`nn.Module`): The model.
        parameter (`nn.Parameter`): One of its parameters.
        rows (`torch.LongTensor`, *optional*): Only these rows jumped.
    """
    index = next(index for index, other in enumerate(model.parameters()) if other is parameter)
    shadow = average.shadow_params[index]
    chosen = slice(None) if rows is None else rows
    shadow[chosen] = parameter[chosen].to(shadow)
