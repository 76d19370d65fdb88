# SPDX-License-Identifier: Apache-2.0
"""Curves of a training's log."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def curves_plot(log_path: str | Path, names: Sequence[str], marks: Mapping[str, int] | None = None) -> Figure:
    """Plot metrics of a `train_log.jsonl` over the steps, one panel each, with `marks` where something began."""
    lines = [json.loads(line) for line in Path(log_path).read_text(encoding="utf-8").splitlines()]
    known = sorted(set().union(*lines) - {"step"})
    if len(names) == 0 or not set(names) <= set(known):
        raise ValueError(f"`names` must be one or more of the log's {known}, got {list(names)}.")
    figure = Figure(figsize=(6.4, 0.6 + 2.0 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        # A metric of the validation may have a single point.
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axes.set_ylabel(name.replace("_", " "))
        for mark, step in (marks or {}).items():
            axes.axvline(step, color="gray", linestyle="--", linewidth=1)
            if axes is panels[0]:
                axes.annotate(mark, (step, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    panels[-1].set_xlabel("step")
    return figure
