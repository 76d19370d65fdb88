# SPDX-License-Identifier: Apache-2.0
"""
Write the handwritten digits of scikit-learn (Alpaydin and Kaynak 1998, 1,797 images of 8x8 pixels) as parquet files.

No download is needed: the images come with scikit-learn. They are split at random, but always alike, into two halves with
equally many of each digit: `train.parquet` and `test.parquet`, with an image, a label and a caption in every row, "a thin three",
"a three" or "a bold three" by its ink among the digits of its class.

    python examples/prepare_digits.py data/digits
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def describe(pixels: np.ndarray, labels: np.ndarray) -> list[str]:
    """Captions of digits, a third of each class thin and a third bold."""
    ink = pixels.mean(axis=(1, 2))
    thirds = np.stack([np.quantile(ink[labels == label], (1 / 3, 2 / 3)) for label in range(len(NAMES))])
    words = np.array(["thin ", "", "bold "])[(ink[:, None] > thirds[labels]).sum(axis=1)]
    return [
        f"a {word}{NAMES[label]}".replace("a eight", "an eight") for word, label in zip(words, labels, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes scikit-learn's handwritten digits as parquet files.")
    parser.add_argument("output_dir", type=Path, help="folder for train.parquet and test.parquet")
    args = parser.parse_args(argv)

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0 to 16 in the original
    captions = np.array(describe(pixels, digits.target))
    numbers = train_test_split(np.arange(len(pixels)), test_size=0.5, random_state=0, stratify=digits.target)
    classes = ClassLabel(names=[str(digit) for digit in range(len(NAMES))])
    features = Features({"image": Image(), "label": classes, "caption": Value("string")})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, chosen in zip(("train", "test"), numbers, strict=True):
        rows = {"image": [PILImage.fromarray(image) for image in pixels[chosen]]}
        rows |= {"label": digits.target[chosen].tolist(), "caption": captions[chosen].tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(args.output_dir / f"{split}.parquet")


if __name__ == "__main__":
    main()
