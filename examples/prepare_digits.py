# SPDX-License-Identifier: Apache-2.0
"""
Write the handwritten digits of scikit-learn (Alpaydin and Kaynak 1998, 1,797 images of 8x8 pixels) as parquet files.

No download is needed: the images come with scikit-learn. They are split at random, but always alike, into two halves with
equally many of each digit: `train.parquet` and `test.parquet`, with an image and a label in every row.

    python examples/prepare_digits.py data/digits
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes scikit-learn's handwritten digits as parquet files.")
    parser.add_argument("output_dir", type=Path, help="folder for train.parquet and test.parquet")
    args = parser.parse_args(argv)

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0 to 16 in the original
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        pixels, digits.target, test_size=0.5, random_state=0, stratify=digits.target
    )
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, images, labels in (("train", train_pixels, train_labels), ("test", test_pixels, test_labels)):
        rows = {"image": [PILImage.fromarray(image) for image in images], "label": labels.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(args.output_dir / f"{split}.parquet")


if __name__ == "__main__":
    main()
