# SPDX-License-Identifier: Apache-2.0
"""Measures quality and variety of the digits that a pipeline samples.

The handwritten digits of scikit-learn are cut into two halves, those of `examples/prepare_digits.py`: the models are
trained on the first, and everything here is measured against the second. 1,000 digits, 100 of each class, are sampled at the
pipeline's default settings with generator seed 0. They have 16x16 pixels, which are averaged over 2x2 blocks to the 8x8 of
the originals. Resizing alone smooths a digit, so the real digits that samples are compared with are sent through the same:
enlarged to 16x16 (bicubic), averaged back to 8x8.

accuracy      share of samples in which a support vector machine (RBF kernel, gamma 0.05), fitted on the original 8x8 pixels
              of the second half, sees the digit that was asked for.
variance      for each class, the variance of every pixel over the samples, averaged over the 64 pixels, divided by the same
              number for the real digits of the second half; the mean of the ten ratios.
frechet       for each class, the Frechet distance between samples and real digits of the second half, where the 64 pixels
              are described by a normal distribution with a diagonal covariance (90 real digits of a class do not determine
              the 2,080 entries of a full one); the mean of the ten distances.
copies        share of samples whose nearest training digit is nearer than that of 95 % of the real digits of the second
              half (Euclidean distance over the 64 pixels): real, unseen digits score 5 % by definition.
frechet_full  as `frechet`, but with full covariances: has a high floor from the small number of digits per class.
frechet_all   Frechet distance with a full covariance between all samples and all real digits of the second half, whatever
              their class.

The row "real" shows the first half of the real digits in place of samples, except for `copies`, which is theirs by
construction. Several folders (say, three training seeds) are reported one by one and by their median:

    python benchmarks/digits_quality.py outputs/var_digits
    python benchmarks/digits_quality.py outputs/seed0 outputs/seed1 outputs/seed2 --json outputs/quality.json
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from hf_var.pipelines.base import load_pipeline


NUM_CLASSES = 10
RESOLUTION = 16
METRICS = ("accuracy", "variance", "frechet", "copies", "frechet_full", "frechet_all")


def load_halves():
    """Returns (training images, training labels), (test images, test labels); images are 8x8 with pixels in [0, 1]."""
    digits = load_digits()
    images = digits.images.astype(np.float32) / 16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.5, random_state=0, stratify=digits.target
    )
    return (train_images, train_labels), (test_images, test_labels)


def enlarge(images):
    """Enlarges (n, 8, 8) pixels in [0, 1] as the training scripts do: 8-bit, bicubic."""
    enlarged = [
        np.asarray(
            Image.fromarray(np.round(image * 255).astype(np.uint8)).resize((RESOLUTION, RESOLUTION), Image.BICUBIC)
        )
        for image in images
    ]
    return np.stack(enlarged).astype(np.float32) / 255  # (n, 16, 16)


def reduce(images):
    """Averages (n, 16, 16) pixels over 2x2 blocks."""
    return images.reshape(len(images), 8, 2, 8, 2).mean(axis=(2, 4))  # (n, 8, 8)


def frechet_distance(first, second, diagonal=False):
    """Frechet distance between normal distributions fitted to the rows of two (n, 64) arrays."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    mean_term = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    if diagonal:
        return float(mean_term + np.square(first.std(axis=0, ddof=1) - second.std(axis=0, ddof=1)).sum())
    first_covariance, second_covariance = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The trace of the product's root by symmetric matrices alone: the general root is unreliable where they are singular.
    values, vectors = np.linalg.eigh(first_covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second_covariance @ root).clip(min=0)).sum()
    return float(mean_term + np.trace(first_covariance) + np.trace(second_covariance) - 2 * cross)


def nearest_distances(images, references):
    """Euclidean distance of each row of `images` to its nearest row of `references`."""
    return (
        torch.cdist(torch.from_numpy(images).double(), torch.from_numpy(references).double()).min(dim=1).values.numpy()
    )


def measure(images, labels):
    """Measures (n, 16, 16) images with pixels in [0, 1] that were asked to show `labels`."""
    (train_images, _), (test_images, test_labels) = load_halves()
    judge = SVC(gamma=0.05).fit(test_images.reshape(-1, 64), test_labels)
    samples = reduce(images).reshape(-1, 64)
    train_real = reduce(enlarge(train_images)).reshape(-1, 64)
    test_real = reduce(enlarge(test_images)).reshape(-1, 64)

    ratios, distances, full_distances = [], [], []
    for label in range(NUM_CLASSES):
        drawn, real = samples[labels == label], test_real[test_labels == label]
        ratios.append(drawn.var(axis=0).mean() / real.var(axis=0).mean())
        distances.append(frechet_distance(drawn, real, diagonal=True))
        full_distances.append(frechet_distance(drawn, real))
    copy_distance = np.percentile(nearest_distances(test_real, train_real), 5)
    return {
        "accuracy": float((judge.predict(samples) == labels).mean()),
        "variance": float(np.mean(ratios)),
        "frechet": float(np.mean(distances)),
        "copies": float((nearest_distances(samples, train_real) < copy_distance).mean()),
        "frechet_full": float(np.mean(full_distances)),
        "frechet_all": frechet_distance(samples, test_real),
    }


def draw(pipeline, samples_per_class, seed):
    """Draws digits at the pipeline's default settings; returns (n, 16, 16) pixels in [0, 1] and their labels."""
    labels = np.repeat(np.arange(NUM_CLASSES), samples_per_class)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(class_labels=labels.tolist(), generator=generator, output_type="np").images
    return images.reshape(len(labels), RESOLUTION, RESOLUTION), labels


def format_row(name, figures):
    return f"| {name} | " + " | ".join(f"{figures[metric]:.3f}" for metric in METRICS) + " |"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measures the digits sampled by one or more pipelines.")
    parser.add_argument("pipelines", nargs="+", help="folders written by the scripts that train priors")
    parser.add_argument("--samples_per_class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator for the samples")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    args = parser.parse_args(argv)

    (train_images, train_labels), _ = load_halves()
    report = {"real": measure(enlarge(train_images), train_labels) | {"copies": 0.05}}
    for folder in args.pipelines:
        pipeline = load_pipeline(folder)
        pipeline.set_progress_bar_config(disable=True)
        report[folder] = measure(*draw(pipeline, args.samples_per_class, args.seed))
    report["median"] = {
        metric: statistics.median(report[folder][metric] for folder in args.pipelines) for metric in METRICS
    }

    print("| pipeline | " + " | ".join(METRICS) + " |")
    print("|---" * (len(METRICS) + 1) + "|")
    for name, figures in report.items():
        print(format_row(name, figures))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
