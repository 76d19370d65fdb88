# SPDX-License-Identifier: Apache-2.0
"""
How fast a training script is, beside a loop that does nothing but train.

    python benchmarks/training_throughput.py train_vqvae examples/recipes/vqvae_cifar10.yaml \
        --train_data "cifar10/train-*.parquet" --validation_data "cifar10/test-*.parquet"
    python benchmarks/training_throughput.py train_var examples/recipes/var_cifar10.yaml

The bare loop has the same model, losses, precision, memory format and optimizer and takes its batches from memory, where
they lie ready as tensors; that of the tokenizer clips gradients and has the moving averages of the codes, that of the
transformer is nothing but forward, backward and optimizer step, on inputs that are ready. What it lacks is what the script
adds: reading, decoding and augmenting images or making inputs from codes, averaging the weights, counting codes, restarts,
logging, checkpoints. Both run in turns, `ROUNDS` times; the script's rate is the median over its log, without a tokenizer's
unquantized steps, whose work is another.
"""

import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_var.data import TrainingBatches
from hf_var.training.codebook import MovingAverageCodebook
from hf_var.training.losses import reconstruction_loss
from hf_var.training.optimization import make_optimizer
from hf_var.training.prior_inputs import prior_inputs
from hf_var.training.setup import load_splits


ROUNDS = 3
# Of each round.
STEPS = {"train_vqvae": 200, "train_var": 60}
# Kept in memory for the bare loop.
NUM_BATCHES = 64
EXAMPLES = Path(__file__).parents[1] / "examples"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenizer_loop(script, args) -> Callable[[], Iterator[None]]:
    config = script.make_config(args)
    source, _ = load_splits(args.data, args.run)
    rows = script.make_row_reader(args, config, source, augment=True)
    batches = TrainingBatches(source, rows, args.data, args.run.seed)
    memory_format = torch.channels_last if args.script.channels_last else torch.contiguous_format
    images = [
        batch["pixel_values"].contiguous(memory_format=memory_format)
        for _, batch in zip(range(NUM_BATCHES), batches, strict=False)
    ]

    def steps() -> Iterator[None]:
        torch.manual_seed(args.run.seed)
        vqvae = script.make_model(args, config)
        moving_average = MovingAverageCodebook(vqvae) if args.codebook.codebook_update == "ema" else None
        optimizer = make_optimizer(vqvae, args.optimizer)
        objective = args.reconstruction
        for pixel_values in itertools.cycle(images):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.run.mixed_precision == "bf16"):
                output = vqvae(pixel_values)
            loss = reconstruction_loss(output.sample, pixel_values, objective.l1_weight, objective.l2_weight)
            (loss + objective.quantizer_weight * output.loss).backward()
            torch.nn.utils.clip_grad_norm_(vqvae.parameters(), args.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if moving_average is not None:
                moving_average.observe(output.quantizer_inputs, output.codes)
                moving_average.finish_step()
            yield

    return steps


def transformer_loop(script, args) -> Callable[[], Iterator[None]]:
    models = script.load_models(args)
    images = script.load_data(args, models)
    config = script.make_config(args, models, images)
    batches = TrainingBatches(images.train.dataset, images.train.reader, args.data, args.run.seed)
    inputs = [
        prior_inputs(models.vqvae, batch, config.is_raster)
        for _, batch in zip(range(NUM_BATCHES), batches, strict=False)
    ]
    args.optimizer.learning_rate = args.optimizer.learning_rate_of(args.data.train_batch_size)

    def steps() -> Iterator[None]:
        transformer = script.make_transformer(args, config, None)
        optimizer = make_optimizer(transformer, args.optimizer)
        for batch in itertools.cycle(inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.run.mixed_precision == "bf16"):
                loss = transformer(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return steps


def bare_rate(steps: Iterator[None], number: int, images_per_step: int) -> float:
    times = []
    for _ in range(number):
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    return images_per_step / statistics.median(times)


def script_rate(script, number: int, arguments: list[str], more: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        short = ["--output_dir", folder, "--max_train_steps", str(number), "--logging_steps", "20"]
        short += ["--lr_warmup_steps", "10", "--validation_images", "32", "--report_to", "none"]
        script.main([*arguments, *short, *more])
        log = [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in log if "images_per_second" in line)


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name not in ("train_vqvae", "train_var"):
        raise SystemExit("The first argument is train_vqvae or train_var, then come the script's.")
    script = load_script(name)
    args = script.read_arguments(arguments)
    if name == "train_vqvae":
        loop, more = tokenizer_loop(script, args), ["--unquantized_steps", "0", "--kmeans_images", "0"]
    else:
        loop, more = transformer_loop(script, args), ["--num_samples", "0"]
    rates: dict[str, list[float]] = {"bare": [], "script": []}
    for _ in range(ROUNDS):
        rates["bare"].append(bare_rate(loop(), STEPS[name], args.data.train_batch_size))
        rates["script"].append(script_rate(script, STEPS[name], arguments, more))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name}: {medians[name]:.0f} images/s, of {', '.join(f'{value:.0f}' for value in values)}")
    print(f"script / bare: {medians['script'] / medians['bare']:.3f}")


if __name__ == "__main__":
    main()
