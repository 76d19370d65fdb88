# SPDX-License-Identifier: Apache-2.0
"""Features of numbered images, stored batch by batch in files that are written atomically."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import whole_file
from ..fingerprints import fingerprint
from ..metrics.feature_extractors import extract_features, full_precision, load_feature_extractor
from ..progress import progress_bar
from .image_files import missing_images, png_path, write_png


# Compressing a PNG takes a core as long as sampling an image takes an accelerator, or longer.
PNG_THREADS = min(8, os.cpu_count() or 1)


class FeatureFiles:
    """Features of a set of images, a file per batch, whoever makes it; another `origin` means other files."""

    def __init__(self, folder: Path, kind: str, num_images: int, batch_size: int, origin: Mapping[str, Any]):
        key = json.dumps([num_images, batch_size, origin], sort_keys=True)
        self.folder = folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self.kind = kind
        self.num_images = num_images
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of files."""
        return -(-self.num_images // self.batch_size)

    def range(self, index: int) -> range:
        """The numbers of the images of a file."""
        return range(self.num_images)[index * self.batch_size : (index + 1) * self.batch_size]

    def path(self, index: int) -> Path:
        """A file, which may not exist yet."""
        return self.folder / f"{index:06d}-of-{len(self):06d}.safetensors"

    def save(self, index: int, features: Mapping[str, torch.Tensor]) -> None:
        """Write a file: `(images, features)` by name."""
        path = self.path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as place:
            save_file({name: values.cpu().contiguous() for name, values in features.items()}, place)

    def load(self) -> dict[str, torch.Tensor]:
        """The features of all images, by name."""
        parts = []
        for index in range(len(self)):
            try:
                parts.append(load_file(self.path(index)))
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"The features in {str(self.path(index))!r} cannot be read ({error}). Delete the file and run the "
                    "command again; several processes need one folder."
                ) from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Batch(NamedTuple):
    """Images of a file, and whether their features are there already."""

    index: int
    numbers: range
    has_features: bool


class MeasuredBatch(NamedTuple):
    """The images of a batch, bytes `(batch, 3, height, width)`, and their features unless these are there."""

    batch: Batch
    images: torch.Tensor
    features: Mapping[str, torch.Tensor]


# Measures batches, in any order.
Engine = Callable[[Sequence[Batch]], Iterator[MeasuredBatch]]


def measure_here(
    read: Callable[[range], torch.Tensor], extractor: nn.Module, device: torch.device, batches: Sequence[Batch]
) -> Iterator[MeasuredBatch]:
    """The engine that works in this process, on images that `read` returns."""
    with full_precision(device.type):
        for batch in batches:
            images = read(batch.numbers)
            # One memory layout for sampled and for read images: the last bits of the features depend on it.
            features = {} if batch.has_features else extract_features(extractor, images.to(device).contiguous())
            yield MeasuredBatch(batch, images, features)


def write_features(
    files: FeatureFiles, engine: Engine, accelerator: Accelerator, image_folder: Path | None = None
) -> None:
    """Write missing features, and PNG files, of images that the `engine` measures; the processes share the batches."""
    missing = []
    for index in range(len(files)):
        batch = Batch(index, files.range(index), files.path(index).exists())
        # Features may be known although a PNG file was deleted.
        if not batch.has_features or (image_folder is not None and missing_images(image_folder, batch.numbers)):
            missing.append(batch)
    # All processes list what is missing before any of them writes.
    accelerator.wait_for_everyone()
    own = missing[accelerator.process_index :: accelerator.num_processes]
    bar = progress_bar(
        engine(own), total=len(own), is_shown=accelerator.is_main_process, desc=files.kind, unit="batch"
    )
    writes: list[Future] = []
    with ThreadPoolExecutor(PNG_THREADS) as pool:
        for batch, images, features in bar:
            # Of the batch before: files are written while the next batch is measured.
            for write in writes:
                write.result()
            writes = []
            if image_folder is not None:
                pixels, first = images.cpu().numpy(), batch.numbers.start
                writes = [
                    pool.submit(write_png, png_path(image_folder, number), pixels[number - first])
                    for number in missing_images(image_folder, batch.numbers)
                ]
            if features:
                files.save(batch.index, features)
        for write in writes:
            write.result()


def load_extractor(
    name: str, weights: str | None, image_size: tuple[int, int], device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The feature extractor, and what its features depend on, noise included, equal in all processes."""
    extractor = load_feature_extractor(name, weights).to(device)
    # The code of an extractor may change while its weights stay.
    noise = torch.randint(256, (2, 3, *image_size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with full_precision(device.type):
        found = extract_features(extractor, noise.to(device))
    digest = hashlib.sha256()
    for values in found.values():
        digest.update(values.cpu().numpy().tobytes())
    origin = {
        "name": name,
        "weights": fingerprint({}, extractor.state_dict()),
        "features_of_noise": digest.hexdigest()[:16],
        "widths": {feature: values.shape[1] for feature, values in found.items()},
    }
    # The main process's, in case others differ in the last bit.
    return extractor, broadcast_object_list([origin])[0]
