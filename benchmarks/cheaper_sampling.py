# SPDX-License-Identifier: Apache-2.0
"""
Time and quality of the options that compute less of an image: guidance at the first scales alone, a smaller model for the last
scales, pruned tokens, fewer keys and values.

    python benchmarks/cheaper_sampling.py digits --refiner outputs/var_small
    python benchmarks/cheaper_sampling.py cifar10 --model outputs/var_cifar10 --refiner outputs/var_small \
        --train_data "cifar10/train-*.parquet" --test_data "cifar10/test-*.parquet" --classifier classifier.safetensors
    python benchmarks/cheaper_sampling.py d16          # random weights of a published size: time alone

`ms` is the processor time of an image in milliseconds on one thread: the median of `--rounds` calls, all options in turns; of a
published size for a single image in bf16, otherwise in batches of 64. `share` is the median of the ratios to the call as it is in
the same round. The quality is that of `--num_samples` samples by the judges of racing/judges.py: the share that is
recognised as its class, the Frechet distance, precision and recall. The digits are sampled with the checkpoint's own settings, the
images of CIFAR-10 with guidance 2.5 from all codes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from racing.evaluation import measure
from racing.judges import Images, make_judge
from speed.models import DEPTHS, make_transformer, make_vqvae, transformer_fields, vqvae_fields

from hf_var import DIGITS_CHECKPOINT, CacheBudget, TokenPruning, VARPipeline, VARTransformer
from hf_var.pipelines.sampling import guidance_weight


BATCH = 64
METRICS = ("recognised", "frechet", "precision", "recall")
ALL_CODES = {"guidance_scale": 2.5, "top_k": 0, "top_p": 1.0}


def first_scales(scale: float, number: int) -> Callable[[int, int], float]:
    """The weights of `guidance_scale` at the first `number` scales, and 1, which is none, at the others."""
    return lambda k, num_scales: guidance_weight(scale, k, num_scales) if k < number else 1.0


def make_options(pipe: VARPipeline, scale: float, refiner: VARTransformer | None) -> dict[str, dict[str, Any]]:
    """Arguments of a call, by what they do."""
    config = pipe.transformer.config
    num_scales, length = len(config.patch_nums), config.length
    options: dict[str, dict[str, Any]] = {"as it is": {}}
    for number in (1, 2, 3):
        rule = first_scales(scale, num_scales - number)
        options[f"last {number} scales not guided"] = {"guidance_scale": rule}
    options["not guided"] = {"guidance_scale": 1.0}
    for shares in ([0.75], [0.5], [0.6, 0.4], [0.25, 0.25]):
        options[f"pruning to {' '.join(map(str, shares))}"] = {"layer_hooks": [TokenPruning(shares)]}
    half = config.num_hidden_layers // 2
    options[f"pruning to 0.6 0.4 from layer {half} on"] = {"layer_hooks": [TokenPruning([0.6, 0.4], half)]}
    for share in (2, 4, 8):
        budget = max(1, length // share)
        options[f"budget of {budget} keys of {length}"] = {"layer_hooks": [CacheBudget(budget)]}
    if refiner is not None:
        for number in (1, 2):
            start = num_scales - number
            options[f"refiner, last {number} scales"] = {"refiner": refiner, "refiner_start": start}
    rule = first_scales(scale, num_scales - 1)
    options["last scale not guided, pruning to 0.5"] = {"guidance_scale": rule, "layer_hooks": [TokenPruning([0.5])]}
    return options


def draw(pipe: VARPipeline, options: dict[str, Any], num_samples: int) -> Images:
    """Equally many samples of each class."""
    num_labels = pipe.transformer.config.num_labels
    labels = torch.arange(num_labels).repeat_interleave(num_samples // num_labels)
    generator = torch.Generator().manual_seed(0)
    parts = [
        pipe(part.tolist(), generator=generator, output_type="pt", **options).images for part in labels.split(250)
    ]
    return Images((torch.cat(parts) * 255).round().clamp(0, 255).to(torch.uint8), labels)


def measure_times(
    pipe: VARPipeline, labels: list[int], options: dict[str, dict[str, Any]], rounds: int
) -> dict[str, list[float]]:
    """Core-seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in options}
    for number in range(rounds + 1):
        for name, option in options.items():
            begin = time.process_time()
            pipe(labels, generator=torch.Generator().manual_seed(0), output_type="pt", **option)
            if number > 0:
                times[name].append(time.process_time() - begin)
    return times


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("digits", "cifar10", *DEPTHS), help="what to sample")
    parser.add_argument("--model", default=DIGITS_CHECKPOINT, help="folder of the pipeline")
    parser.add_argument("--refiner", help="folder of a pipeline with a smaller transformer")
    parser.add_argument("--train_data", default="", help="Parquet files of CIFAR-10")
    parser.add_argument("--test_data", default="")
    parser.add_argument("--classifier", type=Path, default=Path(), help="weights of cifar10_features.py")
    parser.add_argument("--num_samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if args.data == "cifar10" and not (args.train_data and args.test_data and args.classifier.is_file()):
        parser.error("cifar10 needs --train_data, --test_data and --classifier")
    torch.set_num_threads(1)
    judge, refiner = None, None
    if args.data in DEPTHS:
        models = (
            make_transformer(transformer_fields(args.data), torch.bfloat16),
            make_vqvae(vqvae_fields(args.data), torch.bfloat16),
        )
        pipe, labels = VARPipeline(*models), [3]
    else:
        pipe, labels = VARPipeline.from_pretrained(args.model), [3] * BATCH
        refiner = VARPipeline.from_pretrained(args.refiner).transformer if args.refiner else None
        judge = make_judge(args.data, args.train_data, args.test_data, args.classifier)
    pipe.set_progress_bar_config(disable=True)
    common = ALL_CODES if args.data == "cifar10" else {}
    scale = common.get("guidance_scale", pipe.config["guidance_scale"])
    options = {name: common | option for name, option in make_options(pipe, scale, refiner).items()}
    times = measure_times(pipe, labels, options, args.rounds)
    header = ["option", "ms", "share", *(METRICS if judge else ())]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    whole = next(iter(times.values()))
    for name, option in options.items():
        milliseconds = 1000 * statistics.median(times[name]) / len(labels)
        share = statistics.median(spent / before for spent, before in zip(times[name], whole, strict=True))
        found = measure(judge, draw(pipe, option, args.num_samples), has_classes=True) if judge else {}
        cells = [name, f"{milliseconds:.3g}", f"{share:.2f}", *(f"{found[metric]:.3f}" for metric in METRICS if judge)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
