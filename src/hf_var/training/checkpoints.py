# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and a log that a resumed run continues."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator


PREFIX = "step-"


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """All whole checkpoints of a run, oldest first."""
    return sorted((Path(output_dir) / "checkpoints").glob(f"{PREFIX}*"))


def checkpoint_step(folder: str | Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(Path(folder).name.removeprefix(PREFIX))


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint that `--resume_from_checkpoint` means; `None` to start afresh, which is also what `latest` means
    where there is no checkpoint yet.

    Raises:
        `ValueError`:
            If there is no such checkpoint, or if a run is to start afresh in a folder with checkpoints of another one.
    """
    if resume_from_checkpoint is None:
        names = [path.name for path in checkpoint_folders(output_dir)]
        if names:
            raise ValueError(
                f"`output_dir` = {str(output_dir)!r} has the checkpoints {names} of another run, which a new one would "
                "replace. Go on with them by `resume_from_checkpoint` latest, or take another folder."
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
    return folder


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int) -> None:
    """
    Save everything that was prepared or registered with `accelerator`, and remove all but the newest checkpoints.

    A checkpoint is written under another name and renamed when it is complete, and renamed before it is removed: a run
    may be killed at any moment, and whatever is called a checkpoint is a whole one.
    """
    folder = Path(output_dir) / "checkpoints" / f"{PREFIX}{step:08d}"
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    if accelerator.is_main_process:
        for leftover in folder.parent.glob("unfinished-*"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if folder.exists():
            _remove(folder)
        os.replace(unfinished, folder)
        for old in checkpoint_folders(output_dir)[:-total_limit]:
            _remove(old)


def remove_later_checkpoints(output_dir: str | Path, step: int) -> None:
    """Remove the checkpoints after `step`, from which a run goes on: they belong to a course that it will not take."""
    for folder in checkpoint_folders(output_dir):
        if checkpoint_step(folder) > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    removed = folder.with_name(f"unfinished-removed-{folder.name}")
    os.replace(folder, removed)
    shutil.rmtree(removed)


class TrainingLog:
    """
    `train_log.jsonl` in the output folder: one line of JSON for each time something was logged.

    Args:
        output_dir (`str`): Folder of the run.
        first_step (`int`): Lines after this step are those of a run which was stopped, and are written again.
        is_active (`bool`): Whether this process writes.
    """

    def __init__(self, output_dir: str | Path, first_step: int, is_active: bool):
        self.path = Path(output_dir) / "train_log.jsonl"
        self.is_active = is_active
        if is_active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Whole lines alone: a run that was killed while writing leaves a part of one.
            lines = self.path.read_text().splitlines(keepends=True) if first_step > 0 and self.path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
            shortened = self.path.with_suffix(".unfinished")
            shortened.write_text("".join(kept))
            os.replace(shortened, self.path)

    def write(self, step: int, **values: Any) -> None:
        """Add a line."""
        if self.is_active:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def last(self, name: str) -> Any:
        """The newest value of a figure, `None` if there is none."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if f'"{name}"' in line]
        return lines[-1][name] if lines else None
