# SPDX-License-Identifier: Apache-2.0
"""Features of a numbered set of images in a folder of files, each of which is whole or missing."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.resumable_settings import UNFINISHED


class FeatureFiles:
    """
    The features of `num_images` images, `images_per_file` in a file.

    Args:
        folder (`Path`): Where the folder of these features is.
        kind (`str`): Beginning of its name.
        num_images (`int`): Images of the set.
        images_per_file (`int`): Images of a file; the last one may have fewer.
        origin (`dict[str, Any]`): What the features depend on; other values mean other files.
    """

    def __init__(self, folder: Path, kind: str, num_images: int, images_per_file: int, origin: Mapping[str, Any]):
        key = json.dumps([num_images, images_per_file, origin], sort_keys=True)
        self.folder = folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self.kind = kind
        self.num_images = num_images
        self.images_per_file = images_per_file

    def __len__(self) -> int:
        """Number of files."""
        return -(-self.num_images // self.images_per_file)

    def range(self, index: int) -> range:
        """The images of a file."""
        start = index * self.images_per_file
        return range(start, min(start + self.images_per_file, self.num_images))

    def path(self, index: int) -> Path:
        """A file, that may not be there yet."""
        return self.folder / f"{index:05d}-of-{len(self):05d}.safetensors"

    def save(self, index: int, features: Mapping[str, torch.Tensor]) -> None:
        """Write a file: `(images, features)` by name."""
        path = self.path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{UNFINISHED}{path.name}")
        save_file({name: values.contiguous() for name, values in features.items()}, unfinished)
        os.replace(unfinished, path)

    def load(self, *names: str) -> Iterator[dict[str, torch.Tensor]]:
        """
        The features of all images, file by file.

        Args:
            names (`str`): Which of the features.

        Raises:
            `ValueError`: If a file is missing or broken.
        """
        for index in range(len(self)):
            path = self.path(index)
            try:
                stored = load_file(path)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"The features in {str(path)!r} cannot be read ({error}). Delete the file and run the command again; "
                    "several processes need one folder."
                ) from error
            found = {name: stored[name] for name in names if name in stored}
            if any(len(values) != len(self.range(index)) for values in found.values()):
                raise ValueError(f"{str(path)!r} is not of {len(self.range(index))} images. Delete the file.")
            yield found
