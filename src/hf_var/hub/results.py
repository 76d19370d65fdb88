# SPDX-License-Identifier: Apache-2.0
"""Metrics in the metadata (`model-index`) of model cards, and their names there and in reports."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError

from .push import push_card


# In the order of reports. Metrics without a label are details, such as those of single scales: a report shows them by
# their names, and an evaluation does not publish them.
METRIC_LABELS = {
    "fid": "FID, lower is better",
    "sfid": "sFID, lower is better",
    "inception_score": "Inception Score, higher is better",
    "precision": "precision, higher is better",
    "recall": "recall, higher is better",
    "kid": "KID, lower is better",
    "rfid": "rFID, lower is better",
    "psnr": "PSNR in dB, higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "pixel_accuracy": "share of pixels of the right class, higher is better",
    "mean_iou": "mean intersection over union of the classes, higher is better",
    "kl": "KL divergence of the latents from the prior in nats per image",
    "active_dimensions": "active dimensions of the latents",
    "usage": "share of the codebook in use, higher is better",
    "loss": "cross-entropy in nats per token, lower is better",
    "bits_per_token": "cross-entropy in bits per token, lower is better",
    "accuracy": "share of tokens that are the likeliest ones, higher is better",
}


def metric_label(name: str) -> str:
    """Label of a metric, and which direction is better."""
    return METRIC_LABELS.get(name, name)


def metric_name(name: str) -> str:
    """Label of a metric."""
    return metric_label(name).split(",")[0]


def metric_results(
    metrics: Mapping[str, float],
    *,
    task: str,
    dataset: str | None,
    dataset_name: str,
    split: str | None,
    config: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[EvalResult]:
    """Finite metrics as the Hub has them; `config` is the protocol, and other `settings` are other measurements."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset or "images",
            dataset_name=dataset_name,
            dataset_split=split,
            metric_type=key,
            metric_name=metric_name(key),
            metric_value=value,
            metric_config=config,
            metric_args=cast(Any, settings),
        )
        for key, value in metrics.items()
        # The metadata are read as JSON, too, which has no infinity.
        if math.isfinite(value)
    ]


def push_results(repo_id: str, results: Sequence[EvalResult]) -> str:
    """Add results to a card, in place of those of the same metrics, data and settings; returns the commit."""
    name = repo_id.split("/")[-1]
    try:
        card = ModelCard.load(repo_id)
    except RemoteEntryNotFoundError:
        card = ModelCard(f"---\nlibrary_name: hf_var\n---\n\n# {name}\n")
    contents = cast(Any, card.data)
    known = contents.eval_results or []
    others = [result for result in known if not any(result.is_equal_except_value(new) for new in results)]
    contents.eval_results = others + list(results)
    contents.model_name = contents.model_name or name
    return push_card(card, repo_id, "Add the metrics of an evaluation")
