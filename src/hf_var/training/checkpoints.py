# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, written atomically, with one file per part of a run."""

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import logging

from ..files import remove_unfinished, unfinished
from .identity import RunIdentity, read_identity, write_identity
from .sharding import load_model_state, model_state
from .state_files import read_state, write_state


logger = logging.get_logger(__name__)

PREFIX = "step-"
# The folder that Accelerate saves when DeepSpeed holds weights and optimizer.
DEEPSPEED_FOLDER = "deepspeed"


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    return sorted((Path(output_dir) / "checkpoints").glob(f"{PREFIX}*"))


def checkpoint_step(folder: str | Path) -> int:
    """Number of optimizer steps of a checkpoint."""
    return int(Path(folder).name.removeprefix(PREFIX))


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; `None` for a new run, or `latest` without any."""
    if resume_from_checkpoint is None:
        names = [path.name for path in checkpoint_folders(output_dir)]
        if names:
            raise ValueError(
                f"`output_dir` = {str(output_dir)!r} has the checkpoints {names} of another run, which a new one would "
                "replace. Continue it with `resume_from_checkpoint` latest, or choose another folder."
            )
        return None
    if resume_from_checkpoint == "latest":
        return next(reversed(checkpoint_folders(output_dir)), None)
    folder = Path(resume_from_checkpoint)
    if not folder.is_dir() or not folder.name.startswith(PREFIX):
        raise ValueError(
            f"`resume_from_checkpoint` must be latest or a folder {PREFIX}..., got {resume_from_checkpoint!r}. "
            f"{output_dir} has {[path.name for path in checkpoint_folders(output_dir)]}."
        )
    others = [path.name for path in checkpoint_folders(output_dir)]
    if others and folder.resolve().parent != (Path(output_dir) / "checkpoints").resolve():
        raise ValueError(
            f"`resume_from_checkpoint` = {resume_from_checkpoint!r} is not of `output_dir` = {str(output_dir)!r}, which has "
            f"the checkpoints {others} of another run: choose another `output_dir`."
        )
    return folder


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    total_limit: int,
    parts: Mapping[str, Any],
    identity: RunIdentity,
) -> None:
    """Save the parts of a run, all random numbers and its identity, and remove all but the newest checkpoints."""
    folder = Path(output_dir) / "checkpoints" / f"{PREFIX}{step:08d}"
    place = unfinished(folder)
    if accelerator.is_main_process:
        remove_unfinished(folder.parent)
        place.mkdir(parents=True)
        write_identity(place, identity, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.save_state(str(place / DEEPSPEED_FOLDER))
    for name, part in parts.items():
        # In all processes, each of which may have a part of it.
        state = model_state(part) if isinstance(part, nn.Module) else part.state_dict()
        if accelerator.is_main_process:
            write_state(place / f"{name}.safetensors", state)
    write_state(place / random_state_name(accelerator.process_index), random_state(accelerator.device))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if folder.exists():
            _remove(folder)
        os.replace(place, folder)
        for old in checkpoint_folders(output_dir)[:-total_limit]:
            _remove(old)


def load_checkpoint(accelerator: Accelerator, folder: str | Path, parts: Mapping[str, Any]) -> None:
    """Load what [`save_checkpoint`] saved."""
    folder = Path(folder)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.load_state(str(folder / DEEPSPEED_FOLDER))
    for name, part in parts.items():
        state = read_state(folder / f"{name}.safetensors")
        try:
            if isinstance(part, nn.Module):
                load_model_state(part, state)
            else:
                part.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The part {name!r} of the checkpoint {str(folder)!r} does not fit this run: {error}"
            ) from error
    num_processes = read_identity(folder)["num_processes"]
    if accelerator.process_index >= num_processes:
        logger.warning(
            f"Process {accelerator.process_index} begins with new random numbers: there were {num_processes}."
        )
        return
    set_random_state(read_state(folder / random_state_name(accelerator.process_index)), accelerator.device)


def random_state_name(process_index: int) -> str:
    """The file with the random numbers of a process."""
    return f"random_state_{process_index}.safetensors"


def remove_later_checkpoints(output_dir: str | Path, step: int) -> None:
    """Remove the checkpoints after `step`, from which a run is resumed: they belong to another course of the run."""
    for folder in checkpoint_folders(output_dir):
        if checkpoint_step(folder) > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    removed = unfinished(folder.with_name(f"removed-{folder.name}"))
    os.replace(folder, removed)
    shutil.rmtree(removed)


# --------------------------------------------------------------------------------------------------------------------
# The global random number generators, which libraries and torch's dropout use


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, on the CPU and on `device`."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what [`random_state`] returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])
