# SPDX-License-Identifier: Apache-2.0
"""A training run: its steps, losses, log, checkpoints and end."""

import math
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from ..precision import ONEDNN_MATMUL, fp32_precision, is_onednn_exact
from ..progress import progress_bar
from ..ranges import CheckedFields, NonNegativeInt, OneOf, PositiveInt, argument
from .checkpoints import (
    Checkpoints,
    checkpoint_folders,
    checkpoint_step,
    find_checkpoint,
    remove_later_checkpoints,
)
from .identity import RunIdentity
from .lock import locked_folder
from .log import CHANGES, TrainingLog
from .sharding import whole_tensor
from .state_files import without_process_warning
from .stopping import StopRequest


logger = logging.get_logger(__name__)

# What `matmul_precision` sets. GPUs have no bf16 products of fp32 factors.
MATMUL_PRECISIONS = {
    "ieee": {},
    "tf32": {"mkldnn.matmul": "tf32", "cuda.matmul": "tf32"},
    "bf16": {**ONEDNN_MATMUL, "cuda.matmul": "tf32"},
}
REMEDY = (
    "Checkpoints of earlier steps are left as they were; try a lower `learning_rate`, more `lr_warmup_steps` or "
    "`mixed_precision` no."
)


@dataclass(kw_only=True)
class RunConfig(CheckedFields):
    """Length and precision of a training run, and its outputs."""

    output_dir: str = argument(help="folder for the trained model, its log and its checkpoints")
    max_train_steps: PositiveInt = argument(10_000, help="optimizer steps")
    gradient_accumulation_steps: PositiveInt = argument(1, help="forward passes per optimizer step")
    mixed_precision: Annotated[str, OneOf("no", "fp16", "bf16")] = argument("no", help="no, fp16 or bf16")
    matmul_precision: Annotated[str, OneOf(*MATMUL_PRECISIONS)] = argument(
        "ieee", help="ieee, or tf32 or bf16: what factors of fp32 matrix products may be rounded to where it is faster"
    )
    gradient_checkpointing: bool = argument(False, help="compute activations twice instead of keeping them")
    torch_compile: bool = argument(False, help="compile the model with torch.compile")
    seed: NonNegativeInt = argument(0, help="fixes the initial weights, the data's order and all random numbers")
    checkpointing_steps: NonNegativeInt = argument(1000, help="0: no checkpoints")
    checkpoints_total_limit: PositiveInt = argument(2, help="older checkpoints are removed")
    resume_from_checkpoint: str | None = argument(
        None, help="latest, or a folder; latest starts afresh where there is no checkpoint yet"
    )
    validation_steps: NonNegativeInt = argument(0, help="validate this often; 0: at the end only")
    logging_steps: PositiveInt = argument(10, help="write the loss to train_log.jsonl this often")
    report_to: str = argument("tensorboard", help="a tracker of Accelerate, or none")


@dataclass(eq=False)
class TrainingRun:
    """
    Counts optimizer steps and handles logging, checkpoints and stopping.

    ```python
    run = TrainingRun(config, accelerator, "train", batch_size, identity)
    with run.started({"model": model, "optimization": optimization, "batches": batches}):
        for batch in run.until_the_end(batches):
            ...
            run.add(loss)
            if accelerator.sync_gradients:
                run.finish_step(learning_rate)
                run.save_if_due()
    ```

    Metrics stay on their device until they are logged, saved or checked, so that other steps need not wait for it. After
    SIGTERM a run writes a checkpoint after the step it is at, with several processes after that of the one that is furthest
    behind, and exits.
    """

    config: RunConfig
    accelerator: Accelerator
    name: str
    batch_size: int
    identity: RunIdentity
    tokens_per_image: int | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        self.step = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self._changes = {} if self.checkpoint is None else self.identity.check(self.checkpoint)
        self.log = TrainingLog(config.output_dir)
        self._parts: dict[str, Any] = {}
        self._metrics: list[dict[str, torch.Tensor]] = []
        self._unchecked_losses: list[torch.Tensor] = []
        self._shown: dict[str, str] = {}
        self._stop = StopRequest(self.accelerator.num_processes)
        self._clock, self._clock_step = 0.0, self.step

    @contextmanager
    def started(self, parts: Mapping[str, Any], arguments: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Load a checkpoint's `parts`, log, and handle SIGTERM in the block; `arguments` are for trackers."""
        self._parts = dict(parts)
        if self.accelerator.scaler is not None:
            self._parts["loss_scale"] = self.accelerator.scaler
        with ExitStack() as stack:
            stack.enter_context(fp32_precision(self._matmul_switches()))
            stack.enter_context(self._stop.listening())
            with self.writing():
                stack.enter_context(locked_folder(self.accelerator, self.config.output_dir))
            stack.enter_context(without_process_warning())
            config = self.config
            self._checkpoints = Checkpoints(self.accelerator, config.output_dir, config.checkpoints_total_limit)
            stack.callback(self._checkpoints.wait)
            if self.checkpoint is not None:
                self._checkpoints.load(self.checkpoint, self._parts)
            with self.writing():
                if self.checkpoint is not None and self.accelerator.is_main_process:
                    remove_later_checkpoints(self.config.output_dir, self.step)
                self.log.continue_after(self.step)
                self._start_trackers(arguments or {})
                self._report_changes()
            is_shown, steps = self.accelerator.is_local_main_process, self.config.max_train_steps
            progress = progress_bar(is_shown=is_shown, desc=self.name, total=steps, initial=self.step)
            self.progress = stack.enter_context(progress)
            self.restart_clock()
            yield
            with self.writing():
                self._checkpoints.finish()
            self.accelerator.end_training()

    def until_the_end(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The endless `batches` of this process, up to the last step."""
        stream = iter(batches)
        while not self.is_finished:
            yield next(stream)

    def add(self, loss: torch.Tensor, **metrics: torch.Tensor) -> None:
        """Add the loss, and other metrics, of one forward pass."""
        self._metrics.append({name: value.detach() for name, value in {"loss": loss, **metrics}.items()})

    def finish_step(
        self, learning_rate: float, gradient_norm: torch.Tensor | float | None = None, **counts: int
    ) -> None:
        """Count an optimizer step, and log it if this is due; `counts` are added up over all processes."""
        self.step += 1
        names = list(self._metrics[0])
        step_metrics = torch.stack(
            [torch.stack([metrics[name].float() for name in names]) for metrics in self._metrics]
        ).mean(dim=0)  # (metrics,)
        self._metrics.clear()
        # NaN if any metric is not finite, such as the loss of a discriminator.
        self._unchecked_losses.append(step_metrics[0] + 0.0 * step_metrics.sum())
        self.progress.update()
        self._stop.agree()
        if self.is_logged(self.step):
            self.check_losses()
            means = cast(torch.Tensor, self.accelerator.reduce(step_metrics, reduction="mean")).tolist()
            metrics = dict(zip(names, means, strict=True)) | {"learning_rate": learning_rate}
            norm = math.nan if gradient_norm is None else float(gradient_norm)
            # Not finite if fp16 overflowed and the step was skipped.
            if math.isfinite(norm):
                metrics["gradient_norm"] = norm
            for name, count in counts.items():
                total = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), reduction="sum")
                metrics[name] = int(cast(torch.Tensor, total))
            speed = self._speed()
            self.write(metrics | speed)
            shown = {name.replace("_per_second", "/s"): f"{value:.0f}" for name, value in speed.items()}
            self.show(loss=f"{means[0]:.4f}", **shown)
            self.restart_clock()

    def save_if_due(self) -> None:
        """Write a checkpoint if this is due or the run was asked to stop; in that case exit as by SIGTERM."""
        config = self.config
        is_due = config.checkpointing_steps > 0 and self.step % config.checkpointing_steps == 0
        if is_due or self._stop.is_agreed:
            self.check_losses()
            # A step may make weights non-finite although its loss was finite.
            self.check_weights()
            with self.writing():
                self._checkpoints.save(self.step, self._parts, self.identity)
                if self._stop.is_agreed:
                    self._checkpoints.finish()
            self.restart_clock()
        if self._stop.is_agreed and not self.is_finished:
            self.accelerator.end_training()
            logger.warning(f"Stopped by SIGTERM after step {self.step}, with a checkpoint to resume from.")
            sys.exit(128 + signal.SIGTERM)

    def _matmul_switches(self) -> Mapping[str, str]:
        """What is set for the products of fp32 matrices: oneDNN, too, where it rounds nothing and is faster."""
        if self.config.matmul_precision == "ieee" and self.accelerator.device.type == "cpu" and is_onednn_exact():
            return ONEDNN_MATMUL
        return MATMUL_PRECISIONS[self.config.matmul_precision]

    def check_losses(self) -> None:
        """Raise a `ValueError` if a loss since the last check was not finite, in any process."""
        if not self._unchecked_losses:
            return
        losses = cast(torch.Tensor, self.accelerator.reduce(torch.stack(self._unchecked_losses), reduction="mean"))
        first_step = self.step - len(losses) + 1
        self._unchecked_losses.clear()
        for step, loss in enumerate(losses.tolist(), start=first_step):
            if not math.isfinite(loss):
                raise ValueError(f"The loss is {loss} at step {step}. {REMEDY}")

    def check_weights(self) -> None:
        """Raise a `ValueError` if a weight of a model is not finite, in any process."""
        models = [part for part in self._parts.values() if isinstance(part, nn.Module)]
        parameters = [parameter.detach() for model in models for parameter in model.parameters()]
        flaws = [whole_tensor((~parameter.isfinite()).any()) for parameter in parameters]
        number = cast(torch.Tensor, self.accelerator.reduce(torch.stack(flaws).sum(), reduction="sum"))
        if int(number) > 0:
            raise ValueError(f"After step {self.step} weights are not finite. {REMEDY}")

    def write(self, metrics: Mapping[str, Any], prefix: str = "") -> None:
        """Write metrics to the log and to the trackers, with `prefix` before their names."""
        with self.writing():
            self.accelerator.log({f"{prefix}{name}": value for name, value in metrics.items()}, step=self.step)

    def write_validation(self, metrics: Mapping[str, Any], images: Mapping[str, Image.Image | Figure]) -> None:
        """Write what a validation measured and its pictures. Its time is not that of the training."""
        self.write(metrics, prefix="validation_")
        for name, image in images.items():
            self.write_image(name, image)
        self.restart_clock()

    def write_image(self, name: str, image: Image.Image | Figure) -> None:
        """Save `name`.png in the output folder and, with the step, in `pictures/`, and show it to the trackers."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.config.output_dir)
        path = folder / "pictures" / f"{name}-{self.step:08d}.png"
        with self.writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image, Figure):
                image.savefig(path)
            else:
                image.save(path)
            shutil.copyfile(path, folder / f"{name}.png")
        pixels = Image.open(path).convert("RGB")
        for tracker in cast(list[Any], self.accelerator.trackers):
            # The two trackers need different formats.
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(pixels)[None]}, self.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [pixels]}, self.step)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn errors of writing into an `OSError` with the path, the reason and the complete checkpoints."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            path = getattr(error, "filename", None) or self.config.output_dir
            reason = getattr(error, "strerror", None) or str(error)
            names = [folder.name for folder in checkpoint_folders(self.config.output_dir)]
            safe = "No checkpoint was written before"
            if names:
                safe = (
                    f"The checkpoints {', '.join(names)} are complete: continue with `resume_from_checkpoint` latest"
                )
            raise OSError(f"{path} cannot be written: {reason}. {safe}.") from error

    def show(self, **metrics: str) -> None:
        """Show metrics beside the progress bar, with those that it shows already."""
        if not self.progress.disable:
            self._shown |= metrics
            self.progress.set_postfix(self._shown, refresh=False)

    def restart_clock(self) -> None:
        """Exclude the time until now from the images per second."""
        self._clock, self._clock_step = time.perf_counter(), self.step

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step, of all processes."""
        return self.batch_size * self.config.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def position(self) -> int:
        """Global number of the next forward pass, the same however the passes of a step are split over processes."""
        passes = self.step * self.config.gradient_accumulation_steps + len(self._metrics)
        return passes * self.accelerator.num_processes + self.accelerator.process_index

    @property
    def begins_step(self) -> bool:
        """Whether the next forward pass is the first one of an optimizer step."""
        return len(self._metrics) == 0

    @property
    def is_finished(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.config.max_train_steps

    def is_due(self, every: int) -> bool:
        """Whether to do after this step what is done every `every` steps, 0 for never, and at the end."""
        return self.is_finished or (every > 0 and self.step % every == 0)

    def is_logged(self, step: int) -> bool:
        """Whether metrics are written after optimizer step number `step`."""
        return step % self.config.logging_steps == 0 or step >= self.config.max_train_steps

    def _speed(self) -> dict[str, float]:
        """Images and tokens per second since the last time; nothing if validation or a checkpoint came in between."""
        seconds, steps = time.perf_counter() - self._clock, self.step - self._clock_step
        if steps == 0:
            return {}
        speed = {"images_per_second": steps * self.images_per_step / seconds}
        if self.tokens_per_image is not None:
            speed["tokens_per_second"] = speed["images_per_second"] * self.tokens_per_image
        return speed

    def _report_changes(self) -> None:
        """Report arguments that differ from those of the checkpoint."""
        if self._changes and self.accelerator.is_main_process:
            changes = [f"`{name}` {now!r}, was {before!r}" for name, (before, now) in self._changes.items()]
            logger.warning(f"Resumed after step {self.step} with other arguments: {'; '.join(changes)}.")
            self.log.log({CHANGES: self._changes}, step=self.step)

    def _start_trackers(self, arguments: Mapping[str, Any]) -> None:
        self.accelerator.log_with = [self.log, *self.accelerator.log_with]
        # Trackers do not accept lists. A resumed run logs again what was logged after the last checkpoint.
        values = {name: value for name, value in arguments.items() if isinstance(value, (str, int, float))}
        options = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers(self.name, config=values, init_kwargs=options)
