# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of a training run: resuming, losses, progress, log and checkpoints."""

import math
import sys
from dataclasses import asdict
from typing import Any, cast

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .arguments import TrainingArguments
from .checkpoints import TrainingLog, checkpoint_step, find_checkpoint, save_checkpoint


class TrainingRun:
    """
    Counts optimizer steps and does what is due after each.

    Args:
        accelerator (`Accelerator`): Everything that a checkpoint must hold is prepared or registered with it before
            [`TrainingRun.resume`].
        args ([`TrainingArguments`]): The arguments.
        name (`str`): Name of the run for trackers.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments, name: str):
        self.accelerator = accelerator
        self.args = args
        self.checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        self.step = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self.log = TrainingLog(args.output_dir, self.step, accelerator.is_main_process)
        self._losses: list[torch.Tensor] = []
        if args.report_to is not None:
            # Trackers know no lists.
            values = {key: value for key, value in asdict(args).items() if isinstance(value, (str, int, float))}
            accelerator.init_trackers(name, config=values)
        self.progress = tqdm(
            total=args.max_train_steps,
            initial=self.step,
            disable=not accelerator.is_local_main_process,
            desc=name,
            # A log file gets a line now and then instead of ten a second.
            mininterval=0.1 if sys.stderr.isatty() else 30,
        )

    def resume(self) -> None:
        """Load the checkpoint, if there is one to resume from."""
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))

    def add_loss(self, loss: torch.Tensor) -> None:
        """Note the loss of one forward pass."""
        self._losses.append(loss.detach())

    def finish_step(self, learning_rate: float, **figures: float) -> None:
        """
        Count an optimizer step, and log and save what is due.

        Raises:
            `ValueError`: If the loss is not finite.
        """
        args = self.args
        self.step += 1
        mean_loss = cast(torch.Tensor, self.accelerator.reduce(torch.stack(self._losses).mean(), reduction="mean"))
        loss = mean_loss.item()
        self._losses.clear()
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} at step {self.step}. Checkpoints of earlier steps are left as they were; try a "
                f"`learning_rate` below {args.learning_rate}, more `lr_warmup_steps` or `mixed_precision` no."
            )
        self.progress.update()
        self.progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self.step % args.logging_steps == 0 or self.is_finished:
            self.write(loss=loss, learning_rate=learning_rate, **figures)
        if args.checkpointing_steps > 0 and self.step % args.checkpointing_steps == 0:
            save_checkpoint(self.accelerator, args.output_dir, self.step, args.checkpoints_total_limit)

    def write(self, **figures: Any) -> None:
        """Write figures to the log and to the trackers."""
        self.log.write(self.step, **figures)
        if self.args.report_to is not None:
            self.accelerator.log(figures, step=self.step)

    @property
    def begins_step(self) -> bool:
        """Whether the next forward pass is the first one of an optimizer step."""
        return len(self._losses) == 0

    @property
    def is_finished(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.args.max_train_steps

    @property
    def is_validation_due(self) -> bool:
        """Whether to validate after this step."""
        steps = self.args.validation_steps
        return self.is_finished or (steps > 0 and self.step % steps == 0)
