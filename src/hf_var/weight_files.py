# SPDX-License-Identifier: Apache-2.0
"""Weight files: foreign ones, pickles included (only this file reads them, and only tensors), and the mode of our own."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError


StateDict = dict[str, torch.Tensor]


def read_state_dict(checkpoint: str | os.PathLike | Mapping, section: str) -> StateDict:
    """
    Read a state dict of tensors and nothing else.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pth` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict, whose
            tensors are copied.
        section (`str`): The model's place in a checkpoint of the official trainer, which holds several.

    Raises:
        `ValueError`: If the file does not exist, is truncated, or holds anything but tensors by name.
    """
    content: Any = checkpoint if isinstance(checkpoint, Mapping) else _read_file(os.fspath(checkpoint))
    if isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping):
        parts = content["trainer"]
        if section not in parts:
            raise ValueError(f"`checkpoint` of the official trainer has no {section!r}, it holds {sorted(parts)}.")
        content = parts[section]
    if not isinstance(content, Mapping):
        raise ValueError(f"`checkpoint` must hold a dictionary of tensors by name, got {type(content).__name__}.")
    others = [name for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if others:
        raise ValueError(f"`checkpoint` must hold tensors by name and nothing else, got {listing(others)} as well.")
    if isinstance(checkpoint, Mapping):
        # The model must not share memory with a state dict that its owner may go on using.
        return {name: tensor.clone() for name, tensor in content.items()}
    return dict(content)


def _read_file(path: str):
    if not os.path.isfile(path):
        raise ValueError(f"`checkpoint` must be an existing file or a state dict, got {path!r}.")
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used with files saved with" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        # torch's own message advises to switch the protection off.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        detail = f"it refers to {foreign.group(1)}" if foreign else "it is not a pickle of tensors"
        raise ValueError(f"`checkpoint` {path!r} cannot be read as weights and nothing else: {detail}.") from error
    except (RuntimeError, SafetensorError, EOFError, ValueError, KeyError) as error:
        detail = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"`checkpoint` {path!r} cannot be read as weights, it is truncated or no such file: {detail}."
        ) from error


def listing(names: list, limit: int = 8) -> str:
    """The first `limit` names, and how many more there are, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{sorted(map(str, names))[:limit]}{more}"


def use_umask(path: str | os.PathLike) -> None:
    """Give a file, or the weights in a folder, the mode of any other new file: safetensors hides its own from others."""
    path = Path(path)
    for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
        # The system's mode for new files cannot be read without changing it for all threads.
        probe = file.with_name(f".mode-of-{file.name}")
        probe.touch()
        file.chmod(probe.stat().st_mode)
        probe.unlink()
