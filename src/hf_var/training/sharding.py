# SPDX-License-Identifier: Apache-2.0
"""Models whose parameters are spread over processes (FSDP2), as whole ones."""

from typing import TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor


ModelType = TypeVar("ModelType", bound=nn.Module)


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over processes, which then have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal in all processes, spread as `example` is."""
    if not isinstance(example, DTensor):
        return tensor
    local = tensor.to(example.device, example.dtype)
    return distribute_tensor(local, example.device_mesh, example.placements)


def whole_model(model: ModelType, empty: ModelType | None = None) -> ModelType:
    """
    `model` itself, or if it is sharded a copy on the CPU that has all of its weights: what is saved and loaded is the same
    however many processes trained it. All processes have to call this together.

    Args:
        model (`nn.Module`): The model, not wrapped.
        empty (`nn.Module`): Another model of the same configuration, which becomes the copy. Needed if `model` is sharded.

    Raises:
        `ValueError`: If `model` is sharded and there is no `empty`.
    """
    if not is_sharded(model):
        return model
    if empty is None:
        raise ValueError("`empty` must be a model of the same configuration, to hold the weights of a sharded one.")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Only the first process receives them.
    if state:
        empty.load_state_dict(state)
    return empty
