# SPDX-License-Identifier: Apache-2.0
"""The digits: their halves, their yardstick and the checkpoint that ships with the package."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_var import DIGITS_CHECKPOINT, VARPipeline

from .conftest import load_script


quality = load_script("benchmarks/digits_quality.py")


def test_data_and_yardstick_use_the_same_halves(tmp_path: Path) -> None:
    load_script("examples/prepare_digits.py").main([str(tmp_path)])
    for split, (images, labels) in zip(("train", "test"), quality.load_halves(), strict=True):
        dataset = Dataset.from_parquet(str(tmp_path / f"{split}.parquet"))
        assert dataset["label"] == labels.tolist()
        pixels = np.stack([np.asarray(image) for image in dataset["image"]])
        assert np.array_equal(pixels, np.round(images * 255).astype(np.uint8))
        assert dataset.features["label"].names == [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def unseen_digits() -> tuple[np.ndarray, np.ndarray]:
    _, (images, labels) = quality.load_halves()
    return quality.enlarge(images), labels


def test_yardstick_of_real_digits(unseen_digits: tuple[np.ndarray, np.ndarray]) -> None:
    figures = quality.measure(*unseen_digits)
    assert figures["accuracy"] > 0.98
    assert figures["variance"] == pytest.approx(1)
    assert figures["copies"] == pytest.approx(0.05, abs=0.002)
    for name in ("frechet", "frechet_full", "frechet_all"):
        assert figures[name] == pytest.approx(0, abs=1e-6), name


def test_yardstick_sees_each_kind_of_failure(unseen_digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = unseen_digits
    (train_images, train_labels), _ = quality.load_halves()
    copied = quality.measure(quality.enlarge(train_images), train_labels)
    assert copied["copies"] == 1

    means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
    averaged = quality.measure(0.5 * images + 0.5 * means[labels], labels)
    assert averaged["variance"] == pytest.approx(0.25, abs=0.01)
    assert averaged["frechet"] > 0.3
    assert averaged["accuracy"] > 0.98

    mislabelled = quality.measure(images, (labels + 1) % 10)
    assert mislabelled["accuracy"] < 0.1
    assert mislabelled["frechet"] > 1


def test_frechet_distance_of_known_distributions() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(0, 1, (20_000, 3))
    second = generator.normal(2, 3, (20_000, 3))
    # |m - n|^2 + (s - t)^2 for each of three independent pixels
    for diagonal in (True, False):
        assert quality.frechet_distance(first, second, diagonal) == pytest.approx(3 * (4 + 4), rel=0.02)
    mixed = first @ np.array([[1, 0.9, 0], [0, 1, 0.9], [0, 0, 1]])
    assert quality.frechet_distance(first, mixed) > quality.frechet_distance(first, mixed, diagonal=True) + 0.1


def test_the_shipped_checkpoint_draws_good_and_varied_digits() -> None:
    pipeline = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    pipeline.set_progress_bar_config(disable=True)
    figures = quality.measure(*quality.draw(pipeline, samples_per_class=100, seed=0))
    assert figures["accuracy"] >= 0.98
    assert figures["variance"] >= 0.8
    assert figures["frechet"] <= 0.18
    assert figures["copies"] <= 0.05
