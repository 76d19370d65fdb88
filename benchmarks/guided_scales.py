# SPDX-License-Identifier: Apache-2.0
"""
What it changes to guide only the first scales: the others are computed for one half of the batch, without the class.

    python benchmarks/guided_scales.py                    # the embedded digits: time and quality
    python benchmarks/guided_scales.py --model d16        # random weights of a published size: time alone

The guided scales have the weights that they have by default. `ms` is the processor time of an image in milliseconds, the median of
`--rounds` calls in turns; of the digits in batches of 64, otherwise of a single image in bf16. The quality is that of 1,000 digits,
see digits_quality.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from digits_quality import draw, measure
from speed.models import make_transformer, make_vqvae, transformer_fields, vqvae_fields

from hf_var import DIGITS_CHECKPOINT, VARPipeline
from hf_var.pipelines.sampling import guidance_weight


METRICS = ("accuracy", "variance", "frechet")


def first_scales(scale: float, number: int) -> Callable[[int, int], float]:
    """The weights of `guidance_scale` at the first `number` scales, and 1, which is none, at the others."""
    return lambda k, num_scales: guidance_weight(scale, k, num_scales) if k < number else 1.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="d16, d20 ...; default: the digits")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.model is None:
        pipe, labels, others = VARPipeline.from_pretrained(DIGITS_CHECKPOINT), [3] * 64, METRICS
    else:
        transformer = make_transformer(transformer_fields(args.model), torch.bfloat16)
        pipe, labels, others = VARPipeline(transformer, make_vqvae(vqvae_fields(args.model), torch.bfloat16)), [3], ()
    pipe.set_progress_bar_config(disable=True)
    num_scales, scale = len(pipe.vqvae.config.patch_nums), pipe.config["guidance_scale"]
    rules = {number: first_scales(scale, number) for number in range(num_scales, -1, -1)}
    times: dict[int, list[float]] = {number: [] for number in rules}
    for _ in range(args.rounds):
        for number, rule in rules.items():
            begin = time.process_time()
            pipe(labels, guidance_scale=rule, generator=torch.Generator().manual_seed(0), output_type="pt")
            times[number].append(time.process_time() - begin)
    header = [f"scales guided, of {num_scales}", "ms", *others]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for number, rule in rules.items():
        found = {}
        if others:
            found = measure(*draw(lambda rule=rule, **call: pipe(guidance_scale=rule, **call), 100, seed=0))
        milliseconds = 1000 * statistics.median(times[number]) / len(labels)
        cells = [str(number), f"{milliseconds:.3g}", *(f"{found[metric]:.3f}" for metric in others)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
