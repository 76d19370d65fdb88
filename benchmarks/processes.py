# SPDX-License-Identifier: Apache-2.0
"""
What a second process is worth in training: a step of a VARTransformer from codes, in one process and in two (DDP, gloo), each
with its own batch of the same size.

    python benchmarks/processes.py
    python benchmarks/processes.py --hidden_size 1024 --num_layers 4 --batch_size 2

Steps with and without the exchange of gradients take turns. `communication` is the share of a step that the exchange takes, as far
as the backward pass does not hide it; `efficiency` is the tokens per second and process against those of one process. Times are wall
times of one thread each, medians of `--rounds` steps, so they mean something only where as many cores are idle.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher

from hf_var import VARConfig, VARTransformer
from hf_var.training.optimization import OptimizerConfig, make_optimizer


def measure(folder: str, options: argparse.Namespace) -> None:
    """Seconds of steps, with and without the exchange, to a file of the first process."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    sizes = {"hidden_size": options.hidden_size, "num_hidden_layers": options.num_layers}
    config = VARConfig(num_labels=10, num_attention_heads=options.hidden_size // 64, **sizes)
    transformer = VARTransformer(config).train()
    transformer.set_attn_implementation("blockwise_sdpa")
    optimizer = make_optimizer(transformer, OptimizerConfig())
    model, optimizer = accelerator.prepare(transformer, optimizer)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    length = config.length - config.block_lengths[0]
    inputs = {
        "class_labels": torch.randint(10, (options.batch_size,), generator=generator),
        "scale_inputs": torch.randn(options.batch_size, length, config.latent_channels, generator=generator),
        "labels": torch.randint(config.codebook_size, (options.batch_size, config.length), generator=generator),
    }
    seconds: dict[str, list[float]] = {"exchanged": [], "alone": []}
    for number in range(options.rounds + 1):
        for name, times in seconds.items():
            accelerator.wait_for_everyone()
            begin = time.perf_counter()
            with accelerator.no_sync(model) if name == "alone" else nullcontext():
                accelerator.backward(model(**inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
            # The first steps allocate.
            if number > 0:
                times.append(time.perf_counter() - begin)
    if accelerator.is_main_process:
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found = {**medians, "tokens": options.batch_size * config.length, "weights": transformer.num_parameters()}
        Path(folder, f"{accelerator.num_processes}.json").write_text(json.dumps(found))
    accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4, help="images of a process")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        # Forks, which has to come before anything that starts threads.
        debug_launcher(measure, (folder, options), num_processes=2)
        measure(folder, options)
        found = {number: json.loads(Path(folder, f"{number}.json").read_text()) for number in (1, 2)}
    rates = {number: values["tokens"] / values["exchanged"] for number, values in found.items()}
    print(f"{found[1]['weights'] / 1e6:.1f} M parameters, {options.batch_size} images a process")
    print("| processes | step, s | without exchange, s | communication | tokens/s | efficiency |")
    print("|---|---|---|---|---|---|")
    for number, values in found.items():
        share = max(1 - values["alone"] / values["exchanged"], 0)
        print(
            f"| {number} | {values['exchanged']:.3f} | {values['alone']:.3f} | {share:.0%} | {number * rates[number]:.0f} | "
            f"{rates[number] / rates[1]:.0%} |"
        )


if __name__ == "__main__":
    main()
