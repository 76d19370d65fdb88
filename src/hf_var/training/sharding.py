# SPDX-License-Identifier: Apache-2.0
"""Whole weights of models that are sharded over processes (FSDP2)."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..files import unfinished
from .state_files import errors_of_processes


ModelType = TypeVar("ModelType", bound=nn.Module)


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def sharded_tensors(part: Any) -> dict[str, torch.Tensor]:
    """
    The tensors in the state of a part of a run of which every process holds only a part, by their names there. Parts that
    are not modules may have a method of this name.
    """
    if isinstance(part, nn.Module):
        return {name: tensor for name, tensor in part.state_dict().items() if isinstance(tensor, DTensor)}
    return part.sharded_tensors() if hasattr(part, "sharded_tensors") else {}


def reshard(model: nn.Module) -> None:
    """
    Let each process keep its part alone of what a forward pass has gathered. After one without a backward pass, some of the
    parameters are whole copies otherwise, and what is written into the parts is not seen by the next.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over processes, which then have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_model(model: ModelType, make_empty: Callable[[], ModelType], folder: str | Path) -> ModelType | None:
    """
    `model` itself, or if it is sharded a copy that has all of its weights, so that what is saved is the same however many
    processes trained it. All processes call this together; only the first gets a copy.

    The weights of the copy lie in a file, of which the system reads what is needed: every process writes its part into
    `folder`, which all of them see, and the first one puts them together, a tensor at a time. `make_empty` makes another
    model of the same configuration on the meta device, at no cost of memory or random numbers.
    """
    if not is_sharded(model):
        return model
    place, is_first = unfinished(Path(folder) / "weights"), torch.distributed.get_rank() == 0
    if is_first:
        # Parts that a run has left that was stopped here would be put together with these.
        shutil.rmtree(place, ignore_errors=True)
    torch.distributed.barrier()
    writer = HuggingFaceStorageWriter(str(place), save_distributed=True, enable_consolidation=True)
    try:
        with errors_of_processes():
            save(model.state_dict(), storage_writer=writer)
        if not is_first:
            return None
        (weights,) = place.glob("*.safetensors")
        state = load_file(weights)
    finally:
        if is_first:
            # The tensors stay where the names of the files go. Network file systems may keep the names as long.
            shutil.rmtree(place, ignore_errors=True)
    with torch.device("meta"):
        empty = make_empty()
    empty.load_state_dict(state, assign=True)
    return empty
