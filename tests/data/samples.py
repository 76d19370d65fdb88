# SPDX-License-Identifier: Apache-2.0
"""Tiny data sets of every kind, whose images say which row they are."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from hf_var.data import AugmentConfig, DataConfig


@dataclass(kw_only=True)
class Arguments(AugmentConfig, DataConfig):
    """All that a script knows of data."""

    seed: int = 0


def make_arguments(**values) -> Arguments:
    defaults = {"train_data": "", "train_batch_size": 4, "resize_ratio": 1.0}
    return Arguments(**(defaults | values))


def numbered_image(number: int) -> Image.Image:
    """8x8 gray pixels: the upper rows are `number`, the lower ones tell left from right."""
    pixels = np.full((8, 8), number, dtype=np.uint8)
    pixels[4:] = 16 * np.arange(8)
    return Image.fromarray(pixels)


def numbers_in(batch: dict[str, torch.Tensor]) -> list[int]:
    """The numbers of a batch of numbered images."""
    return (batch["pixel_values"][:, 0, 0, 3] * 127.5 + 127.5).round().int().tolist()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def broken_bytes() -> list[bytes]:
    """A truncated JPEG, a text, a PNG with a damaged middle, and nothing at all."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise)
    return [jpeg[: len(jpeg) // 2], b"no image", png[:60] + bytes(60) + png[120:], b""]


def image_rows_of(contents: list[bytes | None]) -> datasets.Dataset:
    """A data set of files' contents with labels."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    images = [None if content is None else {"bytes": content, "path": None} for content in contents]
    labels = [index % 3 for index in range(len(contents))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def numbered_contents(number: int) -> list[bytes]:
    return [encoded(numbered_image(index)) for index in range(number)]


def write_parquet(folder: Path, contents: list[bytes], shards: int, row_group_size: int = 3) -> str:
    """Parquet files with several row groups each. Returns the glob."""
    dataset = image_rows_of(contents)
    for shard in range(shards):
        part = dataset.shard(shards, shard, contiguous=True)
        part.to_parquet(folder / f"{shard}.parquet", batch_size=row_group_size)
    return str(folder / "*.parquet")


def write_webdataset(folder: Path, contents: list[bytes], shards: int) -> str:
    """Tar files. Returns the glob."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(shard, len(contents), shards):
                for suffix, content in (("png", contents[index]), ("cls", str(index % 3).encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")


def write_folder(folder: Path, contents: list[bytes]) -> str:
    """A folder with three class folders. Returns its name."""
    for index, content in enumerate(contents):
        (folder / "abc"[index % 3]).mkdir(exist_ok=True)
        (folder / "abc"[index % 3] / f"{index:04d}.png").write_bytes(content)
    return str(folder)
