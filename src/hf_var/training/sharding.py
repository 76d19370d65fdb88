# SPDX-License-Identifier: Apache-2.0
"""Whole weights of models that are sharded over processes (FSDP2)."""

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor


ModelType = TypeVar("ModelType", bound=nn.Module)


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over processes, which then have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def saved_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What the first process saves of a tensor, all of it; others have nothing. All processes call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def spread_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal in all processes, spread as `example` is."""
    if not isinstance(example, DTensor):
        return tensor
    local = tensor.to(example.device, example.dtype)
    return distribute_tensor(local, example.device_mesh, example.placements)


def model_state(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Weights to save: a sharded model's are on the CPU of the first process. All processes call this."""
    if not is_sharded(model):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load whole weights, which every process has, into a model that may be sharded."""
    if is_sharded(model):
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def whole_model(model: ModelType, make_empty: Callable[[], ModelType]) -> ModelType | None:
    """
    `model` itself, or if it is sharded a copy on the CPU that has all of its weights, so that what is saved is the
    same however many processes trained it. All processes call this together; only the first gets a copy. `make_empty`
    makes another model of the same configuration on the meta device, at no cost of memory or random numbers.
    """
    if not is_sharded(model):
        return model
    state = model_state(model)
    if torch.distributed.get_rank() > 0:
        return None
    with torch.device("meta"):
        empty = make_empty()
    empty.load_state_dict(state, assign=True)
    return empty
