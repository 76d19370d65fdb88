# SPDX-License-Identifier: Apache-2.0
"""The `Accelerator` of a training run."""

import os
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from .run import RunConfig


def make_accelerator(config: RunConfig, batch_size: int, max_grad_norm: float) -> Accelerator:
    """The `Accelerator` of a run. DeepSpeed needs its batch size and the norm at which it clips gradients."""
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    # What `accelerate launch` was told.
    steps = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", config.gradient_accumulation_steps))
    if steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` is {config.gradient_accumulation_steps}, but Accelerate's configuration says "
            f"{steps}: leave it out there."
        )
    # Batches come from loaders of ours. Accelerate would end an accumulation with any loader of its own that this process
    # has not read to the end, whichever training it was for.
    accumulation = GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False)
    # If it were compiled as a whole, a sharded model could not be called directly for validation and sampling.
    compilation = TorchDynamoPlugin(backend=cast(Any, "inductor"), use_regional_compilation=is_sharded)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=accumulation,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        dynamo_plugin=compilation if config.torch_compile else None,
    )
    keep_full_precision(getattr(accelerator.state, "fsdp_plugin", None), config.mixed_precision)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        if plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed's `zero_stage` must be 1 or 2, got 3. To split the weights as well, use FSDP2."
            )
        # Accelerate would take them from a data loader, and clip at 1.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
        plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
    return accelerator


def keep_full_precision(plugin: Any, mixed_precision: str) -> None:
    """
    Let a model that FSDP2 splits return fp32 and add up its gradients in it, as autocast does. Accelerate would have both
    in half precision, in which losses and averages over processes are too coarse.
    """
    if plugin is not None and plugin.fsdp_version == 2 and mixed_precision != "no":
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(half, torch.float32, torch.float32)
