# SPDX-License-Identifier: Apache-2.0
"""The report says everything and names no folder. `tests/hub` has what becomes of it on the Hub."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_var
from hf_var.evaluation.report import environment, write_report


def make_report(folder: Path, **entries: Any) -> dict[str, Any]:
    settings = {
        "model": str(folder / "somebodys model"),
        "reference": f"{folder}/references/VIRTUAL.npz",
        "preset": "imagenet256",
        "guidance_scale": 2.5,
        "smooth": False,
        "classifier": None,
        "image_size": (256, 256),
        "feature_extractor": "a.module:extractor",
        "hub": "user/model",
        "path": folder / "weights.pth",
        "tiny": 1e-6,
        "text": "a | b\nc",
    }
    report = {
        "metrics": {"fid": 3.30412345, "kid": 1.25e-5, "inception_score": math.inf, "usage_0": 0.5},
        "settings": settings,
        "departures": [],
        "samples": None,
        "reference": {"name": "VIRTUAL.npz", "image_size": [256, 256]},
        "seconds": {"wall": 12.5, "stages": {"draw": math.nan}},
    }
    return report | entries


def written(folder: Path, report: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    write_report(folder, report)
    text = (folder / "evaluation.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse), (folder / "evaluation.md").read_text(encoding="utf-8").splitlines()


def test_json_is_the_report(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    read, _ = written(tmp_path, report)
    assert list(read) == list(report)
    assert read["metrics"] == {"fid": 3.30412345, "kid": 1.25e-5, "inception_score": None, "usage_0": 0.5}
    assert read["settings"] == report["settings"] | {"image_size": [256, 256], "path": str(tmp_path / "weights.pth")}
    assert read["seconds"] == {"wall": 12.5, "stages": {"draw": None}}


def test_tables_have_every_metric_and_setting(tmp_path: Path) -> None:
    _, lines = written(tmp_path, make_report(tmp_path))
    for line in (
        "| FID, lower is better | 3.30412 |",
        "| KID, lower is better | 1.25e-05 |",
        "| Inception Score, higher is better | inf |",
        "| usage_0 | 0.5 |",
        "| `settings.preset` | imagenet256 |",
        "| `settings.guidance_scale` | 2.5 |",
        "| `settings.smooth` | False |",
        "| `settings.classifier` | none |",
        "| `settings.image_size` | 256, 256 |",
        "| `settings.feature_extractor` | a.module:extractor |",
        "| `settings.hub` | user/model |",
        "| `settings.tiny` | 1e-06 |",
        "| `settings.text` | a \\| b c |",
        "| `samples` | none |",
        "| `reference.name` | VIRTUAL.npz |",
        "| `seconds.stages.draw` | nan |",
    ):
        assert line in lines, line
    assert not any("Departures" in line for line in lines)
    # Each row once, and every one a row of two.
    rows = [line for line in lines if line.startswith("|")]
    assert len(set(rows)) == len(rows) - 1
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}


def test_tables_name_no_folder(tmp_path: Path) -> None:
    departures = [
        f"reference is '{tmp_path}/of me/mine.npz', the preset has 'https://host/a/b.npz'",
        "top_k is 100, the preset has 900",
    ]
    read, lines = written(tmp_path, make_report(tmp_path, departures=departures))
    assert read["departures"] == departures
    assert lines[-3:] == [
        "",
        "- reference is 'mine.npz', the preset has 'b.npz'",
        "- top_k is 100, the preset has 900",
    ]
    assert "| `settings.model` | somebodys model |" in lines
    assert "| `settings.reference` | VIRTUAL.npz |" in lines
    assert "| `settings.path` | weights.pth |" in lines
    text = "\n".join(lines)
    for part in (*tmp_path.parts[1:], "of me", "references"):
        assert part not in text, part


def test_environment_has_versions_and_no_name_of_the_machine() -> None:
    found = environment("cpu")
    assert found["hf_var"] == hf_var.__version__
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["device"].startswith("cpu")
    packages = {"python", "transformers", "diffusers", "accelerate", "datasets", "torch-fidelity", "numpy", "platform"}
    assert packages <= found.keys()
    assert platform.node() not in " ".join(found.values()).split()
    assert environment(torch.device("cpu")) == found


@pytest.mark.gpu
def test_environment_names_the_accelerator() -> None:
    assert environment(torch.device("cuda", 0))["device"] == torch.cuda.get_device_name(0)
