# SPDX-License-Identifier: Apache-2.0
"""Weight files: foreign ones, pickles included (only this file reads them, and only tensors), and the mode of our own."""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open


logger = getLogger(__name__)

StateDict = dict[str, torch.Tensor]

# Where trainers keep a model, beside optimizer states and the like.
NESTS = ("state_dict", "model")
MAX_NESTING = 8
# Packages whose classes stand beside the weights: Lightning keeps the states of callbacks by their classes.
TRAINERS = ("pytorch_lightning.", "lightning.")
# What wrappers put before the names: DDP and `torch.compile`.
WRAPPERS = ("module.", "_orig_mod.")


def read_state_dict(checkpoint: str | os.PathLike | Mapping, section: str) -> StateDict:
    """
    Read a state dict of tensors and nothing else.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pth` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict, whose
            tensors are copied. The state dict may be nested, see [`find_state_dict`], and its names may begin with what DDP
            and `torch.compile` put before all of them.
        section (`str`): The model's place in a checkpoint of the official trainer, which holds several.

    Raises:
        `ValueError`: If the file does not exist, is truncated or damaged, or holds anything but tensors by name.
    """
    if not isinstance(checkpoint, (str, os.PathLike, Mapping)):
        raise ValueError(f"`checkpoint` must be a path or a state dict, got {type(checkpoint).__name__}.")
    content: Any = checkpoint if isinstance(checkpoint, Mapping) else _read_file(os.fspath(checkpoint))
    content = find_state_dict(content, section)
    others = [name for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if others:
        raise ValueError(f"`checkpoint` must hold tensors by name and nothing else, got {listing(others)} as well.")
    state_dict = _without_wrappers(dict(content))
    for name, tensor in state_dict.items():
        _check_tensor(name, tensor, is_from_file=not isinstance(checkpoint, Mapping))
    if isinstance(checkpoint, Mapping):
        # The model must not share memory with a state dict that its owner may go on using.
        return {name: tensor.clone() for name, tensor in state_dict.items()}
    return state_dict


def find_state_dict(content: Any, section: str) -> Mapping:
    """
    The state dict inside a checkpoint: the part `section` of `content["trainer"]`, or what is below `"state_dict"` or
    `"model"`, at any depth. All that stands beside a nested one is left out: optimizer states, epochs, arguments.

    Raises:
        `ValueError`: If there is no dictionary, or none of this section.
    """
    found = content
    for _ in range(MAX_NESTING):
        if not isinstance(found, Mapping):
            raise ValueError(f"`checkpoint` must hold a dictionary of tensors by name, got {type(found).__name__}.")
        parts = found.get("trainer")
        if isinstance(parts, Mapping):
            if section not in parts:
                raise ValueError(
                    f"`checkpoint` of the official trainer has no {section!r}, it holds {listing(list(parts))}."
                )
            found = parts[section]
            continue
        nested = next((found[name] for name in NESTS if isinstance(found.get(name), Mapping)), None)
        if nested is None:
            return found
        found = nested
    raise ValueError(f"`checkpoint` must nest its state dict less than {MAX_NESTING} levels deep.")


def _without_wrappers(state_dict: StateDict) -> StateDict:
    """The same tensors by the names that the model itself gives them."""
    while prefix := next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in state_dict)), None):
        others = [name for name in state_dict if not name.startswith(prefix)]
        if others:
            raise ValueError(
                f"`checkpoint` has the prefix {prefix!r} before some of its keys only, not before {listing(others)}: remove "
                "it, or add it to all of them."
            )
        logger.info("Removing the prefix %r, which all keys of the checkpoint have.", prefix)
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def _check_tensor(name: str, tensor: torch.Tensor, is_from_file: bool) -> None:
    """Raise a `ValueError` for a tensor that no weight can be, before its elements are touched."""
    is_empty = tensor.is_meta and is_from_file
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or is_empty:
        kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
        raise ValueError(f"`checkpoint` must hold plain dense tensors, got {name} ({kind}).")
    # A view that repeats its elements may be as large as it likes.
    if tensor.numel() == 0 or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"`checkpoint` must hold every element of its tensors, got {name} of the shape {tuple(tensor.shape)} with "
            f"{tensor.untyped_storage().nbytes()} bytes."
        )


def _read_file(path: str):
    if not os.path.isfile(path):
        raise ValueError(f"`checkpoint` must be an existing file or a state dict, got {path!r}.")
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        if not zipfile.is_zipfile(path):  # the format before torch 1.6
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
        _check_archive(path)
        # A trainer's arguments and the states of its parts are harmless, and left out.
        with torch.serialization.safe_globals([argparse.Namespace, *_inert_classes(path)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to switch the protection off.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        detail = f"it refers to {foreign.group(1)}" if foreign else "it is not a pickle of tensors"
        raise ValueError(f"`checkpoint` {path!r} cannot be read as weights and nothing else: {detail}.") from error
    except Exception as error:  # of any kind: a damaged pickle may make torch's reader do anything but run code
        raise _unreadable("`checkpoint` ", path, error) from error


def _inert_classes(path: str) -> list[tuple[type, str]]:
    """Empty classes in place of those of trainers that a file names: what these would do is neither run nor imported."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [
        (type("Inert", (), {"__setstate__": lambda *_: None}), name) for name in names if name.startswith(TRAINERS)
    ]


def _check_archive(path: str) -> None:
    """Compare the checksums of a `.pth` file, which memory-mapping does not."""
    with zipfile.ZipFile(path) as archive:
        packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
        damaged = packed[0] if packed else archive.testzip()
    if damaged is not None:
        raise ValueError(f"its record {damaged!r} is {'compressed' if packed else 'damaged'}")


def read_shapes(paths: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """
    Shapes and dtypes, as safetensors names these, of all tensors in safetensors files, from their headers alone.

    Raises:
        `ValueError`: If a file is truncated or no such file.
    """
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    part = file.get_slice(name)
                    found[name] = tuple(part.get_shape()), part.get_dtype()
        except Exception as error:
            raise _unreadable("", path, error) from error
    return found


def _unreadable(what: str, path: str, error: Exception) -> ValueError:
    detail = str(error).partition("\n")[0] or type(error).__name__
    return ValueError(f"{what}{path!r} cannot be read as weights, it is truncated or no such file: {detail}.")


def check_finite_weights(weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise a `ValueError` that names the weights with NaN or infinite values; meta tensors are passed over."""
    # Subclasses, such as quantized weights, and numbers of 8 bits have no such comparison.
    extremes = {
        name: torch.stack(tensor.detach().aminmax()).isfinite().all()
        for name, tensor in weights.items()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and tensor.element_size() > 1
        and tensor.numel() > 0
        and not tensor.is_meta
    }
    # One transfer from each device.
    devices = {flag.device for flag in extremes.values()}
    for device in devices:
        names = [name for name, flag in extremes.items() if flag.device == device]
        flags = torch.stack([extremes[name] for name in names]).tolist()
        broken = [name for name, is_finite in zip(names, flags, strict=True) if not is_finite]
        if broken:
            raise ValueError(
                f"{source} has weights with NaN or infinite values, {listing(broken)}: use an earlier one."
            )


def listing(names: list, limit: int = 8) -> str:
    """The first `limit` names, and how many more there are, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{sorted(map(str, names))[:limit]}{more}"


def use_umask(path: str | os.PathLike) -> None:
    """Give a file, or the weights in a folder, the mode of any other new file: safetensors hides its own from others."""
    path = Path(path)
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        # The system's mode for new files cannot be read without changing it for all threads.
        probe = file.with_name(f".mode-of-{file.name}")
        probe.touch()
        file.chmod(probe.stat().st_mode)
        probe.unlink()
