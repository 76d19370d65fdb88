# SPDX-License-Identifier: Apache-2.0
"""
How near a VAR of CIFAR-10 comes to real images, in the features of a small classifier of real images.

    python benchmarks/cifar10_quality.py outputs/var_cifar10 --train_data "cifar10/train-*.parquet" \
        --test_data "cifar10/test-*.parquet"

The classifier, three convolutional stages of 32 to 128 channels, is trained on the real training images first, which takes
some minutes; its features are what its last layer reads. `frechet` is the Fréchet distance of Gaussians fitted to the
features (torchmetrics) between the real training images and

- the real test images: what a perfect model would reach;
- the tokenizer's reconstructions of the test images: what a perfect transformer would reach;
- samples, equally many of each class;
- the test images with each pixel drawn from another image, as a scale of what is no image at all.

It is no FID and compares with no published figure. `accuracy` is the share of images that the classifier takes for their
own class.
"""

import argparse
import math

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance

from hf_var import VARPipeline, VQVAEModel
from hf_var.training import data


BATCH = 250
NUM_FEATURES = 128


class Classifier(nn.Module):
    """Class logits of uint8 images; `features` is what its last layer reads."""

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, NUM_FEATURES):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(NUM_FEATURES, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layers(pixels).float().mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)


def read_images(source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images `(number, 3, 32, 32)` and labels of parquet files."""
    rows = datasets.load_dataset("parquet", data_files=source, split="train")
    column = data.find_image_column(rows, None)
    images = np.stack([np.asarray(image.convert("RGB")) for image in rows[column]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"])


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    classifier = Classifier().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // 128)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128)[: len(images) // 128]:
            batch = images[chosen]
            flipped = torch.rand(len(batch)) < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
            loss = functional.cross_entropy(classifier.head(classifier.features(batch)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    guesses = torch.cat([classifier.head(classifier.features(part)).argmax(dim=1) for part in images.split(BATCH)])
    return (guesses == labels).float().mean().item()


@torch.no_grad()
def reconstruct(vqvae: VQVAEModel, images: torch.Tensor) -> torch.Tensor:
    parts = [vqvae(part.float().div(127.5).sub(1)).sample for part in images.split(BATCH)]
    return to_bytes(torch.cat(parts))


def to_bytes(sample: torch.Tensor) -> torch.Tensor:
    return sample.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def draw(pipeline: VARPipeline, labels: torch.Tensor, seed: int, **sampling) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.from_numpy(pipeline(part.tolist(), generator=generator, output_type="np", **sampling).images)
        for part in labels.split(BATCH)
    ]
    return torch.cat(parts).mul(255).round().to(torch.uint8).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline", help="folder of a VARPipeline")
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--test_data", required=True)
    parser.add_argument("--num_samples", type=int, default=10_000)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 2.5])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train_images, train_labels = read_images(args.train_data)
    test_images, test_labels = read_images(args.test_data)
    classifier = train_classifier(train_images, train_labels, args.epochs, args.seed)
    distance = FrechetInceptionDistance(feature=classifier, reset_real_features=False, normalize=False)
    for part in train_images.split(BATCH):
        distance.update(part, real=True)

    def report(name: str, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        distance.reset()
        for part in images.split(BATCH):
            distance.update(part, real=False)
        share = math.nan if labels is None else accuracy(classifier, images, labels)
        print(f"| {name} | {distance.compute().item():.2f} | {share:.3f} |", flush=True)

    print("| images | frechet | accuracy |\n|---|---|---|")
    report("real test images", test_images, test_labels)
    pipeline = VARPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    report("their reconstructions", reconstruct(pipeline.vqvae, test_images), test_labels)
    labels = torch.arange(args.num_samples) % 10
    for guidance_scale in args.guidance_scale:
        samples = draw(pipeline, labels, args.seed, guidance_scale=guidance_scale, top_k=0, top_p=1.0)
        report(f"samples, guidance {guidance_scale}, all codes", samples, labels)
    order = torch.rand(test_images.shape[0], 1, *test_images.shape[2:], generator=torch.Generator().manual_seed(1))
    mixed = test_images.gather(0, order.argsort(dim=0).expand_as(test_images))
    report("pixels of different test images", mixed, None)


if __name__ == "__main__":
    main()
