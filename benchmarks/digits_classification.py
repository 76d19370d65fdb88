# SPDX-License-Identifier: Apache-2.0
"""
How many real digits a `VARPipeline` of digits classifies correctly, without having been trained to classify.

Each digit of the half of scikit-learn's handwritten digits that the models were not trained on is enlarged as in the
training and given to the class under which its codes are the likeliest (`hf_var.scoring.classify`, uniform prior).
`up to this scale` uses the log-likelihood of the scales up to this one alone, `this scale` that of one scale given the
coarser ones.

    python benchmarks/digits_classification.py
    python benchmarks/digits_classification.py outputs/var_digits --json outputs/classification.json
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from digits_quality import NUM_CLASSES, enlarge, load_halves

from hf_var import DIGITS_CHECKPOINT, VARPipeline
from hf_var.scoring import classify, log_likelihood


def measure(pipeline: VARPipeline, images: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracies on (n, 16, 16) images with pixels in [0, 1]."""
    begin = time.perf_counter()
    found = classify(pipeline, images[..., None])
    seconds = time.perf_counter() - begin
    codes = pipeline.encode_images(images[..., None])
    per_scale = torch.stack(
        [log_likelihood(pipeline, codes=codes, class_labels=label).per_scale for label in range(NUM_CLASSES)], dim=1
    )  # (n, classes, scales)
    expected = torch.from_numpy(labels)

    def accuracy(scores: torch.Tensor, chosen: torch.Tensor | slice = slice(None)) -> float:
        return (scores.argmax(dim=1) == expected)[chosen].float().mean().item()

    scales = range(per_scale.shape[-1])
    return {
        "images": len(images),
        "accuracy": accuracy(found.posterior),
        "by_class": [accuracy(found.posterior, expected == label) for label in range(NUM_CLASSES)],
        "this_scale": [accuracy(per_scale[..., scale]) for scale in scales],
        "up_to_this_scale": [accuracy(per_scale[..., : scale + 1].sum(dim=-1)) for scale in scales],
        "mean_log_likelihood": found.log_likelihood[torch.arange(len(expected)), expected].mean().item(),
        "images_per_second": len(images) / seconds,
    }


def percent(shares: list[float]) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Classifies real digits by the likelihoods of a VARPipeline folder.")
    parser.add_argument("pipeline", nargs="?", default=DIGITS_CHECKPOINT, help="folder (the embedded checkpoint)")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    args = parser.parse_args(argv)

    pipeline = VARPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    _, (images, labels) = load_halves()
    figures = measure(pipeline, enlarge(images), labels)

    print(f"accuracy on {figures['images']} real digits: {100 * figures['accuracy']:.2f} %")
    print(f"by class, %: {percent(figures['by_class'])}")
    print(f"this scale alone, %: {percent(figures['this_scale'])}")
    print(f"up to this scale, %: {percent(figures['up_to_this_scale'])}")
    print(f"log-likelihood under the true class: {figures['mean_log_likelihood']:.2f} nats")
    print(f"{figures['images_per_second']:.1f} images/s")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
