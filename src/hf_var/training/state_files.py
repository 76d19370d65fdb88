# SPDX-License-Identifier: Apache-2.0
"""
States of objects as files: tensors in safetensors, the rest as JSON, so reading them cannot run code. Small ones are one
file; the tensors of large ones are written by all processes, each its part, as torch's distributed checkpoints.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    async_save,
    load,
)
from torch.distributed.tensor import DTensor

from ..weight_files import use_umask


# Keys of the placeholder that replaces a tensor by its name and its shape.
TENSOR, SHAPE = "tensor", "shape"
# A process holds the bytes of its part of a file in memory while it writes them. A file ends with the tensor that makes it so large.
MAX_FILE_SIZE = 2**30

Tensors = dict[str, torch.Tensor]


def write_state(path: str | Path, state: Any) -> None:
    """Write dictionaries with names as keys, lists, tensors, arrays and what JSON knows. Tuples become lists."""
    structure, tensors = split_state(state, "")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"structure": json.dumps(structure)})
    use_umask(path)


def read_state(path: str | Path) -> Any:
    """What [`write_state`] wrote, with its tensors on the CPU; arrays come back as tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads(file.metadata()["structure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        return join_state(structure, tensors)
    except FileNotFoundError as error:
        raise ValueError(f"The file {str(path)!r} is missing.") from error
    except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"The file {str(path)!r} is truncated or damaged: {error}") from error


def split_state(state: Any, name: str) -> tuple[Any, Tensors]:
    """A state called `name` with placeholders in place of its tensors and arrays, and these by their names."""
    tensors: Tensors = {}
    return _without_tensors(state, name, tensors), tensors


def join_state(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that [`split_state`] took apart."""
    if isinstance(structure, dict):
        if structure.keys() == {TENSOR, SHAPE}:
            return tensors[structure[TENSOR]]
        return {key: join_state(value, tensors) for key, value in structure.items()}
    if isinstance(structure, list):
        return [join_state(value, tensors) for value in structure]
    return structure


def tensor_shapes(structure: Any) -> dict[str, torch.Size]:
    """The names and the shapes of the tensors that are missing from a structure."""
    if isinstance(structure, dict):
        if structure.keys() == {TENSOR, SHAPE}:
            return {structure[TENSOR]: torch.Size(structure[SHAPE])}
        structure = list(structure.values())
    if isinstance(structure, list):
        return {name: shape for value in structure for name, shape in tensor_shapes(value).items()}
    return {}


def _without_tensors(state: Any, name: str, tensors: Tensors) -> Any:
    if isinstance(state, np.ndarray):
        state = torch.from_numpy(state)
    if isinstance(state, torch.Tensor):
        if name in tensors:
            raise ValueError(f"Two tensors of a state have the name {name!r}.")
        tensors[name] = state
        return {TENSOR: name, SHAPE: list(state.shape)}
    if isinstance(state, Mapping):
        return {key: _without_tensors(value, f"{name}/{key}", tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_without_tensors(value, f"{name}/{index}", tensors) for index, value in enumerate(state)]
    return state


# --------------------------------------------------------------------------------------------------------------------
# Tensors of several processes


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes each process' part of the tensors; then the first process calls `when_written`."""

    def __init__(self, folder: Path, files: dict[str, int], when_written: Callable[[], None]):
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self._when_written = when_written

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        self._when_written()


def write_shards(folder: Path, tensors: Tensors, group: Any, when_written: Callable[[], None]) -> Future:
    """
    Write tensors that are sharded over the processes of `group`, which call this together, and those that the first of them
    has. They are copied at once and written in the background; after the last process the first one calls `when_written`.
    `group` is one that knows CPUs, or `None` if torch has no processes to communicate with.
    """
    if group is not None and torch.distributed.get_rank(group) > 0:
        # What all processes have, the first one writes: of buffers each may have its own values.
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # The first process tells the others the files.
    writer = _ShardWriter(folder, _files_of(tensors), when_written)
    saved = async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    return cast(Future, saved)


@contextmanager
def without_process_warning() -> Iterator[None]:
    """Without torch's warning that there is one process, of which those that train in one know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def wait_for_shards(written: Future) -> None:
    """Wait until the tensors are written, and raise what prevented it."""
    with errors_of_processes():
        written.result()


@contextmanager
def errors_of_processes() -> Iterator[None]:
    """Raise the error of the first process that had one in place of torch's, which is none that anybody catches."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def read_shards(
    folder: Path, shapes: Mapping[str, torch.Size], examples: Mapping[str, torch.Tensor], group: Any
) -> Tensors:
    """
    Tensors that [`write_shards`] wrote, in however many processes: sharded as in `examples`, or else whole, on the CPU. All
    processes of `group` call this together. Raises a `ValueError` for a file that is missing or damaged.
    """
    if not shapes:
        return {}
    reader = HuggingFaceStorageReader(str(folder))
    try:
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"A file of {str(folder)!r} is truncated or damaged: {error}") from error
    tensors = {}
    for name, shape in shapes.items():
        # The whole of it may be spread over several files.
        found = sum(math.prod(chunk.sizes) for chunk in stored[name].chunks) if name in stored else -1
        if found != math.prod(shape) or stored[name].size != shape:
            raise ValueError(f"A file of {str(folder)!r} is missing: {name!r} is not there as a whole.")
        if name in examples and examples[name].shape != shape:
            raise ValueError(f"{name!r} has the shape {tuple(shape)}, expected {tuple(examples[name].shape)}.")
        empty = torch.empty(shape, dtype=stored[name].properties.dtype)
        tensors[name] = torch.empty_like(examples[name], requires_grad=False) if name in examples else empty
    try:
        with errors_of_processes():
            load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"A file of {str(folder)!r} is truncated or damaged: {error}") from error
    return tensors


def _files_of(tensors: Tensors) -> dict[str, int]:
    """The number of the file, from 1 on, in which each tensor is written."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        files[name] = 1 + size // MAX_FILE_SIZE
    return files
