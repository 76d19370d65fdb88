# SPDX-License-Identifier: Apache-2.0
"""Somebody who evaluates models, some of them more than once, and adds the metrics to their cards."""

import sys
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from hf_var.evaluation.report import push_metrics
from hf_var.hub.push import push_card as upload


BODY = "\n# The model\n\nA text of the author's, with a | and\n\n---\n\na line.\n"


def make_report(folder: Path, metrics: dict[str, float], **settings: Any) -> dict[str, Any]:
    values = {
        "model": str(folder / "model"),
        "reference": str(folder / "VIRTUAL.npz"),
        "preset": "imagenet256",
        "num_images": 50_000,
        "image_size": (256, 256),
        "seed": 0,
        "guidance_scale": 2.5,
        "top_k": 900,
        "top_p": 0.96,
        "smooth": False,
        "classifier": None,
        "batch_size": 64,
        "feature_extractor": "inception",
    }
    reference = {"kind": "npz", "name": "VIRTUAL.npz", "num_images": 10_000}
    return {"metrics": metrics, "settings": values | settings, "reference": reference, "departures": []}


def push_card(repo_id: str) -> None:
    """A card as a training leaves it, with metrics of its own and a field that nobody here knows."""
    result = EvalResult("unconditional-image-generation", "user/birds", "user/birds", "loss", 4.25, metric_name="loss")
    data = ModelCardData(license="cc0-1.0", model_name="My model", eval_results=[result], further={"a": [1, 2]})
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{BODY}")
    HfApi().create_repo(repo_id)
    upload(card, repo_id, "Upload a card")


def main(folder: Path) -> None:
    push_card("user/model")
    metrics = {"fid": 3.4, "inception_score": 270.0, "usage_0": 0.5, "kid": float("nan")}
    push_metrics("user/model", make_report(folder, metrics))
    # Again, with what does not decide on the metrics changed; then with less guidance.
    address = push_metrics("user/model", make_report(folder, metrics | {"fid": 3.3}, batch_size=8))
    report = make_report(folder, {"fid": 12.1}, guidance_scale=1.0, classifier=str(folder / "classifier"))
    push_metrics("user/model", report | {"departures": ["guidance_scale is 1.0"]})
    sys.stdout.write(address + "\n")

    # A repository without a card, a tokenizer's metrics, a data set on the Hub.
    HfApi().create_repo("user/bare")
    reference = {"kind": "hub", "name": "user/owls", "split": "test"}
    report = make_report(folder, {"psnr": 25.0, "rfid": 0.9, "usage": 0.75}, preset=None) | {"reference": reference}
    push_metrics("user/bare", report)
    try:
        push_metrics("user/bare", report | {"metrics": {"usage_0": 0.5, "fid": float("inf")}})
    except ValueError as error:
        sys.stdout.write(f"{error}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
