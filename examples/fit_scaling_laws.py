# SPDX-License-Identifier: Apache-2.0
"""
Fit the power laws of validation loss and error rate against parameters and training compute (Tian et al. 2024, section
4.2) to the logs of train_var.py, of models of at least three sizes. Prints the laws and plots them.

    python examples/fit_scaling_laws.py outputs/d4 outputs/d6 outputs/d8 outputs/d10 --output scaling.png
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter


LOG_NAME = "train_log.jsonl"
# The quantities of the figures 5 and 6 of the paper, with their labels.
FIGURES = {
    "loss": "loss, all tokens",
    "last_scale_loss": "loss, last scale",
    "error_rate": "error rate, all tokens",
    "last_scale_error_rate": "error rate, last scale",
}
# The units of the paper, in which prefactors are numbers of ordinary size: billions of parameters and PFLOP.
UNITS = {"parameters": 1e9, "compute": 1e15}
SYMBOLS = {"parameters": "N", "compute": "C"}
# Losses on other tokens or other images do not belong to one curve.
SHARED = ("tokenizer", "length", "validation_data")
MIN_SIZES = 3


@dataclass(frozen=True)
class ScalingRun:
    """
    What the log of a training says about its size, its cost and how well it predicted the validation data.

    Args:
        name (`str`): Name of its folder.
        num_parameters (`int`): Parameters of the model.
        flops_per_step (`float`): FLOPs of an optimizer step, see [`~hf_var.priors.costs.training_flops`].
        shared (`dict`): What all runs of a fit must agree in.
        steps (`list[int]`): Steps after which it was validated.
        figures (`dict[str, list[float]]`): For each of `FIGURES` the values at `steps`.
    """

    name: str
    num_parameters: int
    flops_per_step: float
    shared: dict[str, Any]
    steps: list[int]
    figures: dict[str, list[float]]

    def curve(self, figure: str) -> list[tuple[float, float]]:
        """A figure over the training compute, in PFLOP."""
        compute = [step * self.flops_per_step / UNITS["compute"] for step in self.steps]
        return list(zip(compute, self.figures[figure], strict=True))


@dataclass(frozen=True)
class PowerLaw:
    """
    `y = (prefactor * x) ** exponent`, a straight line where both axes are logarithmic.

    Args:
        exponent (`float`): Slope of the line, below 0 where more is better.
        log_prefactor (`float`): Natural logarithm of the prefactor, which itself may be too large for a number.
        correlation (`float`): Pearson's, of the logarithms.
        num_points (`int`): Points of the fit.
    """

    exponent: float
    log_prefactor: float
    correlation: float
    num_points: int

    def __call__(self, x: float) -> float:
        return math.exp(self.exponent * (math.log(x) + self.log_prefactor))

    @property
    def prefactor(self) -> float:
        """`inf` where it is too large."""
        return math.exp(self.log_prefactor) if self.log_prefactor < 709 else math.inf


@dataclass(frozen=True)
class ScalingLaw:
    """
    One fit: a figure of `FIGURES` against `parameters` or `compute`, in `UNITS`.

    Args:
        figure (`str`): What is predicted.
        axis (`str`): From what.
        points (`list[tuple[float, float]]`): What was fitted.
        law ([`PowerLaw`]): The fit.
    """

    figure: str
    axis: str
    points: list[tuple[float, float]]
    law: PowerLaw


def read_scaling_run(path: str | Path) -> ScalingRun:
    """
    Read the log of a training.

    Args:
        path (`str`):
            Folder of the run, or its `train_log.jsonl`: lines of JSON. The first one has `num_parameters` and
            `flops_per_step`, and may have what runs must agree in to be compared: `tokenizer`, `length` and
            `validation_data`. Those of a validation have `step`, `validation_loss` in nats per token and
            `validation_accuracy`, and both for every scale k, as `validation_loss_k`.

    Raises:
        `ValueError`: If there is no log, a line is not whole, or a figure is missing or impossible.
    """
    path = Path(path)
    log = path / LOG_NAME if path.is_dir() else path
    if not log.is_file():
        raise ValueError(f"`runs` must be folders with a {LOG_NAME}, or such files, got {str(path)!r}.")
    lines = _read_lines(log)
    head = lines[0] if lines else {}
    for name in ("num_parameters", "flops_per_step"):
        if not _is_positive(head.get(name)):
            raise ValueError(f"The first line of {log} must have a positive `{name}`, got {head.get(name)!r}.")
        if any(line.get(name, head[name]) != head[name] for line in lines):
            raise ValueError(f"`{name}` changes in {log}. A run must keep its size and its batches.")

    # Nothing was computed before the first step, and zero has no logarithm.
    validations = [line for line in lines if "validation_loss" in line and line["step"] > 0]
    if not validations:
        raise ValueError(f"{log} has no `validation_loss`: train with `validation_data`.")
    num_scales = len([name for name in validations[0] if re.fullmatch(r"validation_loss_\d+", name)])
    last_scale = max(num_scales - 1, 0)
    figures: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for line in validations:
        for prefix, suffix in (("", ""), ("last_scale_", f"_{last_scale}")):
            loss = line.get(f"validation_loss{suffix}")
            accuracy = line.get(f"validation_accuracy{suffix}")
            where = f"at step {line['step']} of {log}"
            if not _is_positive(loss):
                raise ValueError(f"`validation_loss{suffix}` must be a positive number {where}, got {loss!r}.")
            if not isinstance(accuracy, (int, float)) or not 0 <= accuracy < 1:
                raise ValueError(
                    f"`validation_accuracy{suffix}` must be a share from 0 to below 1 {where}, got {accuracy!r}."
                )
            figures[f"{prefix}loss"].append(float(loss))
            figures[f"{prefix}error_rate"].append(1.0 - accuracy)
    return ScalingRun(
        name=log.resolve().parent.name,
        num_parameters=head["num_parameters"],
        flops_per_step=head["flops_per_step"],
        shared={name: head.get(name) for name in SHARED} | {"number of scales": num_scales},
        steps=[line["step"] for line in validations],
        figures=figures,
    )


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """
    Fit `y = (prefactor * x) ** exponent` by least squares of the logarithms.

    Args:
        points (`list[tuple[float, float]]`): Positive values x and y.

    Raises:
        `ValueError`: If all x are the same, or y neither rises nor falls with x.
    """
    log_x = [math.log(x) for x, _ in points]
    log_y = [math.log(y) for _, y in points]
    slope, intercept = (0.0, 0.0) if len(set(log_x)) < 2 else statistics.linear_regression(log_x, log_y)
    if slope == 0:
        raise ValueError(f"`points` must have different x, and y that rise or fall with them, got {list(points)}.")
    return PowerLaw(slope, intercept / slope, statistics.correlation(log_x, log_y), len(points))


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats: none has a smaller or equal x and a smaller or equal y. Sorted by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def fit_scaling_laws(runs: Sequence[ScalingRun]) -> list[ScalingLaw]:
    """
    Fit every figure against the parameters, by its final values, and against the training compute, along the lower
    envelope of all runs' curves.

    Args:
        runs (`list[ScalingRun]`): Trainings of models of at least three sizes on the same tokens.

    Raises:
        `ValueError`: If there are fewer sizes, the runs cannot be compared, or too few points are left for a fit.
    """
    for name in runs[0].shared if runs else ():
        values = {run.name: run.shared[name] for run in runs}
        if len(set(map(str, values.values()))) > 1:
            raise ValueError(f"`runs` must have the same {name} to be compared, got {values}.")
    sizes = {run.num_parameters for run in runs}
    if len(sizes) < MIN_SIZES:
        raise ValueError(f"`runs` must have at least {MIN_SIZES} different sizes, got {sorted(sizes)} parameters.")
    laws = []
    for axis in UNITS:
        for figure in FIGURES:
            if axis == "parameters":
                points = sorted((run.num_parameters / UNITS[axis], run.figures[figure][-1]) for run in runs)
            else:
                points = pareto_front(point for run in runs for point in run.curve(figure))
                if len(points) < MIN_SIZES:
                    raise ValueError(
                        f"`runs` leave {len(points)} points on the lower envelope of the {FIGURES[figure]}, and a fit "
                        f"needs {MIN_SIZES}: validate more often, or train the larger models for longer."
                    )
            try:
                laws.append(ScalingLaw(figure, axis, points, fit_power_law(points)))
            except ValueError as error:
                raise ValueError(f"The {FIGURES[figure]} of `runs` has no power law in {axis}: {error}") from error
    return laws


def scaling_plot(runs: Sequence[ScalingRun], laws: Sequence[ScalingLaw]) -> Figure:
    """
    Draw losses and error rates against parameters and training compute, with the power laws that were fitted to them.

    Args:
        runs (`list[ScalingRun]`): The trainings, whose curves are plotted over the compute.
        laws (`list[ScalingLaw]`): What [`fit_scaling_laws`] made of them.

    Returns:
        `matplotlib.figure.Figure`: Its `savefig` writes the picture.
    """
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for entry in laws:
        row, column = int("error" in entry.figure), int(entry.axis == "compute")
        axes = panels[row, column]
        is_last = entry.figure.startswith("last_scale")
        color = "C1" if is_last else "C0"
        if entry.axis == "compute":
            for run in runs:
                axes.plot(*zip(*run.curve(entry.figure), strict=True), color=color, alpha=0.35, linewidth=1)
        x, y = zip(*entry.points, strict=True)
        axes.plot(x, y, linestyle="none", marker=".", color=color)
        formula = f"({entry.law.prefactor:.2g} {SYMBOLS[entry.axis]})$^{{{entry.law.exponent:.3f}}}$"
        label = f"{'last scale' if is_last else 'all tokens'}: {formula}, r = {entry.law.correlation:.3f}"
        ends = (min(x), max(x))
        axes.plot(ends, [entry.law(end) for end in ends], linestyle="--", color=color, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        # Between two powers of ten its labels would lie upon each other.
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panels.flat:
        axes.legend(frameon=False)
    panels[0, 0].set_ylabel("validation loss in nats per token")
    panels[1, 0].set_ylabel("validation error rate")
    panels[1, 0].set_xlabel("parameters N in billions")
    panels[1, 1].set_xlabel("training compute C in PFLOP")
    return figure


def scaling_table(laws: Sequence[ScalingLaw]) -> str:
    """The fits as lines of text."""
    rows = [("figure", "against", "law", "correlation", "points")]
    for entry in laws:
        law = entry.law
        formula = f"({law.prefactor:.3g} {SYMBOLS[entry.axis]})^{law.exponent:.4f}"
        rows.append((FIGURES[entry.figure], entry.axis, formula, f"{law.correlation:.4f}", str(law.num_points)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*table, "N: billions of parameters, C: training compute in PFLOP"])


def scaling_json(runs: Sequence[ScalingRun], laws: Sequence[ScalingLaw]) -> dict[str, Any]:
    """The fits and what they were made of, as JSON takes it. A prefactor that is too large for a number is `None`."""
    return {
        "units": UNITS,
        "runs": [
            {
                "name": run.name,
                "num_parameters": run.num_parameters,
                "flops_per_step": run.flops_per_step,
                "steps": run.steps,
                **run.figures,
            }
            for run in runs
        ],
        "laws": [
            {
                "figure": entry.figure,
                "axis": entry.axis,
                "exponent": entry.law.exponent,
                "prefactor": entry.law.prefactor if math.isfinite(entry.law.prefactor) else None,
                "correlation": entry.law.correlation,
                "num_points": entry.law.num_points,
                "points": [list(point) for point in entry.points],
            }
            for entry in laws
        ],
    }


def _read_lines(log: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(log.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"Line {number} of {log} is no JSON: {text.strip()[:80]!r}.") from error
        if not text.endswith("\n") or not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"Line {number} of {log} is no whole line of a training log: {text.strip()[:80]!r}.")
        lines.append(line)
    return lines


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fit power laws of loss against size and compute.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a training, or its train_log.jsonl"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="plot to write, such as scaling.png"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the values as JSON")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    runs = [read_scaling_run(path) for path in args.runs]
    laws = fit_scaling_laws(runs)
    plot = scaling_plot(runs, laws)
    file_types = plot.canvas.get_supported_filetypes()
    if args.output.suffix.lower().removeprefix(".") not in file_types:
        raise ValueError(f"--output must be a picture file such as scaling.png, got {str(args.output)!r}.")
    for path in (args.output, args.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(args.output)
    if args.json is not None:
        args.json.write_text(json.dumps(scaling_json(runs, laws), indent=2) + "\n", encoding="utf-8")
    print(scaling_table(laws))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
