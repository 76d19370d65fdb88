# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind: its figures with everything that they depend on, here and on the Hub."""

import hashlib
import json
import math
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn

from .. import __version__
from ..hub.names import without_folders
from ..metrics.labels import METRIC_LABELS, metric_label, metric_name


PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "torch-fidelity", "torchmetrics", "numpy")
# The settings by which two evaluations differ. All others decide on speed alone.
DECIDING_SETTINGS = ("num_images", "image_size", "seed", "guidance_scale", "top_k", "top_p", "temperature", "smooth")
DECIDING_SETTINGS += ("classifier", "num_candidates", "dtype", "feature_extractor", "samples_fingerprint")
FIGURES_OF_A_TOKENIZER = {"rfid", "psnr"}


def write_report(output_dir: str | Path, report: Mapping[str, Any]) -> None:
    """
    Write `evaluation.json`, the report as it is, and `evaluation.md`, its tables, in which paths are reduced to their last
    part.

    Args:
        output_dir (`str`): A folder that exists.
        report (`dict[str, Any]`):
            `figures`, numbers by name; `departures`, sentences on what is otherwise than in the preset; all other entries are
            settings, or dictionaries of them. Numbers that are not finite become `null`, which is all that JSON has.
    """
    output_dir = Path(output_dir)
    text = json.dumps(_json_value(report), indent=2, allow_nan=False, ensure_ascii=False)
    (output_dir / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    figures = [(metric_label(name), _number(value)) for name, value in report["figures"].items()]
    settings = {name: value for name, value in report.items() if name not in ("figures", "departures")}
    lines = [
        "# Evaluation",
        "",
        *_table("figure", figures),
        "",
        "## Settings",
        "",
        *_table("setting", _rows(settings)),
    ]
    if report.get("departures"):
        lines += ["", "## Departures from the preset", "", *(f"- {sentence}" for sentence in _departures(report))]
    (output_dir / "evaluation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """
    Versions of the libraries that figures may depend on, and what computed them. Nothing that names the machine.

    Args:
        device (`torch.device`, *optional*, defaults to the CPU): Where the models are.
    """
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


def weights_fingerprint(module: nn.Module) -> str:
    """A short text that changes with every weight and every buffer of a module, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def push_figures(repo_id: str, figures: Mapping[str, float], report: Mapping[str, Any]) -> str:
    """
    Add figures to the results in the metadata (`model-index`) of a model card on the Hub. They replace those of an earlier
    evaluation on the same reference with the same settings; all else of the card stays. A repository without a card gets
    one.

    Args:
        repo_id (`str`): A repository that exists.
        figures (`dict[str, float]`): Values by name; those of single scales and those that are not finite are left out.
        report (`dict[str, Any]`): See [`write_report`]. Of it `settings`, `departures` and `reference`, the
            [`~hf_var.evaluation.image_sets.ImageSet.description`], are read.

    Returns:
        `str`: Address of the commit.

    Raises:
        `ValueError`: If none of the figures can be published, or if the card's metadata are not valid.
    """
    results = _results(figures, report)
    if not results:
        raise ValueError(f"`figures` must have finite numbers for some of {list(METRIC_LABELS)}, got {dict(figures)}.")
    name = repo_id.split("/")[-1]
    try:
        card = ModelCard.load(repo_id)
    except RemoteEntryNotFoundError:
        card = ModelCard(f"---\nlibrary_name: hf_var\n---\n\n# {name}\n")
    contents = cast(Any, card.data)
    known = contents.eval_results or []
    others = [result for result in known if not any(result.is_equal_except_value(new) for new in results)]
    contents.eval_results = others + results
    contents.model_name = contents.model_name or name
    return str(card.push_to_hub(repo_id, commit_message="Add the figures of an evaluation"))


# --------------------------------------------------------------------------------------------------------------------
# Results on the Hub


def _results(figures: Mapping[str, float], report: Mapping[str, Any]) -> list[EvalResult]:
    settings, reference = report["settings"], report.get("reference") or {}
    name = reference.get("name", "none")
    preset = settings.get("preset")
    if preset is not None and report.get("departures"):
        preset = f"{preset} with departures"
    # As YAML gives them back, which has no tuples and leaves None out, or the next evaluation would not find them again.
    deciding = {key: _json_value(without_folders(settings.get(key))) for key in DECIDING_SETTINGS}
    deciding = {key: value for key, value in deciding.items() if value is not None}
    # The Hub knows no task of classes; that of pictures without a text is the nearest one.
    is_tokenizer = bool(FIGURES_OF_A_TOKENIZER & set(figures))
    return [
        EvalResult(
            task_type="image-reconstruction" if is_tokenizer else "unconditional-image-generation",
            dataset_type=name if reference.get("kind") == "hub" else "images",
            dataset_name=name,
            dataset_split=reference.get("split"),
            metric_type=key,
            metric_name=metric_name(key),
            metric_value=round(float(figures[key]), 6),
            metric_config=preset,
            metric_args=deciding,
        )
        for key in METRIC_LABELS
        if key in figures and math.isfinite(figures[key])
    ]


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
