# SPDX-License-Identifier: Apache-2.0
"""
A table of trained tokenizers, from what train_vqvae.py left in their folders, and their curves in one picture.

    python benchmarks/tokenizer_table.py outputs/vqvae_cifar10 outputs/vqvae_cifar10_plain outputs/vqvae_cifar10_rq
    python benchmarks/tokenizer_table.py --curve validation_psnr curve.png outputs/with outputs/without
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from transformers import AutoConfig

import hf_var  # noqa: F401 - registers the tokenizers


def read_log(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]


def row(folder: str) -> str:
    config = AutoConfig.from_pretrained(folder)
    last = next(line for line in reversed(read_log(folder)) if "validation_psnr" in line)
    scales = range(len(config.patch_nums))
    usage = " / ".join(f"{100 * last[f'validation_usage_{scale}']:.0f}" for scale in scales)
    energy = " / ".join(f"{100 * last[f'validation_residual_energy_{scale}']:.0f}" for scale in scales)
    name, tokens = Path(folder).name, sum(config.scale_lengths)
    quality = f"{last['validation_psnr']:.2f} | {last['validation_ssim']:.3f}"
    return f"| {name} | {tokens} | {last['step']} | {quality} | {usage} | {energy} |"


def draw(name: str, path: str, folders: list[str]) -> None:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for folder in folders:
        points = [(line["step"], line[name]) for line in read_log(folder) if name in line]
        axes.plot(*zip(*points, strict=True), label=Path(folder).name)
    axes.set_xlabel("step")
    axes.set_ylabel(name.replace("_", " "))
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", nargs=2, metavar=("FIGURE", "PNG"))
    parser.add_argument("folders", nargs="+")
    args = parser.parse_args()
    if args.curve is not None:
        draw(*args.curve, args.folders)
        return
    print("| run | tokens | steps | PSNR | SSIM | codes used per scale, % | energy left after each scale, % |")
    print("|---|---|---|---|---|---|---|")
    for folder in args.folders:
        print(row(folder))


if __name__ == "__main__":
    main()
