# SPDX-License-Identifier: Apache-2.0
"""
How long a training step takes: ours beside the published algorithm in plain form (a dense additive mask, AdamW parameter by
parameter), in one run and in turns.

    python benchmarks/training.py --model d16 --batch_size 1

A step makes the inputs of all scales from codes, runs the transformer forward and backward and AdamW; `_images` variants
begin with images, which the tokenizer encodes in fp32 first. `_bf16` is autocast over fp32 weights, `_compiled` compiles layer
by layer. The learning rate is 0, which costs the same and lets all variants compute the same loss in all rounds; there is no
dropout of any kind. `_onednn`: see sampling.py.
The floor is the arithmetic of the matrix products at the measured rate: its share is the utilisation of the machine.
"""

import torch
from speed.clock import alternate, available, progress
from speed.machine import as_report, describe, dtype_name, measure_limits
from speed.report import (
    LOSS_COLUMN,
    TOKENS_COLUMN,
    arguments_of,
    choose,
    is_half,
    machine_text,
    make_parser,
    make_rows,
    prepare,
    table,
    write,
)
from speed.steps import Steps

from hf_var.priors.costs import training_flops


EAGER = ["plain", "plain_onednn", "plain_bf16", "plain_images", "ours", "ours_onednn", "ours_bf16"]
EAGER += ["ours_images", "ours_onednn_images", "ours_bf16_images"]
COMPILED = ["ours_compiled", "ours_bf16_compiled"]
BASELINE, IMAGES_BASELINE = "plain", "plain_images"


def main(argv: list[str] | None = None) -> dict:
    known = EAGER + COMPILED
    parser = make_parser(__doc__, known)
    parser.add_argument("--batch_size", type=int, help="images of a step; default: 1 on a CPU, else 16")
    args = prepare(parser, argv)
    batch_size = args.batch_size or (2 if args.smoke else 1 if args.device.type == "cpu" else 16)
    names = choose(args, EAGER if args.smoke else known, known)
    limits = measure_limits(args.device, [torch.float32, torch.bfloat16], quick=args.smoke)
    steps = Steps(args.model, args.device, batch_size)
    variants, skipped = available({name: lambda name=name: steps.make(name) for name in names})
    series = alternate(variants, args.rounds)
    config = steps.transformer.config
    flops = training_flops(config) * batch_size
    floors = {
        name: flops / limits.flops[dtype_name(torch.bfloat16 if is_half(name) else torch.float32)]
        for name in variants
        if not name.endswith("_images")
    }
    baseline = BASELINE if BASELINE in series else next(iter(series))
    rows = make_rows(series, baseline, batch_size, floors, baseline)
    for row in rows:
        row["loss"] = series[row["variant"]].loss
        row["tokens_per_second"] = batch_size * config.length / row["median"]
    # What it is worth to encode the images once, before the training.
    from_codes = {}
    if IMAGES_BASELINE in series:
        from_codes = {name: own.ratios(series[IMAGES_BASELINE]) for name, own in series.items()}
    report = {
        "job": "training",
        "machine": describe(args.device),
        "limits": as_report(limits),
        "arguments": arguments_of(args),
        "flops_per_step": flops,
        "rows": rows,
        "against_images": from_codes,
        "skipped": skipped,
    }
    print(f"Training, {args.model}. {machine_text(report['machine'], report['limits'])}\n")
    print(table(rows, baseline, [TOKENS_COLUMN, LOSS_COLUMN]))
    if from_codes:
        ratios = ", ".join(f"{name} {ratio['ratio']:.2f}" for name, ratio in from_codes.items())
        print(f"\nTimes {IMAGES_BASELINE}: {ratios}")
    progress(f"wrote {write(args.output_dir, f'training_{args.model}', report)}")
    return report


if __name__ == "__main__":
    main()
