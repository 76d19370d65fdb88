# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: its metrics with everything that they depend on, here and on the Hub."""

import json
import math
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..hub.names import without_folders
from ..hub.results import METRIC_LABELS, metric_label, metric_results, push_results
from .protocol import SAMPLING


METRICS_OF_A_TOKENIZER = {"rfid", "psnr"}
PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "torch-fidelity", "torchmetrics", "numpy")
# Settings that identify an evaluation. All others affect only its speed.
DECIDING_SETTINGS = SAMPLING | {"num_images", "image_size", "feature_extractor", "samples_fingerprint"}


def write_report(output_dir: str | Path, report: Mapping[str, Any]) -> None:
    """
    Write a report as `evaluation.json`, where `null` stands for infinity, and its tables, without folders, as
    `evaluation.md`.
    """
    output_dir = Path(output_dir)
    text = json.dumps(_json_value(report), indent=2, allow_nan=False, ensure_ascii=False)
    (output_dir / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    metrics = [(metric_label(name), _number(value)) for name, value in report["metrics"].items()]
    settings = {name: value for name, value in report.items() if name not in ("metrics", "departures")}
    lines = [
        "# Evaluation",
        "",
        *_table("metric", metrics),
        "",
        "## Settings",
        "",
        *_table("setting", _rows(settings)),
    ]
    if report.get("departures"):
        lines += ["", "## Departures from the preset", "", *(f"- {sentence}" for sentence in _departures(report))]
    (output_dir / "evaluation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions of the libraries that metrics may depend on, and the kind of device, but not the machine's name."""
    versions = {"hf_var": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.device(device)
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name(device) if is_cuda else f"{device.type} ({platform.machine()})"
    return {**versions, "platform": platform.system(), "device": name}


def push_metrics(repo_id: str, report: Mapping[str, Any]) -> str:
    """Add the metrics of a report to the card of a repository that exists, and return the address of the commit."""
    settings, reference = report["settings"], report.get("reference") or {}
    preset = settings.get("preset")
    if preset is not None and report.get("departures"):
        preset = f"{preset} with departures"
    name = reference.get("name", "none")
    # In the form that YAML returns, without tuples and None; otherwise the next evaluation would not recognise them.
    deciding = {key: _json_value(without_folders(settings.get(key))) for key in sorted(DECIDING_SETTINGS)}
    # The Hub has no task for class-conditional images; unconditional generation is the nearest one.
    is_tokenizer = bool(METRICS_OF_A_TOKENIZER & set(report["metrics"]))
    results = metric_results(
        {key: round(float(value), 6) for key, value in report["metrics"].items() if key in METRIC_LABELS},
        task="image-reconstruction" if is_tokenizer else "unconditional-image-generation",
        dataset=name if reference.get("kind") == "hub" else None,
        dataset_name=name,
        split=reference.get("split"),
        config=preset,
        settings={key: value for key, value in deciding.items() if value is not None},
    )
    if not results:
        raise ValueError(
            f"`metrics` must have finite numbers for some of {list(METRIC_LABELS)}, got {dict(report['metrics'])}."
        )
    return push_results(repo_id, results)


# --------------------------------------------------------------------------------------------------------------------
# Tables and JSON


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json_value(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _rows(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield f"`{prefix}{name}`", _cell(without_folders(value))


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return _number(value)
    text = "none" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:.6g}"


def _departures(report: Mapping[str, Any]) -> Iterator[str]:
    for sentence in report["departures"]:
        # Values are quoted, and paths among them may have spaces.
        short = re.sub(r"""(["'])(.+?)\1""", lambda found: repr(without_folders(found[2])), str(sentence))
        yield " ".join(str(without_folders(word)) for word in short.split())


def _table(subject: str, rows: Iterable[tuple[str | None, str]]) -> list[str]:
    return [f"| {subject} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
