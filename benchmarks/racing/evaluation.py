# SPDX-License-Identifier: Apache-2.0
"""The evaluation that is the same for all entrants."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from hf_var.metrics.generation import frechet_distance, moments, precision_recall
from hf_var.metrics.image_quality import ReconstructionMetrics
from hf_var.pipelines.image_grids import image_grid

from .entrants import Entrant
from .judges import Images, make_judge
from .samplers import Sampler, load_sampler


BATCH = 64
SINGLE_CALLS = 20
# Rows of the pictures, whose columns are the classes, and how many times they are enlarged.
PICTURE_ROWS, ENLARGED = 4, 3


@dataclass(frozen=True)
class Evaluation:
    """
    What all entrants are measured with.

    Args:
        data (`str`): Name of the data set.
        train_data (`str`): Parquet files of the training images.
        test_data (`str`): Parquet files of unseen images.
        classifier (`Path`): Weights of the judge, if it has any.
        num_samples (`int`): Images that are sampled.
        tested (`int`): Unseen images whose likelihood and reconstruction are measured.
        seed (`int`): Of the generator of all samples.
    """

    data: str
    train_data: str
    test_data: str
    classifier: Path
    num_samples: int
    tested: int
    seed: int = 0


def evaluate(settings: Evaluation, entrant: Entrant, folder: Path, picture: Path) -> dict[str, Any]:
    """Sample and measure a trained entrant, and save some samples as a picture."""
    judge, sampler = _judge(settings), load_sampler(entrant, folder)
    num_labels = int(judge.test.labels.max()) + 1
    labels = torch.arange(num_labels).repeat_interleave(settings.num_samples // num_labels)
    generator = torch.Generator().manual_seed(settings.seed)
    drawn, seconds = [], 0.0
    _draw(sampler, labels[:BATCH], torch.Generator().manual_seed(1))  # what a first call costs
    for part in labels.split(BATCH):
        images, spent = _draw(sampler, part, generator)
        drawn.append(images)
        seconds += spent
    samples = Images(torch.cat(drawn), labels)
    save_picture(samples, picture)
    singles = [_draw(sampler, labels[:1], generator)[1] for _ in range(SINGLE_CALLS)]
    first, second = sampler.num_parameters
    return {
        **measure(judge, samples, sampler.has_classes),
        **measure_codes(sampler, judge.test.balanced(settings.tested)),
        "tokens": sampler.tokens,
        "parameters_first": first,
        "parameters_second": second,
        "milliseconds_batch": 1000 * seconds / len(labels),
        "milliseconds_single": 1000 * statistics.median(singles),
    }


def evaluate_real(settings: Evaluation, picture: Path) -> dict[str, Any]:
    """Training images in place of samples."""
    judge = _judge(settings)
    images = judge.train.balanced(settings.num_samples)
    save_picture(images, picture)
    return measure(judge, images, has_classes=True)


def measure(judge: Any, samples: Images, has_classes: bool) -> dict[str, float | None]:
    """Compare images with the unseen ones."""
    found, known = judge.features(samples.pixels), judge.features(judge.test.pixels)
    precision, recall = precision_recall(found, known)
    right = judge.classes(samples.pixels) == samples.labels
    return {
        "recognised": right.float().mean().item() if has_classes else None,
        "frechet": frechet_distance(moments(found), moments(known)),
        "precision": precision,
        "recall": recall,
    }


@torch.no_grad()
def measure_codes(sampler: Sampler, images: Images) -> dict[str, float | None]:
    """Bits of the codes of unseen images, and how well they are reconstructed."""
    quality, bits = ReconstructionMetrics(), []
    for pixels, labels in zip(images.pixels.split(BATCH), images.labels.split(BATCH), strict=True):
        pixel_values = pixels.float() / 127.5 - 1
        quality.update(pixel_values, sampler.reconstruct(pixel_values).clamp(-1, 1))
        if sampler.bits is not None:
            bits.append(sampler.bits(pixel_values, labels.tolist()))
    return {"psnr": quality.compute()["psnr"], "bits": torch.cat(bits).mean().item() if bits else None}


def save_picture(samples: Images, path: Path) -> None:
    """The first samples of each class, a class per column."""
    first = [(samples.labels == label).nonzero()[:PICTURE_ROWS, 0] for label in samples.labels.unique()]
    rows = torch.stack(first, dim=1)  # (rows, classes)
    pixels = samples.pixels[rows.flatten()].permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(np.squeeze(image)) for image in pixels]
    grid = image_grid(images, columns=rows.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    ImageOps.scale(grid, ENLARGED, Image.Resampling.NEAREST).save(path)


def _judge(settings: Evaluation) -> Any:
    return make_judge(settings.data, settings.train_data, settings.test_data, settings.classifier)


def _draw(sampler: Sampler, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Images as bytes, and the core-seconds that they take."""
    start = time.process_time()
    images = sampler.images(labels.tolist(), generator)
    seconds = time.process_time() - start
    return (images * 255).round().clamp(0, 255).to(torch.uint8), seconds
