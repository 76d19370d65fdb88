# SPDX-License-Identifier: Apache-2.0
"""
A feature extractor for CIFAR-10 that needs no download: a small classifier, trained here.

    python benchmarks/cifar10_features.py --train_data "cifar10/train-*.parquet" --test_data "cifar10/test-*.parquet" \
        --output classifier.safetensors

takes some minutes. Then evaluate.py takes it in place of Inception:

    PYTHONPATH=benchmarks accelerate launch examples/evaluate.py --model outputs/var_cifar10 --num_images 10000 \
        --reference "cifar10/train-*.parquet" --feature_extractor cifar10_features:load \
        --feature_extractor_weights classifier.safetensors --output_dir outputs/evaluation

`features` are what its last layer reads, `spatial_features` two channels of the maps before they are averaged, `logits` the
ten classes'. Figures with it compare with each other and with nothing that is published.
"""

import argparse

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from hf_var import data


BATCH = 250
NUM_FEATURES = 128
SPATIAL_CHANNELS = 8


class Classifier(nn.Module):
    """Three convolutional stages of 32 to 128 channels, for images of any number of classes."""

    num_features = NUM_FEATURES

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, NUM_FEATURES):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        maps = self.layers(pixels)  # (batch, features, 4, 4)
        features = maps.mean(dim=(2, 3))
        spatial_features = maps[:, :SPATIAL_CHANNELS].flatten(1)
        return {"features": features, "spatial_features": spatial_features, "logits": self.head(features)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images)["features"]


def load(weights: str) -> Classifier:
    """The trained classifier, for `--feature_extractor`."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(weights))
    return classifier.to(memory_format=torch.channels_last)


def read_images(source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images `(number, 3, 32, 32)` and labels of parquet files."""
    rows = datasets.load_dataset("parquet", data_files=source, split="train")
    column = data.find_image_column(rows, None)
    images = np.stack([np.asarray(image.convert("RGB")) for image in rows[column]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"])


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    classifier = Classifier(int(labels.max()) + 1).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // 128)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128)[: len(images) // 128]:
            batch = images[chosen]
            flipped = torch.rand(len(batch)) < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = functional.cross_entropy(classifier.outputs(batch)["logits"].float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    guesses = torch.cat([classifier.outputs(part)["logits"].argmax(dim=1) for part in images.split(BATCH)])
    return (guesses == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--test_data", required=True)
    parser.add_argument("--output", required=True, help="file of weights to write")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    classifier = train(*read_images(args.train_data), args.epochs, args.seed)
    print(f"accuracy on the test images: {accuracy(classifier, *read_images(args.test_data)):.3f}")
    save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, args.output)


if __name__ == "__main__":
    main()
