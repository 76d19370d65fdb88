# SPDX-License-Identifier: Apache-2.0
"""
How long the tokenizer takes to encode and to decode images: ours beside the published algorithm in plain form (contiguous
NCHW tensors, distances of all codes in full), in one run and in turns.

    python benchmarks/tokenizer.py --batch_size 1

Weights are random and images are smooth noise; the features have the spread of the codebook, so that the codes are many. The share of
codes that bf16 changes is that of these weights and images, not of a trained tokenizer. The quantizer computes in fp32 in all
variants. `_channels_last` is torch's memory format for the convolutions.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from speed.clock import Timed, alternate, available, progress, timed
from speed.machine import as_report, describe, dtype_name, measure_limits, tokenizer_flops
from speed.models import calibrate, make_vqvae, random_images, vqvae_fields
from speed.plain_vqvae import PlainVQVAE
from speed.report import (
    CODES_COLUMN,
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


VARIANTS = ["plain", "plain_bf16", "ours", "ours_channels_last", "ours_bf16", "ours_bf16_channels_last"]
TASKS = ("encode", "decode")
BASELINE = "plain"


class Tasks:
    """
    Makes the variants.

    Args:
        model (`str`): `"tiny"`, or any other, which all have the same tokenizer.
        device (`torch.device`): Where.
        batch_size (`int`): Images at once.
    """

    def __init__(self, model: str, device: torch.device, batch_size: int):
        self.device = device
        self.vqvae: Any = make_vqvae(vqvae_fields(model), device=device)
        calibrate(self.vqvae)
        self.images = random_images(self.vqvae, batch_size)
        with torch.no_grad():
            self.codes = self.vqvae.encode(self.images).codes

    def make(self, name: str, task: str) -> Callable[[], Timed]:
        """A measurement of the variant `name`."""
        vqvae = copy.deepcopy(self.vqvae).to(torch.bfloat16 if is_half(name) else torch.float32)
        if "channels_last" in name:
            vqvae = vqvae.to(memory_format=torch.channels_last)
        if name.startswith("plain"):
            plain = PlainVQVAE(vqvae)
            encode, decode = plain.encode, plain.decode
        else:
            encode, decode = lambda images: vqvae.encode(images).codes, lambda codes: vqvae.decode(codes).sample

        @torch.no_grad()
        def measure() -> Timed:
            if task == "decode":
                return Timed(timed(lambda: decode(self.codes), self.device)[0])
            seconds, codes = timed(lambda: encode(self.images), self.device)
            return Timed(seconds, codes)

        return measure


def main(argv: list[str] | None = None) -> dict:
    parser = make_parser(__doc__, VARIANTS)
    parser.add_argument("--batch_size", type=int, help="images at once; default: 1 on a CPU, else 32")
    args = prepare(parser, argv)
    batch_size = args.batch_size or (2 if args.smoke else 1 if args.device.type == "cpu" else 32)
    names = choose(args, VARIANTS)
    limits = measure_limits(args.device, [torch.float32, torch.bfloat16], quick=args.smoke)
    tasks = Tasks(args.model, args.device, batch_size)
    flops = dict(zip(TASKS, tokenizer_flops(tasks.vqvae.config, batch_size), strict=True))
    rows, skipped = [], {}
    for task in TASKS:
        variants, missing = available({name: lambda name=name, task=task: tasks.make(name, task) for name in names})
        series = alternate(variants, args.rounds)
        floors = {
            name: flops[task] / limits.flops[dtype_name(torch.bfloat16 if is_half(name) else torch.float32)]
            for name in variants
        }
        baseline = BASELINE if BASELINE in series else next(iter(series))
        found = make_rows(series, baseline, batch_size, floors, baseline)
        rows += [{**row, "task": task, "variant": f"{task}: {row['variant']}"} for row in found]
        skipped |= missing
    report = {
        "job": "tokenizer",
        "machine": describe(args.device),
        "limits": as_report(limits),
        "arguments": arguments_of(args),
        "flops": flops,
        "rows": rows,
        "skipped": skipped,
        "different_codes": len(tasks.codes.unique()),
    }
    print(f"Tokenizer. {machine_text(report['machine'], report['limits'])}\n")
    print(table(rows, rows[0]["baseline"], [CODES_COLUMN]))
    progress(f"wrote {write(args.output_dir, f'tokenizer_{args.model}', report)}")
    return report


if __name__ == "__main__":
    main()
