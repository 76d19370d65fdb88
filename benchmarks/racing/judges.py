# SPDX-License-Identifier: Apache-2.0
"""
What samples are compared with, and by which features.

digits    The 8x8 pixels, to which samples of 16x16 are averaged, so nothing has to be trained; real digits are sent through
          the same (enlarged, averaged back). Reference is the half that trains no model. The classifier is the support
          vector machine of digits_quality.py.
cifar10   The 128 features of the small classifier of cifar10_features.py, which is also the judge of the classes. It is
          trained once per race, on the training images. Reference are the test images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10_features
import digits_quality
import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.svm import SVC

from hf_var.metrics.feature_extractors import extract_features, full_precision


BATCH = 250


@dataclass(frozen=True)
class Images:
    """Images `(number, channels, height, width)` as bytes, and their classes."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def balanced(self, number: int) -> "Images":
        """The first ones of each class, `number` together, or all if there are fewer."""
        per_class = number // int(self.labels.max() + 1)
        chosen = [(self.labels == label).nonzero()[:per_class, 0] for label in self.labels.unique()]
        indices = torch.cat(chosen)
        return Images(self.pixels[indices], self.labels[indices])


class DigitsJudge:
    """Judges handwritten digits of 16x16 pixels."""

    def __init__(self) -> None:
        (train, train_labels), (test, test_labels) = digits_quality.load_halves()
        self.train, self.test = _images(train, train_labels), _images(test, test_labels)
        self.machine = SVC(gamma=0.05).fit(test.reshape(len(test), -1), test_labels)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(number, 64)` of bytes `(number, 1, 16, 16)`."""
        reduced = digits_quality.reduce(pixels[:, 0].numpy().astype(np.float32) / 255)
        return torch.from_numpy(reduced).flatten(1)

    def classes(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the images show."""
        return torch.from_numpy(self.machine.predict(self.features(pixels).numpy()))


class Cifar10Judge:
    """Judges images of CIFAR-10."""

    def __init__(self, train_data: str, test_data: str, weights: str) -> None:
        self.train, self.test = (Images(*cifar10_features.read_images(source)) for source in (train_data, test_data))
        self.classifier = cifar10_features.load(weights).eval().requires_grad_(False)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(number, 128)`."""
        return self._outputs(pixels, "features")

    def classes(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the images show."""
        return self._outputs(pixels, "logits").argmax(dim=1)

    def _outputs(self, pixels: torch.Tensor, name: str) -> torch.Tensor:
        with full_precision("cpu"):
            return torch.cat([extract_features(self.classifier, part)[name] for part in pixels.split(BATCH)])


def _images(images: np.ndarray, labels: np.ndarray) -> Images:
    pixels = torch.from_numpy(digits_quality.enlarge(images) * 255).round().to(torch.uint8)
    return Images(pixels[:, None], torch.from_numpy(labels))


def train_classifier(train_data: str, test_data: str, weights: str, epochs: int) -> dict[str, float]:
    """Train the judge of CIFAR-10; returns its accuracy."""
    classifier = cifar10_features.train(*cifar10_features.read_images(train_data), epochs, seed=0)
    save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, weights)
    return {"accuracy": cifar10_features.accuracy(classifier, *cifar10_features.read_images(test_data))}


def make_judge(data: str, train_data: str, test_data: str, weights: Path) -> Any:
    """The judge of a data set."""
    return DigitsJudge() if data == "digits" else Cifar10Judge(train_data, test_data, str(weights))
