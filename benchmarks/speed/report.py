# SPDX-License-Identifier: Apache-2.0
"""Arguments that the benchmarks share, and what they leave behind: a table, a JSON file and pictures."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .clock import CLOCKS, Series, use_clock
from .models import MODELS


# Header, field and form of the columns that all tables have; {baseline} is the variant that ratios are against.
COLUMNS = [
    ("variant", "variant", "{}"),
    ("batch", "batch_size", "{}"),
    ("rounds", "rounds", "{}"),
    ("seconds", "median", "{:.4g}"),
    ("from", "fastest", "{:.4g}"),
    ("to", "slowest", "{:.4g}"),
    ("per image, s", "per_image", "{:.4g}"),
    ("times {baseline}", "ratio", "{:.2f}"),
    ("from", "ratio_low", "{:.2f}"),
    ("to", "ratio_high", "{:.2f}"),
    ("floor reached", "floor_reached", "{:.0%}"),
]
EXTRAPOLATED = ("median", "fastest", "slowest", "per_image", "ratio", "ratio_low", "ratio_high")
CODES_COLUMN = ("codes changed", "changed", "{:.2%}")
TOKENS_COLUMN = ("tokens/s", "tokens_per_second", "{:.0f}")
LOSS_COLUMN = ("relative error of the loss", "loss_error", "{:.1e}")


def make_parser(documentation: str | None, variants: list[str], rounds: int = 3) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have; `documentation` is the script's docstring."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="d16", help="size of the transformer")
    parser.add_argument(
        "--dtype",
        choices=("both", "float32", "bfloat16"),
        default="both",
        help="the variants of this dtype only, unless --variants names some",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU; default: as torch chooses")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="process: what the process computed, for --threads 1 on a CPU that others use too",
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--variants", nargs="+", help=f"among {', '.join(variants)}")
    parser.add_argument("--output_dir", default="outputs/speed", help="folder of the JSON file and the pictures")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and few rounds: does it run")
    return parser


def prepare(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse and apply the arguments."""
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"`rounds` must be at least 1, got {args.rounds}.")
    if args.smoke:
        args.model, args.rounds = "tiny", min(args.rounds, 2)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.device = torch.device(args.device)
    if args.clock == "process" and (args.device.type != "cpu" or torch.get_num_threads() > 1):
        parser.error(
            "`clock` = 'process' needs a CPU and `threads` = 1: it adds up all threads and sees no other device."
        )
    use_clock(args.clock)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return args


def choose(args: argparse.Namespace, variants: list[str], known: list[str] | None = None) -> list[str]:
    """
    The variants to run: those that were asked for, or those of `variants` that fit `--dtype` and the device.

    Raises:
        `ValueError`: If one is unknown.
    """
    if args.variants:
        unknown = [name for name in args.variants if name not in (known or variants)]
        if unknown:
            raise ValueError(f"`variants` must be among {known or variants}, got {unknown}.")
        return list(args.variants)
    chosen = [name for name in variants if args.dtype == "both" or is_half(name) == (args.dtype == "bfloat16")]
    # Which library multiplies on a CPU is of no concern elsewhere.
    return [name for name in chosen if args.device.type == "cpu" or not ("onednn" in name or "mkl" in name)]


def is_half(variant: str) -> bool:
    """Whether a variant computes in bf16, not just its decoder."""
    return "bf16" in variant and "bf16_decoder" not in variant


def table(rows: list[dict[str, Any]], baseline: str, more: list[tuple[str, str, str]]) -> str:
    """A Markdown table of `COLUMNS` and `more`."""
    return write_table(
        rows, [(header.format(baseline=baseline), field, form) for header, field, form in COLUMNS + more]
    )


def write_table(rows: list[dict[str, Any]], columns: list[tuple[str, str, str]]) -> str:
    """A Markdown table. A tilde stands before what was extrapolated, nothing where there is no value."""
    lines = ["| " + " | ".join(header for header, _, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for _, field, form in columns:
            value = row.get(field)
            mark = "~" if row.get("extrapolated") and field in EXTRAPOLATED else ""
            # An error may have a bar in its text.
            cells.append("" if value is None else mark + form.format(value).replace("|", "\\|"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_rows(
    series: dict[str, Series], baseline: str, batch_size: int, floors: dict[str, float], reference: str
) -> list[dict]:
    """
    A row for each variant.

    Args:
        series (`dict[str, Series]`): What was measured.
        baseline (`str`): The variant that ratios are against.
        batch_size (`int`): Images of a measurement.
        floors (`dict[str, float]`): Seconds that a variant needs at least, where that is known.
        reference (`str`): The variant whose tokens and loss the others' are compared with.
    """
    rows = []
    for name, own in series.items():
        row = {"variant": name, "batch_size": batch_size, "rounds": len(own.seconds), **own.times()}
        row["per_image"] = row["median"] / batch_size
        if baseline in series:
            row |= own.ratios(series[baseline]) | {"baseline": baseline}
        row["floor"] = floors.get(name)
        row["floor_reached"] = None if row["floor"] is None else row["floor"] / row["median"]
        if reference in series and name != reference:
            row["changed"] = own.changed(series[reference])
            row["loss_error"] = own.loss_error(series[reference])
        row["reference"] = reference
        rows.append(row)
    return rows


def write(output_dir: str | Path, name: str, report: dict[str, Any]) -> Path:
    """Write the JSON file."""
    path = Path(output_dir) / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    return path


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for the JSON file."""
    return {key: str(value) if isinstance(value, torch.device) else value for key, value in vars(args).items()}


def machine_text(machine: dict, limits: dict) -> str:
    """A paragraph on the machine."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits["flops"].items())
    parts = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"{parts}; measured: {rates}, reading {limits['bytes_per_second'] / 1e9:.1f} GB/s"


def plot_lines(
    path: str | Path, curves: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, title: str = ""
) -> None:
    """Draw curves of positive points on logarithmic axes."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
