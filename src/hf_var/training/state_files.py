# SPDX-License-Identifier: Apache-2.0
"""States of objects as safetensors files: tensors and JSON, so reading them cannot run code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..weight_files import use_umask


# Key of the placeholder that replaces a tensor by its name.
TENSOR = "tensor"


def write_state(path: str | Path, state: Any) -> None:
    """Write dictionaries with names as keys, lists, tensors, arrays and what JSON knows. Tuples become lists."""
    tensors: dict[str, torch.Tensor] = {}
    structure = _without_tensors(state, "", tensors)
    save_file(tensors, path, metadata={"structure": json.dumps(structure)})
    use_umask(path)


def read_state(path: str | Path) -> Any:
    """What [`write_state`] wrote, with its tensors on the CPU; arrays come back as tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads(file.metadata()["structure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        return _with_tensors(structure, tensors)
    except FileNotFoundError as error:
        raise ValueError(f"The file {str(path)!r} is missing.") from error
    except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"The file {str(path)!r} is truncated or damaged: {error}") from error


def _without_tensors(state: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(state, np.ndarray):
        state = torch.from_numpy(state)
    if isinstance(state, torch.Tensor):
        tensors[name] = state.detach().cpu().contiguous()
        return {TENSOR: name}
    if isinstance(state, Mapping):
        return {key: _without_tensors(value, f"{name}/{key}", tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_without_tensors(value, f"{name}/{index}", tensors) for index, value in enumerate(state)]
    return state


def _with_tensors(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(structure, dict):
        if structure.keys() == {TENSOR}:
            return tensors[structure[TENSOR]]
        return {key: _with_tensors(value, tensors) for key, value in structure.items()}
    if isinstance(structure, list):
        return [_with_tensors(value, tensors) for value in structure]
    return structure
