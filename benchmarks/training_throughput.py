# SPDX-License-Identifier: Apache-2.0
"""
How fast the tokenizer's training script is, beside a loop that does nothing but train.

    python benchmarks/training_throughput.py examples/recipes/vqvae_cifar10.yaml \
        --train_data "cifar10/train-*.parquet" --validation_data "cifar10/test-*.parquet"

The bare loop has the same model, losses, precision, memory format, optimizer and moving averages of the codes, and takes
its batches from memory, where they lie ready as tensors. What it lacks is what the script adds: reading, decoding and
augmenting images, averaging the weights, counting codes, restarts, logging, checkpoints. Both run in turns, `ROUNDS` times;
the script's rate is the median over its log, without the unquantized steps, whose work is another.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.training import data
from hf_var.training.arguments import given_config_fields, parse_arguments, with_config_fields
from hf_var.training.codebook import MovingAverageCodebook
from hf_var.training.losses import reconstruction_loss
from hf_var.training.optimization import make_optimizer


ROUNDS = 3
STEPS = 200
SCRIPT = Path(__file__).parents[1] / "examples/train_vqvae.py"


def load_script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare_rate(args, config: VQVAEConfig, images: list[torch.Tensor]) -> float:
    torch.manual_seed(args.seed)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    vqvae = VQVAEModel(config).train().to(memory_format=memory_format)
    vqvae.quantizer.codebook.requires_grad_(args.codebook_update == "gradient")
    moving_average = MovingAverageCodebook(vqvae, args.codebook_decay) if args.codebook_update == "ema" else None
    optimizer = make_optimizer(vqvae, args)
    images = [batch.contiguous(memory_format=memory_format) for batch in images]
    times = []
    for step in range(STEPS):
        start = time.perf_counter()
        pixel_values = images[step % len(images)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            output = vqvae(pixel_values)
        loss = reconstruction_loss(output.sample, pixel_values, args.l1_weight, args.l2_weight)
        (loss + args.quantizer_weight * output.loss).backward()
        torch.nn.utils.clip_grad_norm_(vqvae.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if moving_average is not None:
            moving_average.observe(output.features, output.codes)
            moving_average.finish_step()
        times.append(time.perf_counter() - start)
    return args.train_batch_size / statistics.median(times)


def script_rate(script, arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        more = ["--output_dir", folder, "--max_train_steps", str(STEPS), "--logging_steps", "20"]
        more += ["--unquantized_steps", "0", "--lr_warmup_steps", "10", "--validation_images", "32"]
        script.main([*arguments, *more])
        log = [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in log if "images_per_second" in line)


def main() -> None:
    script = load_script()
    arguments = sys.argv[1:]
    args = parse_arguments(with_config_fields(script.VQVAETrainingArguments, VQVAEConfig), arguments)
    config = VQVAEConfig(**given_config_fields(args, VQVAEConfig))
    source = data.load_source("train_data", args.train_data, args.train_split, ["train"], args.streaming)
    batches = data.TrainingBatches(source, script.make_row_reader(args, config, source, augment=True), args)
    images = [batch["pixel_values"] for _, batch in zip(range(64), batches, strict=False)]
    rates: dict[str, list[float]] = {"bare": [], "script": []}
    for _ in range(ROUNDS):
        rates["bare"].append(bare_rate(args, config, images))
        rates["script"].append(script_rate(script, arguments))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name}: {medians[name]:.0f} images/s, of {', '.join(f'{value:.0f}' for value in values)}")
    print(f"script / bare: {medians['script'] / medians['bare']:.3f}")


if __name__ == "__main__":
    main()
