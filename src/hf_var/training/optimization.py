# SPDX-License-Identifier: Apache-2.0
"""Optimization: gradients, optimizer, schedules and the average of the weights."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import get_scheduler, get_wsd_schedule

from ..ranges import CheckedFields, Decay, NonNegativeFloat, NonNegativeInt, OneOf, PositiveFloat, Share, argument
from .average import AveragedWeights, averaged_weights
from .sharding import sharded_tensors


# Those of transformers' get_scheduler that need no further arguments.
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# Schedules that end at `lr_final_ratio`.
DECAYS = ("linear", "cosine")
# AdamW's, of the size of a parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")
# Tables of vectors: decay would pull positions, levels and codes towards each other.
UNDECAYED_NAMES = ("position", "level_embedding", "offset", "codebook", "code_embedding", "condition_embedding")


@dataclass(kw_only=True)
class OptimizerConfig(CheckedFields):
    """How an [`Optimization`] moves the weights."""

    learning_rate: PositiveFloat = argument(3e-4, help="largest learning rate")
    lr_scheduler: Annotated[str, OneOf(*SCHEDULERS)] = argument("cosine", help=", ".join(SCHEDULERS))
    lr_warmup_steps: NonNegativeInt = argument(100, help="steps over which the learning rate rises from zero")
    lr_stable_steps: NonNegativeInt = argument(
        0, help="steps at the largest learning rate before a linear or cosine decay"
    )
    lr_final_ratio: Share = argument(
        0.0, help="a linear or cosine decay ends at this share of the largest learning rate"
    )
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.95
    weight_decay: NonNegativeFloat = argument(0.05, help="acts on matrices, not on biases and other vectors")
    weight_decay_end: NonNegativeFloat | None = argument(
        None, help="weight decay of the last step, reached by a cosine; default: weight_decay"
    )
    max_grad_norm: PositiveFloat = argument(2.0, help="gradients are scaled down to this norm")
    ema_decay: Decay = argument(0.999, help="of the averaged weights, which are saved; 0: no average")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_stable_steps", "lr_final_ratio"):
            if getattr(self, name) > 0 and self.lr_scheduler not in DECAYS:
                raise ValueError(
                    f"`{name}` goes with `lr_scheduler` {' or '.join(DECAYS)}, got {self.lr_scheduler!r}."
                )


class Optimization:
    """
    A model's optimizer with its schedules, clipping and average.

    ```python
    with accelerator.accumulate(optimization.model):
        optimization.minimize(loss)
    if accelerator.sync_gradients:
        optimization.finish_step()
    ```

    `weights` are optimized and averaged; `model` is called, around them. Learning rate and weight decay depend only on the
    configuration and the number of steps, so that a resumed run uses its own arguments.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        weights: nn.Module,
        config: OptimizerConfig,
        num_steps: int,
        model: nn.Module | None = None,
    ):
        self.accelerator = accelerator
        self.weights = weights
        self.config = config
        self.num_steps = num_steps
        self.steps = 0
        self.gradient_norm: torch.Tensor | float | None = None
        self._optimizer = make_optimizer(weights, config)
        self._ratio_at = _learning_rate_schedule(self._optimizer, config, num_steps)
        self.model, self._prepared = accelerator.prepare(weights if model is None else model, self._optimizer)
        self.average = AveragedWeights(weights, config.ema_decay) if config.ema_decay > 0 else None

    def minimize(self, loss: torch.Tensor) -> None:
        """After a forward pass: accumulate its gradients, and after the last one of a step update the weights."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.gradient_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self._prepared.step()
        self._prepared.zero_grad()

    def finish_step(self) -> None:
        """After an optimizer step: advance the schedules and the average."""
        self.steps += 1
        self._follow_schedules()
        if self.average is not None:
            self.average.step(self.weights.parameters())

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The averaged weights in place of the current ones inside the block."""
        return averaged_weights(self.average, self.weights)

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self._optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Steps, moments and averages by the names of the parameters."""
        names = {id(parameter): name for name, parameter in self.weights.named_parameters()}
        # DeepSpeed has parameters of its own, whose moments Accelerate saves.
        is_ours = self.accelerator.distributed_type != DistributedType.DEEPSPEED
        moments = {
            names[id(parameter)]: state for parameter, state in (self._optimizer.state.items() if is_ours else ())
        }
        average = None if self.average is None else self.average.state_dict()
        return {"steps": self.steps, "moments": moments, "average": average}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where [`Optimization.state_dict`] was taken."""
        parameters = dict(self.weights.named_parameters())
        for name, moments in state_dict["moments"].items():
            self._optimizer.state[parameters[name]] = {
                key: _moment_like(moment, parameters[name]) for key, moment in moments.items()
            }
        if self.average is not None:
            self.average.load_state_dict(state_dict["average"])
        self.steps = state_dict["steps"]
        if self.steps > 0:
            self._follow_schedules()

    def sharded_tensors(self) -> dict[str, torch.Tensor]:
        """What of the state is sharded, the moments as the parameters are."""
        parameters = sharded_tensors(self.weights)
        moments = {f"moments/{name}/{key}": parameters[name] for name in parameters for key in MOMENTS}
        averages = {} if self.average is None else self.average.sharded_tensors()
        return {**moments, **{f"average/{name}": average for name, average in averages.items()}}

    def _follow_schedules(self) -> None:
        config = self.config
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * self._ratio_at(self.steps)
        if config.weight_decay_end is not None:
            share = 0.5 + 0.5 * math.cos(math.pi * self.steps / self.num_steps)
            weight_decay = config.weight_decay_end + (config.weight_decay - config.weight_decay_end) * share
            self._optimizer.param_groups[0]["weight_decay"] = weight_decay


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW for the parameters that need a gradient, with weight decay only on matrices and convolutions."""
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not any(part in name for part in UNDECAYED_NAMES)
            (decayed if is_matrix else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    # One kernel for all parameters: with small models the loop over them takes longer than the arithmetic.
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def _learning_rate_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_steps: int
) -> Callable[[int], float]:
    """The learning rate of each step, as a share of the largest one; that of the first is set."""
    if config.lr_scheduler in DECAYS and config.lr_stable_steps + config.lr_final_ratio > 0:
        scheduler: Any = get_wsd_schedule(
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_stable_steps=config.lr_stable_steps,
            num_decay_steps=max(num_steps - config.lr_warmup_steps - config.lr_stable_steps, 0),
            decay_type=config.lr_scheduler,
            min_lr_ratio=config.lr_final_ratio,
        )
    else:
        scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=num_steps,
        )
    return scheduler.lr_lambdas[0]


def _moment_like(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if moment.ndim < parameter.ndim:
        # The number of steps.
        return moment.to(parameter.device)
    # In the parameter's memory format, which the fused kernel expects.
    return torch.empty_like(parameter).copy_(moment)
