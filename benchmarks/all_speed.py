# SPDX-License-Identifier: Apache-2.0
"""
All benchmarks of speed, one after the other, each in a process of its own: the source of "Speed" in RESULTS.md.

    python benchmarks/all_speed.py --output_dir outputs/speed
    python benchmarks/all_speed.py --device cuda --models d16 d30 --output_dir outputs/speed_cuda

The folder then holds the tables (`speed.md`), a JSON file for each, and pictures. Sampling is measured for all `--models`, training
and tokenizer for the first, memory for d30. Arguments that are not known here go to the benchmarks of sampling, which take
most of the time. All variants of d30 together, in fp32 and bf16 and beside a DiT of that size, need more than 24 GB: choose some
with `--variants`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from speed.clock import progress
from speed.report import plot_lines


HERE = Path(__file__).parent
# Parameters in millions, for the picture (Tian et al. 2024, table 1).
PARAMETERS = {"tiny": 0.05, "d16": 310, "d20": 600, "d24": 1000, "d30": 2000}


def run(job: str, *arguments: str) -> str:
    """A benchmark's table; what it tells meanwhile goes where ours goes."""
    progress(f"{job} {' '.join(arguments)}")
    command = [sys.executable, str(HERE / f"{job}.py"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def draw_sizes(output_dir: Path, models: list[str]) -> None:
    """Time of a single image against the size of the model."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for model in models:
        report = json.loads((output_dir / f"sampling_{model}.json").read_text(encoding="utf-8"))
        first = report["arguments"]["batch_sizes"][0]
        for row in report["rows"]:
            if row["batch_size"] == first:
                curves.setdefault(row["variant"], []).append((PARAMETERS[model], row["per_image"]))
    plot_lines(output_dir / "sampling_size.png", curves, "parameters, millions", "seconds per image")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["d16"], choices=list(PARAMETERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads")
    parser.add_argument("--clock", default="wall", help="wall or process, see sampling.py --help")
    parser.add_argument("--output_dir", default="outputs/speed")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run")
    args, sampling = parser.parse_known_args(argv)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shared = ["--device", args.device, "--output_dir", args.output_dir, "--clock", args.clock]
    shared += [] if args.threads is None else ["--threads", args.threads]
    if args.smoke:
        args.models = ["tiny"]
        shared.append("--smoke")
    tables = []
    for index, model in enumerate(args.models):
        # How time grows with the resolution does not depend on the size.
        growth = [] if index == 0 else ["--no_growth"]
        tables.append(run("sampling", "--model", model, *shared, *growth, *sampling))
    tables += [run(job, "--model", args.models[0], *shared) for job in ("training", "tokenizer")]
    tables.append(run("memory", *shared))
    draw_sizes(output_dir, args.models)
    text = "\n".join(tables)
    (output_dir / "speed.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
