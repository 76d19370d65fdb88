# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of a training run: resuming, losses, progress, log and checkpoints."""

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm
from transformers.utils import logging

from ..precision import ONEDNN_MATMUL, fp32_precision
from .arguments import TrainingArguments
from .checkpoints import TrainingLog, checkpoint_step, find_checkpoint, remove_later_checkpoints, save_checkpoint
from .sharding import whole_tensor


logger = logging.get_logger(__name__)

# What `matmul_precision` sets. GPUs have no bf16 products of fp32 factors.
MATMUL_PRECISIONS = {
    "ieee": {},
    "tf32": {"mkldnn.matmul": "tf32", "cuda.matmul": "tf32"},
    "bf16": {**ONEDNN_MATMUL, "cuda.matmul": "tf32"},
}


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """
    The `Accelerator` that `args` describe.

    Raises:
        `ValueError`: If it is configured for DeepSpeed's ZeRO stage 3, or for another accumulation of gradients.
    """
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    # Compiled as a whole, a sharded model could not be called as it is, to validate and to draw.
    compilation = TorchDynamoPlugin(backend=cast(Any, "inductor"), use_regional_compilation=is_sharded)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        dynamo_plugin=compilation if args.torch_compile else None,
    )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` is {args.gradient_accumulation_steps}, but Accelerate's configuration says "
            f"{accelerator.gradient_accumulation_steps}: leave it out there."
        )
    keep_full_precision(getattr(accelerator.state, "fsdp_plugin", None), args.mixed_precision)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        if plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed's `zero_stage` must be 1 or 2, got 3. To split the weights as well, use FSDP2."
            )
        # Accelerate would take them from a data loader, and clip at 1.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
    return accelerator


def keep_full_precision(plugin: Any, mixed_precision: str) -> None:
    """
    Let a model that FSDP2 splits return fp32 and add up its gradients in it, as autocast does. Accelerate would have both
    in half precision, in which losses and averages over processes are too coarse.

    Args:
        plugin (`FullyShardedDataParallelPlugin`, *optional*): Changed in place.
        mixed_precision (`str`): no, fp16 or bf16.
    """
    if plugin is not None and plugin.fsdp_version == 2 and mixed_precision != "no":
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(half, torch.float32, torch.float32)


class TrainingRun:
    """
    Counts optimizer steps and does what is due after each.

    Figures are kept on their device and read when they are logged, saved or judged, so that other steps need not wait
    for it.

    A machine that is taken away sends SIGTERM first: the run then writes a checkpoint after the step it is at, with
    several processes after that of the one that is furthest behind, and exits.

    Args:
        accelerator (`Accelerator`): Everything that a checkpoint must hold is prepared or registered with it before
            [`TrainingRun.resume`].
        args ([`TrainingArguments`]): The arguments.
        name (`str`): Name of the run for trackers.
        tokens_per_image (`int`, *optional*): To log tokens per second beside images.
    """

    def __init__(
        self, accelerator: Accelerator, args: TrainingArguments, name: str, tokens_per_image: int | None = None
    ):
        self.accelerator = accelerator
        self.args = args
        self.tokens_per_image = tokens_per_image
        self.checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        self.step = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self.log = TrainingLog(args.output_dir, self.step, accelerator.is_main_process)
        self._figures: list[dict[str, torch.Tensor]] = []
        self._unchecked_losses: list[torch.Tensor] = []
        self._shown: dict[str, str] = {}
        self._stop_asked = self._stop_agreed = False
        # Until the end of the run.
        self._settings = ExitStack()
        self._settings.enter_context(fp32_precision(MATMUL_PRECISIONS[args.matmul_precision]))
        self._handler: Any = None
        # To agree on it every step: through the CPUs, so that nothing waits for a device.
        self._stop_group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        # Only a program's main thread may ask for signals.
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._ask_to_stop)
        self._clock, self._clock_step = time.perf_counter(), self.step
        if accelerator.log_with:
            # Trackers know no lists. What a stopped run logged after its last checkpoint is logged again.
            values = {key: value for key, value in asdict(args).items() if isinstance(value, (str, int, float))}
            options = {"tensorboard": {"purge_step": self.step + 1}}
            accelerator.init_trackers(name, config=values, init_kwargs=options)
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
            if self.accelerator.is_main_process:
                remove_later_checkpoints(self.args.output_dir, self.step)

    def add(self, loss: torch.Tensor, **figures: torch.Tensor) -> None:
        """Note the loss, and other figures, of one forward pass."""
        self._figures.append({name: value.detach() for name, value in {"loss": loss, **figures}.items()})

    def finish_step(
        self, learning_rate: float, gradient_norm: torch.Tensor | float | None = None, **counts: int
    ) -> None:
        """
        Count an optimizer step, and log it if it is time to.

        Args:
            learning_rate (`float`): That of the next step.
            gradient_norm (`torch.Tensor` or `float`, *optional*): Norm of all gradients, before they were clipped.
            counts (`int`): Numbers of this process, which are added up over all.

        Raises:
            `ValueError`: If a loss since the last time was not finite.
        """
        self.step += 1
        names = list(self._figures[0])
        step_figures = torch.stack(
            [torch.stack([figures[name].float() for name in names]) for figures in self._figures]
        ).mean(dim=0)  # (figures,)
        self._figures.clear()
        # Not a number if any figure is not finite, such as the loss of a discriminator.
        self._unchecked_losses.append(step_figures[0] + 0.0 * step_figures.sum())
        self.progress.update()
        self._agree_to_stop()
        if self.is_logged(self.step):
            self.check_losses()
            means = cast(torch.Tensor, self.accelerator.reduce(step_figures, reduction="mean")).tolist()
            # Validation and checkpoints restart the clock.
            seconds, steps = time.perf_counter() - self._clock, self.step - self._clock_step
            figures = dict(zip(names, means, strict=True)) | {"learning_rate": learning_rate}
            norm = math.nan if gradient_norm is None else float(gradient_norm)
            # Not finite where fp16 overflowed and the step was left out.
            if math.isfinite(norm):
                figures["gradient_norm"] = norm
            for name, count in counts.items():
                total = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), reduction="sum")
                figures[name] = int(cast(torch.Tensor, total))
            shown = {"loss": f"{means[0]:.4f}"}
            if steps > 0:
                figures["images_per_second"] = steps * self.images_per_step / seconds
                shown["images/s"] = f"{figures['images_per_second']:.0f}"
                if self.tokens_per_image is not None:
                    figures["tokens_per_second"] = figures["images_per_second"] * self.tokens_per_image
                    shown["tokens/s"] = f"{figures['tokens_per_second']:.0f}"
            self.write(figures)
            self.show(**shown)
            self.restart_clock()

    def save_if_due(self, *models: nn.Module) -> None:
        """
        Write a checkpoint if it is time to, or if the run is to stop, which it then does.

        Args:
            models (`nn.Module`): What is trained; a step may spoil weights whose loss was still good.

        Raises:
            `ValueError`: If a loss since the last time, or a weight, is not finite.
            `SystemExit`: If the run was asked to stop, with the status of a process that SIGTERM ended.
        """
        is_due = self.args.checkpointing_steps > 0 and self.step % self.args.checkpointing_steps == 0
        if is_due or self._stop_agreed:
            self.check_losses()
            self.check_weights(*models)
            save_checkpoint(self.accelerator, self.args.output_dir, self.step, self.args.checkpoints_total_limit)
            self.restart_clock()
        if self._stop_agreed and not self.is_finished:
            self.end()
            logger.warning(f"Stopped by SIGTERM after step {self.step}, with a checkpoint to resume from.")
            sys.exit(128 + signal.SIGTERM)

    def is_logged(self, step: int) -> bool:
        """Whether figures are written after optimizer step number `step`."""
        return step % self.args.logging_steps == 0 or step >= self.args.max_train_steps

    def end(self) -> None:
        """What every process does last."""
        self.progress.close()
        self._settings.close()
        self._restore_handler()
        self.accelerator.end_training()

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop_asked = True
        # Who asks again does not want to wait for the step.
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _agree_to_stop(self) -> None:
        # All processes or none write a checkpoint.
        asked = torch.tensor(int(self._stop_asked))
        if self._stop_group is not None:
            torch.distributed.all_reduce(asked, group=self._stop_group)
        self._stop_agreed = int(asked) > 0

    def check_losses(self) -> None:
        """Raise a `ValueError` if a loss since the last check was not finite, in any process."""
        if not self._unchecked_losses:
            return
        losses = cast(torch.Tensor, self.accelerator.reduce(torch.stack(self._unchecked_losses), reduction="mean"))
        first_step = self.step - len(losses) + 1
        self._unchecked_losses.clear()
        for step, loss in enumerate(losses.tolist(), start=first_step):
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss is {loss} at step {step}. Checkpoints of earlier steps are left as they were; try a "
                    f"`learning_rate` below {self.args.learning_rate}, more `lr_warmup_steps` or `mixed_precision` no."
                )

    def check_weights(self, *models: nn.Module) -> None:
        """Raise a `ValueError` if a weight of `models` is not finite, in any process."""
        parameters = [parameter.detach() for model in models for parameter in model.parameters()]
        flaws = [whole_tensor((~parameter.isfinite()).any()) for parameter in parameters]
        number = cast(torch.Tensor, self.accelerator.reduce(torch.stack(flaws).sum(), reduction="sum"))
        if int(number) > 0:
            raise ValueError(
                f"After step {self.step} weights are not finite. Checkpoints of earlier steps are left as they were; try "
                f"a `learning_rate` below {self.args.learning_rate}, more `lr_warmup_steps` or `mixed_precision` no."
            )

    def write(self, figures: Mapping[str, Any]) -> None:
        """Write figures to the log and to the trackers."""
        self.log.write(self.step, **figures)
        if self.accelerator.log_with:
            self.accelerator.log(dict(figures), step=self.step)

    def write_picture(self, name: str, picture: Image.Image | Figure) -> None:
        """
        Save `name`.png in the output folder and, with the step, in its `pictures/`, and show it to the trackers. Only the
        main process does.
        """
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{self.step:08d}.png"
        if isinstance(picture, Figure):
            picture.savefig(path)
        else:
            picture.save(path)
        shutil.copyfile(path, folder.parent / f"{name}.png")
        image = Image.open(path).convert("RGB")
        for tracker in self.accelerator.trackers:
            # The two that take pictures take them in different forms.
            if tracker.name == "tensorboard":
                cast(Any, tracker).log_images({name: np.asarray(image)[None]}, self.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                cast(Any, tracker).log_images({name: [image]}, self.step)

    def show(self, **figures: str) -> None:
        """Show figures beside the progress bar, with those that it shows already."""
        if not self.progress.disable:
            self._shown |= figures
            self.progress.set_postfix(self._shown, refresh=False)

    def restart_clock(self) -> None:
        """Leave the time until now out of the images per second."""
        self._clock, self._clock_step = time.perf_counter(), self.step

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step, of all processes."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def position(self) -> int:
        """Global number of the next forward pass, the same however the passes of a step are split over processes."""
        passes = self.step * self.args.gradient_accumulation_steps + len(self._figures)
        return passes * self.accelerator.num_processes + self.accelerator.process_index

    @property
    def begins_step(self) -> bool:
        """Whether the next forward pass is the first one of an optimizer step."""
        return len(self._figures) == 0

    @property
    def is_finished(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.args.max_train_steps

    def is_due(self, every: int) -> bool:
        """Whether to do after this step what is done every so many steps, 0 for never, and at the end."""
        return self.is_finished or (every > 0 and self.step % every == 0)
