# SPDX-License-Identifier: Apache-2.0
"""A training by train_var.py with FSDP2, stopped and resumed, as `accelerate launch` starts it."""

import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from speed.clock import progress
from speed.models import make_vqvae, transformer_fields, vqvae_fields

from hf_var.data.codes import codes_schema
from hf_var.training.checkpoints import checkpoint_step

from .jobs import Emit, Settings
from .processes import read_records


EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_IMAGES, NUM_LABELS = 256, 10
# Steps whose time is left out: the first ones choose kernels and allocate.
NUM_SLOW_STEPS = 2


def train_sharded(settings: Settings, emit: Emit, model: str) -> None:
    """
    A short training with a checkpoint in its middle, and the same again from there. The losses of the second must be those
    of the first, up to what a GPU adds up in another order.
    """
    model, batch_size = ("tiny", 4) if settings.tiny else (model, 64)
    steps = 4 if settings.tiny else 10
    folder = settings.scratch / "fsdp2"
    output = folder / "output"
    arguments = [*make_inputs(folder, model), "--output_dir", str(output), "--train_batch_size", str(batch_size)]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        arguments += [f"--{name}", str(transformer_fields(model)[name])]
    arguments += [
        "--max_train_steps",
        str(steps),
        "--checkpointing_steps",
        str(steps // 2 + 1),
        "--logging_steps",
        "1",
    ]
    arguments += ["--mixed_precision", "bf16", "--lr_warmup_steps", "0", "--ema_decay", "0"]
    arguments += ["--num_samples", "0", "--report_to", "none"]
    # Without it Accelerate takes a GPU where there is one.
    environment = {"ACCELERATE_USE_CPU": "true"} if settings.device.type == "cpu" else {}
    run = partial(launch, output=output, batch_size=batch_size, environment=environment)
    first = run("from the beginning", arguments)
    emit(first)
    (checkpoint,) = (output / "checkpoints").iterdir()
    begin = checkpoint_step(checkpoint)
    resumed = run("resumed", [*arguments, "--resume_from_checkpoint", str(checkpoint)], begin=begin)
    expected, found = first["losses"][begin:], resumed["losses"]
    if len(found) != len(expected):
        raise RuntimeError(f"The resumed training has {len(found)} steps, not {len(expected)}.")
    changes = [abs(loss / other - 1) for loss, other in zip(found, expected, strict=True)]
    emit(resumed | {"loss_error": max(changes)})


def make_inputs(folder: Path, model: str) -> list[str]:
    """Arguments that name a tokenizer and codes that look like its own."""
    folder.mkdir(parents=True)
    vqvae = make_vqvae(vqvae_fields(model))
    vqvae.save_pretrained(folder / "vqvae")
    schema = codes_schema(vqvae, {"label": datasets.ClassLabel(num_classes=NUM_LABELS)})
    shape = NUM_IMAGES, sum(vqvae.config.scale_lengths)
    codes = torch.randint(vqvae.config.codebook_size, shape, generator=torch.Generator().manual_seed(0))
    columns = {"codes": codes.tolist(), "label": [index % NUM_LABELS for index in range(NUM_IMAGES)]}
    path = folder / "codes.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict(columns, schema=schema), path)
    return ["--train_data", str(path), "--vqvae", str(folder / "vqvae")]


def launch(
    name: str, arguments: list[str], output: Path, batch_size: int, environment: dict[str, str], begin: int = 0
) -> dict[str, Any]:
    """Train in one process that holds all parts of the model, and read the log of the steps after step `begin`."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXAMPLES / "accelerate_configs/fsdp2.yaml"), "--num_processes", "1"]
    # A port that is free.
    command += ["--main_process_port", "0", str(EXAMPLES / "train_var.py"), *arguments]
    progress(" ".join(command))
    start = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | environment)
    seconds = time.monotonic() - start
    lines = [line for line in read_records(output / "train_log.jsonl") if "loss" in line and line["step"] > begin]
    rates = [line for line in lines if "images_per_second" in line]
    rates = rates[NUM_SLOW_STEPS:] or rates
    return {
        "run": name,
        "steps": len(lines),
        "step_ms": 1e3 * batch_size / statistics.median(line["images_per_second"] for line in rates),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in rates),
        "seconds": seconds,
        "losses": [line["loss"] for line in lines],
    }
