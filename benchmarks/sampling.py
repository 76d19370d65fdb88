# SPDX-License-Identifier: Apache-2.0
"""
How long an image takes: our pipeline, the published algorithm in plain form, a decoder that samples token after token
and diffusers' DiT, all in one run and in turns.

    python benchmarks/sampling.py --model d16 --output_dir outputs/speed
    python benchmarks/sampling.py --model d16 --device cuda --batch_sizes 1 64

Weights are random: they cost as much as trained ones, and the share of tokens that bf16 changes is that of random weights.
`_compiled` is `pipe.compile()`. `_onednn` is torch's public switch `torch.backends.mkldnn.matmul.fp32_precision`, which sends fp32
products on a CPU to another library; how much it gains depends on which library torch was built with, so ratios with and
without it are both given. Our pipeline sets it by itself where nothing is rounded; `ours_mkl` is without it.
A tilde stands before times that are not measured in whole: of DiT `--peer_steps` steps run, of the raster decoder
`--peer_tokens` tokens at three positions, and the rest is taken to be as fast.
"""

from typing import Any

import torch
from speed import growth
from speed.clock import alternate, available, calls_to_warm_up, progress
from speed.machine import as_report, describe, measure_limits, sampling_work
from speed.report import (
    CODES_COLUMN,
    arguments_of,
    choose,
    is_half,
    machine_text,
    make_parser,
    make_rows,
    plot_lines,
    prepare,
    table,
    write,
)
from speed.variants import ALL_VARIANTS, CPU_PEERS, GPU_PEERS, VAR_VARIANTS, Samplers, decoder_dtype


BASELINE = "plain"


def default_variants(args) -> list[str]:
    """What runs unless `--variants` says otherwise."""
    if args.smoke:
        # Compiling takes longer than all others together.
        eager = [name for name in VAR_VARIANTS if "compiled" not in name]
        return [*eager, "raster", "dit_25", "dit_250_onednn", "dit_xl_25_bf16"]
    if args.device.type == "cpu":
        return VAR_VARIANTS + CPU_PEERS
    return VAR_VARIANTS + GPU_PEERS


def measure(args, samplers: Samplers, names: list[str], batch_size: int, limits) -> tuple[list[dict], dict]:
    """Rows of the table for one batch size, and the variants that cannot run."""
    variants, skipped = available({name: lambda name=name: samplers.make(name, batch_size) for name in names})
    # Peers take minutes, and what a first call costs them is little of that.
    warm_up = [name for name in variants if args.device.type != "cpu" or name in VAR_VARIANTS or args.smoke]
    series = alternate(variants, args.rounds, warm_up, calls_to_warm_up(args.device))
    floors = {}
    for name in variants:
        if name in VAR_VARIANTS:
            dtype = torch.bfloat16 if is_half(name) else torch.float32
            config, tokenizer = samplers.transformer(torch.float32).config, samplers.vqvae(torch.float32).config
            work = sampling_work(config, tokenizer, batch_size, guided=True, dtype=dtype)
            floors[name] = work.floor(limits, dtype, decoder_dtype(name))
    baseline = BASELINE if BASELINE in series else next(iter(series))
    reference = next((name for name in series if name in VAR_VARIANTS and not is_half(name)), baseline)
    return make_rows(series, baseline, batch_size, floors, reference), skipped


def count_work(samplers: Samplers, batch_size: int) -> dict[str, Any]:
    """What the floor is made of."""
    config, tokenizer = samplers.transformer(torch.float32).config, samplers.vqvae(torch.float32).config
    work = sampling_work(config, tokenizer, batch_size, guided=True, dtype=torch.float32)
    return {
        "batch_size": batch_size,
        "flops": work.flops,
        "decoder_flops": work.decoder_flops,
        "bytes_read_fp32": sum(work.scale_bytes),
        "cache_bytes_fp32": work.cache_bytes,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = make_parser(__doc__, ALL_VARIANTS)
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="default: 1 and 4; peers run with the first only")
    parser.add_argument("--peer_steps", type=int, help="steps of DiT that are measured; default: 2 on a CPU, else all")
    parser.add_argument("--peer_tokens", type=int, help="raster tokens per position; default: 4 on a CPU, else all")
    parser.add_argument("--no_growth", action="store_true", help="leave out how time grows with the resolution")
    args = prepare(parser, argv)
    on_cpu = args.device.type == "cpu"
    args.batch_sizes = args.batch_sizes or ([1, 2] if args.smoke else [1, 4])
    names = choose(args, default_variants(args), ALL_VARIANTS)
    limits = measure_limits(args.device, [torch.float32, torch.bfloat16], quick=args.smoke)
    steps, tokens = args.peer_steps, args.peer_tokens
    if args.smoke:
        steps, tokens = steps or 1, tokens or 1
    elif on_cpu:
        steps, tokens = steps or 2, tokens or 4
    samplers = Samplers(args.model, args.device, steps, tokens)
    rows, skipped = [], {}
    for index, batch_size in enumerate(args.batch_sizes):
        chosen = names
        if index > 0:
            chosen = [name for name in names if name in VAR_VARIANTS]
        if chosen:
            more, missing = measure(args, samplers, chosen, batch_size, limits)
            rows, skipped = rows + more, skipped | missing
    report = {
        "job": "sampling",
        "machine": describe(args.device),
        "limits": as_report(limits),
        "arguments": arguments_of(args),
        "work": [count_work(samplers, batch_size) for batch_size in args.batch_sizes],
        "rows": rows,
        "skipped": skipped,
    }
    print(f"Sampling, {args.model}. {machine_text(report['machine'], report['limits'])}\n")
    print(table(rows, rows[0]["baseline"], [CODES_COLUMN]))
    for name, reason in skipped.items():
        print(f"\n{name} did not run: {reason}.")
    name = f"sampling_{args.model}"
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row["variant"], []).append((row["batch_size"], row["per_image"]))
    plot_lines(f"{args.output_dir}/{name}_batch.png", curves, "images of a batch", "seconds per image", args.model)
    if not args.no_growth:
        grown = growth.measure_growth(args.device, 1 if args.smoke else args.rounds, args.smoke)
        report["growth"] = [curve.report() for curve in grown]
        print(f"\nTime and operations against the token grid n x n\n\n{growth.table(grown)}")
        for unit, part in (("seconds per image", "time"), ("FLOP per image", "")):
            chosen_curves = [curve for curve in grown if curve.name.endswith("time") == (part == "time")]
            plot_lines(
                f"{args.output_dir}/{name}_growth_{part or 'operations'}.png",
                {f"{curve.name}: n^{curve.exponent():.2f}": list(curve.values.items()) for curve in chosen_curves},
                "token grid n",
                unit,
                "the paper: attention n^4 (VAR) and n^6 (raster)",
            )
    progress(f"wrote {write(args.output_dir, name, report)}")
    return report


if __name__ == "__main__":
    main()
