# SPDX-License-Identifier: Apache-2.0
"""Averaged weights, which a training validates and saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import is_sharded, reshard


class AveragedWeights(EMAModel):
    """
    diffusers' moving average of all parameters of a model, whose state has names. The weight of the past is
    `(1 + steps) / (10 + steps)` until that reaches `decay`.
    """

    def __init__(self, model: nn.Module, decay: float):
        # One call for all parameters: with small models a loop over them costs as much as a layer. torch has none for
        # parameters that are spread over processes.
        super().__init__(model.parameters(), decay=decay, foreach=not is_sharded(model))
        self.names = [name for name, _ in model.named_parameters()]
        # DeepSpeed trains in half precision, in which a slow average would not change.
        self.shadow_params = [parameter.float() for parameter in self.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        """Steps and averages by name."""
        return {"steps": self.optimization_step, "weights": dict(zip(self.names, self.shadow_params, strict=True))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where [`AveragedWeights.state_dict`] was taken."""
        self.optimization_step = state_dict["steps"]
        for name, shadow in zip(self.names, self.shadow_params, strict=True):
            shadow.copy_(state_dict["weights"][name])

    def sharded_tensors(self) -> dict[str, torch.Tensor]:
        """What of the state is sharded."""
        shadows = zip(self.names, self.shadow_params, strict=True)
        return {f"weights/{name}": shadow for name, shadow in shadows if isinstance(shadow, DTensor)}

    @torch.no_grad()
    def restart(self, name: str, value: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Let the average of a parameter (of its `rows` alone, if given) begin at `value`, to which it jumped."""
        shadow = self.shadow_params[self.names.index(name)]
        chosen = slice(None) if rows is None else rows
        shadow[chosen] = value[chosen].to(shadow)


@contextmanager
def averaged_weights(average: EMAModel | None, model: nn.Module) -> Iterator[nn.Module]:
    """`model` with the averaged weights inside the block and with its own ones after it."""
    if average is None:
        yield model
        return
    reshard(model)
    parameters = list(model.parameters())
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield model
    finally:
        reshard(model)
        average.restore(parameters)
