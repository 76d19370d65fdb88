# SPDX-License-Identifier: Apache-2.0
"""
How much memory an image takes: the peak of a whole generation, guidance and decoder included, each in a process of its own.

    python benchmarks/memory.py --model d30 --batch_sizes 1 2
    python benchmarks/memory.py --model d30 --device cuda --batch_sizes 1 64

On a CPU it is the resident memory of the process, with the libraries; on an accelerator what torch has allocated. `working` is
the peak without what was there before the call, `per more image` its growth from the smallest batch to this one.
The cache is counted twice: as the model's sizes have it, and as the buffers of a call really are.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from speed.clock import progress
from speed.machine import cache_numbers, describe
from speed.models import make_transformer, make_vqvae, transformer_fields, vqvae_fields
from speed.plain_var import PlainVAR
from speed.plain_vqvae import PlainVQVAE
from speed.report import arguments_of, choose, is_half, make_parser, prepare, write, write_table
from speed.variants import GUIDANCE_SCALE, SEED, TOP_K, TOP_P

from hf_var import VARPipeline, VQVAEModel


VARIANTS = ["plain", "plain_bf16", "ours", "ours_bf16", "ours_bf16_sliced", "ours_bf16_tiled"]
# What a variant asks of the tokenizer.
DECODER_METHODS = {"sliced": "enable_slicing", "tiled": "enable_tiling"}
MEGABYTE = 2**20
COLUMNS = [
    ("variant", "variant", "{}"),
    ("batch", "batch_size", "{}"),
    ("weights, MB", "weights", "{:.0f}"),
    ("before the call, MB", "before", "{:.0f}"),
    ("peak, MB", "peak", "{:.0f}"),
    ("working, MB", "working", "{:.0f}"),
    ("per more image, MB", "per_image", "{:.1f}"),
    ("cache by its sizes, MB", "cache_counted", "{:.1f}"),
    ("cache allocated, MB", "cache_allocated", "{:.1f}"),
]


def decoder_method(variant: str) -> str | None:
    """The method of the tokenizer that `variant` calls first."""
    return next((method for suffix, method in DECODER_METHODS.items() if variant.endswith(suffix)), None)


# --------------------------------------------------------------------------------------------------------------------
# In the child


def forget_peak(device: torch.device) -> None:
    """Let the peak begin at what there is now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory since the peak was forgotten, or since the process began where that is not possible."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike `ru_maxrss`, it does not begin with that of the parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def present_bytes(device: torch.device) -> int:
    """Memory in use."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def measure_here(variant: str, model: str, batch_size: int, device: torch.device) -> dict[str, float]:
    """Make the models and draw once, in this process; all results in MB."""
    dtype = torch.bfloat16 if is_half(variant) else torch.float32
    transformer = make_transformer(transformer_fields(model), dtype, device)
    vqvae = make_vqvae(vqvae_fields(model), dtype, device)
    config, top_k = transformer.config, min(TOP_K, transformer.config.codebook_size)
    weights = sum(parameter.nbytes for part in (transformer, vqvae) for parameter in part.parameters())
    labels = [index % (config.num_labels or 1) for index in range(batch_size)]
    generator = torch.Generator(device).manual_seed(SEED)
    allocated: list[int] = []
    if variant.startswith("plain"):
        plain, tokenizer = PlainVAR(transformer), PlainVQVAE(vqvae)
        # Its query, key and value weights stand in for those.
        del transformer
        forget_peak(device)
        before = present_bytes(device)
        classes = torch.tensor(labels, device=device)
        plain.sample(tokenizer, classes, GUIDANCE_SCALE, top_k, TOP_P, generator)
    else:
        if method := decoder_method(variant):
            getattr(vqvae, method)()
        pipe = VARPipeline(transformer, vqvae)
        pipe.set_progress_bar_config(disable=True)

        def note_cache(module, args, kwargs) -> None:
            layers = kwargs["cache"].layers
            allocated.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized))

        transformer.register_forward_pre_hook(note_cache, with_kwargs=True)
        forget_peak(device)
        before = present_bytes(device)
        options = {"guidance_scale": GUIDANCE_SCALE, "top_k": top_k, "top_p": TOP_P, "output_type": "pt"}
        pipe(labels, generator=generator, **options)
    peak = peak_bytes(device)
    result = {
        "weights": weights,
        "before": before,
        "peak": peak,
        "working": peak - before,
        "cache_counted": cache_numbers(config, 2 * batch_size, config.length) * dtype.itemsize,
    }
    if allocated:
        result["cache_allocated"] = max(allocated)
    return {name: value / MEGABYTE for name, value in result.items()}


# --------------------------------------------------------------------------------------------------------------------
# In the parent


def measure_apart(args, variant: str, batch_size: int) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--model", args.model, "--device", str(args.device)]
    command += ["--child", variant, "--batch_sizes", str(batch_size)]
    if args.threads is not None:
        command += ["--threads", str(args.threads)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> dict:
    parser = make_parser(__doc__, VARIANTS, rounds=1)
    parser.set_defaults(model="d30")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = prepare(parser, argv)
    if args.child is not None:
        result = measure_here(args.child, args.model, args.batch_sizes[0], args.device)
        print(json.dumps(result))
        return result
    names, skipped = choose(args, ["ours", "ours_bf16_sliced"] if args.smoke else VARIANTS, VARIANTS), {}
    for name in names:
        method = decoder_method(name)
        if method is not None and not hasattr(VQVAEModel, method):
            skipped[name] = f"`VQVAEModel` has no `{method}`"
    rows = []
    for name in [name for name in names if name not in skipped]:
        smallest = None
        for batch_size in sorted(args.batch_sizes):
            # The most that was seen: memory that another process needed meanwhile may be missing.
            results = [measure_apart(args, name, batch_size) for _ in range(args.rounds)]
            row = max(results, key=lambda result: result["peak"]) | {"variant": name, "batch_size": batch_size}
            progress(f"{name}, batch {batch_size}: {row['peak']:.0f} MB")
            if smallest is None:
                smallest = row
            else:
                more = batch_size - smallest["batch_size"]
                row["per_image"] = (row["working"] - smallest["working"]) / more if more else None
            rows.append(row)
    report = {
        "job": "memory",
        "machine": describe(args.device),
        "arguments": arguments_of(args),
        "rows": rows,
        "skipped": skipped,
    }
    print(f"Memory, {args.model}, {report['machine']['device']}\n")
    print(write_table(rows, COLUMNS))
    for name, reason in skipped.items():
        print(f"\n{name} did not run: {reason}.")
    progress(f"wrote {write(args.output_dir, f'memory_{args.model}', report)}")
    return report


if __name__ == "__main__":
    main()
