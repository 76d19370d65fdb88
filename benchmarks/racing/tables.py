# SPDX-License-Identifier: Apache-2.0
"""The tables and the picture of a race, from the JSON files of its folder."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .entrants import Entrant
from .processes import read_json


REAL = "real"
EVALUATION = ".evaluation.json"
GROWTH = "growth"


def results_of(output: Path, seeds: Sequence[int], entrant: Entrant) -> list[dict[str, Any]]:
    """What each seed's evaluation found, with the core-seconds of its trainings; seeds without results are left out."""
    found = []
    for seed in seeds:
        folder = output / f"seed{seed}"
        evaluation = read_json(folder / f"{entrant.name}{EVALUATION}")
        if evaluation is not None:
            usage = read_json(folder / f"{entrant.name}.usage.json")
            found.append({**evaluation, **core_seconds(usage)})
    return found


def core_seconds(usage: dict[str, Any]) -> dict[str, float]:
    """Core-seconds of the first stage, of coding the images and of the second stage, and all together."""
    seconds = {name: part["seconds"] for name, part in usage.items()}
    first, codes = seconds.pop("first"), seconds.pop("codes", 0.0)
    parts = {"seconds_first": first, "seconds_codes": codes, "seconds_second": sum(seconds.values())}
    return {**parts, "seconds": sum(parts.values())}


def cell(results: Sequence[dict[str, Any]], name: str, form: str, factor: float = 1) -> str:
    """The median over seeds, and the range if there are several; empty where the entrant has no such number."""
    values = [factor * result[name] for result in results if result.get(name) is not None]
    if not values:
        return ""
    text = format(statistics.median(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}}–{max(values):{form}})"


COLUMNS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "codes or latents": lambda results: str(results[0].get("tokens", "")),
    "parameters, M": lambda results: " + ".join(
        text
        for text in (cell(results[:1], name, ".2f", 1e-6) for name in ("parameters_first", "parameters_second"))
        if text not in ("", "0.00")
    ),
    "core-seconds": lambda results: cell(results, "seconds", ".0f"),
    "of these stage 1, coding, stage 2": lambda results: " / ".join(
        format(statistics.median(result[name] for result in results), ".0f") if name in results[0] else ""
        for name in ("seconds_first", "seconds_codes", "seconds_second")
    ).strip(" /"),
    "reconstruction, dB": lambda results: cell(results, "psnr", ".2f"),
    "bits of an unseen image": lambda results: cell(results, "bits", ".1f"),
    "recognised, %": lambda results: cell(results, "recognised", ".1f", 100),
    "Fréchet distance": lambda results: cell(results, "frechet", ".3f"),
    "precision": lambda results: cell(results, "precision", ".3f"),
    "recall": lambda results: cell(results, "recall", ".3f"),
    "ms an image, batches of 64": lambda results: cell(results, "milliseconds_batch", ".2f"),
    "ms of a single image": lambda results: cell(results, "milliseconds_single", ".1f"),
}


def race_table(output: Path, seeds: Sequence[int], entrants: Sequence[Entrant]) -> str:
    """A row for each entrant that has results, below that of real images."""
    rows = [("real training images", [real] if (real := read_json(output / f"{REAL}.json")) else [])]
    rows += [(entrant.title, results_of(output, seeds, entrant)) for entrant in entrants]
    lines = [["entrant", *COLUMNS]]
    lines += [[title, *(make(results) for make in COLUMNS.values())] for title, results in rows if results]
    return markdown(lines)


def growth_table(output: Path, entrants: Sequence[Entrant]) -> str:
    """Milliseconds of an image by the side of the map."""
    found = {entrant.title: read_json(output / GROWTH / f"{entrant.name}.json") for entrant in entrants}
    found = {title: times for title, times in found.items() if times is not None}
    sides = sorted({int(side) for times in found.values() for side in times})
    lines = [["ms of a single image, by map", *(f"{side}x{side}" for side in sides)]]
    lines += [
        [title, *(f"{times[str(side)]:.1f}" if str(side) in times else "" for side in sides)]
        for title, times in found.items()
    ]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows, of which the first is the header, as a table."""
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], "|---" * len(lines[0]) + "|", *texts[1:]])


def draw_samples(output: Path, seed: int, entrants: Sequence[Entrant], path: Path) -> None:
    """The pictures of all entrants of a seed, and of real images, in one figure."""
    pictures = {"real training images": output / f"{REAL}.png"}
    pictures |= {entrant.title: output / f"seed{seed}" / f"{entrant.name}.png" for entrant in entrants}
    pictures = {title: picture for title, picture in pictures.items() if picture.is_file()}
    if not pictures:
        return
    columns = 3
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(3.4 * columns, 1.75 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for place in axes:
        place.axis("off")
    for place, (title, picture) in zip(axes, pictures.items(), strict=False):
        image = np.asarray(Image.open(picture).convert("RGB"))
        place.imshow(image, interpolation="nearest")
        place.set_title(title, fontsize=9)
    figure.savefig(path, dpi=150)
