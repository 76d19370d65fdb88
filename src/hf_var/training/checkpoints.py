# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, written atomically and in the background by all processes of a run."""

import json
import os
import random
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers.utils import logging

from ..files import remove_unfinished, unfinished
from .identity import RunIdentity, read_identity, write_identity
from .sharding import sharded_tensors
from .state_files import (
    join_state,
    read_shards,
    read_state,
    split_state,
    tensor_shapes,
    wait_for_shards,
    write_shards,
    write_state,
)


logger = logging.get_logger(__name__)

PREFIX = "step-"
# The folder that Accelerate saves when DeepSpeed holds weights and optimizer.
DEEPSPEED_FOLDER = "deepspeed"
# The tensors of all parts, and what else is in their states.
TENSORS_FOLDER = "tensors"
STATES_FILE = "states.json"


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


class Checkpoints:
    """
    Writes and reads the checkpoints of a run, in all of its processes together. Every process writes its part of what is
    sharded, and the first one all else, in the background; a checkpoint gets its name when all are done, so that it is
    complete or absent.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str | Path, total_limit: int):
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.total_limit = total_limit
        # Of their own, through the CPUs: what is written in the background must not come between the training's messages.
        # torch wants it of a single process as well, if that was started as one of several.
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._group = torch.distributed.new_group(backend="gloo") if is_distributed else None
        self._written: Future | None = None

    def save(self, step: int, parts: Mapping[str, Any], identity: RunIdentity) -> None:
        """
        Copy the parts of a run, all random numbers and its identity, and write them in the background; then all but the
        newest checkpoints are removed. What is still being written is waited for.
        """
        self.finish()
        accelerator = self.accelerator
        folder = self.output_dir / "checkpoints" / f"{PREFIX}{step:08d}"
        place = unfinished(folder)
        if accelerator.is_main_process:
            remove_unfinished(folder.parent)
            place.mkdir(parents=True)
            write_identity(place, identity, accelerator.num_processes)
        accelerator.wait_for_everyone()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.save_state(str(place / DEEPSPEED_FOLDER))
        structures, tensors = {}, {}
        for name, part in parts.items():
            structures[name], own = split_state(part.state_dict(), name)
            tensors |= own
        if accelerator.is_main_process:
            (place / STATES_FILE).write_text(json.dumps(structures), encoding="utf-8")
        write_state(place / random_state_name(accelerator.process_index), random_state(accelerator.device))
        self._written = write_shards(
            place / TENSORS_FOLDER, tensors, self._group, partial(self._complete, place, folder)
        )

    def finish(self) -> None:
        """Wait until the last checkpoint is complete, and raise what prevented it."""
        written, self._written = self._written, None
        if written is not None:
            wait_for_shards(written)

    def wait(self) -> None:
        """The same where another error is on its way."""
        if self._written is not None:
            self._written.exception()

    def load(self, folder: str | Path, parts: Mapping[str, Any]) -> None:
        """Load what [`Checkpoints.save`] saved, in however many processes."""
        folder, accelerator = Path(folder), self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.load_state(str(folder / DEEPSPEED_FOLDER))
        structures, shapes, examples = _read_structures(folder), {}, {}
        for name, part in parts.items():
            shapes |= tensor_shapes(structures.get(name))
            examples |= {f"{name}/{key}": tensor for key, tensor in sharded_tensors(part).items()}
        # At once, as every reading begins with the headers of all files.
        tensors = read_shards(folder / TENSORS_FOLDER, shapes, examples, self._group)
        for name, part in parts.items():
            try:
                part.load_state_dict(join_state(structures[name], tensors))
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

    def _complete(self, place: Path, folder: Path) -> None:
        if folder.exists():
            _remove(folder)
        os.replace(place, folder)
        for old in checkpoint_folders(self.output_dir)[: -self.total_limit]:
            _remove(old)


def _read_structures(folder: Path) -> dict[str, Any]:
    path = folder / STATES_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is damaged: {path.name} cannot be read ({error})."
        ) from error


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
