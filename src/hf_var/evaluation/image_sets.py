# SPDX-License-Identifier: Apache-2.0
"""Sets of existing images, read batch by batch; raises an error that names any missing or damaged image."""

import hashlib
import os
import shutil
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch

from .. import data
from ..data.folders import ImageFolder
from ..data.sources import features_of
from ..files import unfinished
from ..hub.names import is_hub_name, without_folders


IMAGES_KEY = "arr_0"
# Mean and covariance of the pool features, and of the spatial ones.
STATISTICS_KEYS = (("mu", "sigma"), ("mu_s", "sigma_s"))
DECODING_THREADS = 4
# What zipfile, zlib and numpy raise for files that are damaged, truncated or of another type.
DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class ImageSet(ABC):
    """
    Images in a fixed order, all of one size; a file of statistics alone has no image and no size. `statistics` are
    `mu` `(features,)` and `sigma` `(features, features)` of the pool features, `mu_s` and `sigma_s` of the spatial
    ones, in double precision. The `description` for the report names no folder.
    """

    num_images: int
    image_size: tuple[int, int] | None
    statistics: dict[str, np.ndarray]
    description: dict[str, Any]

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Make the images readable, with temporary files in `folder`, which all processes share, if need be."""

    @abstractmethod
    def read(self, numbers: range) -> torch.Tensor:
        """Consecutive images, a `torch.ByteTensor` of shape `(len(numbers), 3, height, width)`."""


def open_image_set(
    argument: str,
    source: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    image_size: tuple[int, int] | None = None,
    interpolation: str = "lanczos",
) -> ImageSet:
    """
    Open the images that an argument of an evaluation names: an `.npz` file as the evaluator of OpenAI's
    guided-diffusion reads it, with images as `arr_0`, bytes `(images, height, width, 3)`, or statistics as `mu` and
    `sigma`, or both; or else a data set of [`load_source`]. Images of a data set are resized to cover `image_size` and
    cut in the middle; those of an `.npz` file must have this size.
    """
    if source.endswith(".npz"):
        if split is not None or image_column is not None:
            raise ValueError(f"`{argument}` = {source!r} is an npz file, which has neither splits nor columns.")
        return ArchiveImages(argument, source, image_size)
    return DatasetImages(argument, source, split, image_column, image_size, interpolation)


# --------------------------------------------------------------------------------------------------------------------
# Files of arrays


class ArchiveImages(ImageSet):
    """Images, or statistics of images, in an `.npz` file: see [`open_image_set`]."""

    def __init__(self, argument: str, source: str, image_size: tuple[int, int] | None):
        self.name = f"`{argument}` = {source!r}"
        self.path = Path(source).expanduser()
        if not self.path.is_file():
            raise ValueError(f"{self.name} is not a file.")
        with self._sound(), zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
        keys = [member.filename.removesuffix(".npy") for member in members]
        self.statistics = self._read_statistics(keys)
        self.num_images, self.image_size = self._check_images() if IMAGES_KEY in keys else (0, None)
        if not self.num_images and not self.statistics:
            raise ValueError(f"{self.name} must hold images as {IMAGES_KEY!r} or 'mu' and 'sigma', has {keys}.")
        if image_size is not None and self.image_size not in (None, tuple(image_size)):
            raise ValueError(
                f"{self.name} must have images of {_text(image_size)} pixels, has {_text(self.image_size)}. Images of a file "
                "are used as they are."
            )
        # The archive's directory has a checksum of every array, so the arrays need not be read.
        directory = sorted((member.filename, member.CRC, member.file_size) for member in members)
        self.description = {
            "kind": "npz",
            "name": self.path.name,
            "num_images": self.num_images,
            "image_size": None if self.image_size is None else list(self.image_size),
            "statistics": list(self.statistics),
            "fingerprint": hashlib.sha256(repr(directory).encode()).hexdigest()[:16],
        }

    def prepare(self, folder: Path) -> None:
        """Extract the images, which checks them, since an array within an archive cannot be mapped into memory."""
        if self.num_images == 0:
            return
        path = folder / f"{self.description['fingerprint']}.npy"
        if not path.exists():
            # Overwrites the file of an interrupted run.
            place = unfinished(path)
            try:
                with self._sound(), zipfile.ZipFile(self.path) as archive:
                    os.replace(archive.extract(f"{IMAGES_KEY}.npy", place), path)
            finally:
                shutil.rmtree(place, ignore_errors=True)
        with self._sound():
            self._array = np.load(path, mmap_mode="r")  # (images, height, width, channels)

    def read(self, numbers: range) -> torch.Tensor:
        images = torch.from_numpy(np.array(self._array[numbers.start : numbers.stop])).movedim(-1, 1)
        return images.expand(-1, 3, -1, -1).contiguous()

    def _check_images(self) -> tuple[int, tuple[int, int]]:
        """Number and size of the images, from the array's header."""
        with self._sound(), zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES_KEY}.npy") as member:
            is_short = np.lib.format.read_magic(member) == (1, 0)
            formats = np.lib.format
            read_header = formats.read_array_header_1_0 if is_short else formats.read_array_header_2_0
            shape, is_fortran, dtype = read_header(member)
        wanted = f"{IMAGES_KEY!r} of {self.name} must be bytes (uint8) of shape (images, height, width, 3)"
        if dtype != np.uint8:
            hint = " Scale images of floats to 0...255 and round them first." if dtype.kind == "f" else ""
            raise ValueError(f"{wanted}, got {dtype}.{hint}")
        if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:] or is_fortran:
            raise ValueError(f"{wanted}, got {shape}{' in Fortran order' if is_fortran else ''}.")
        if shape[0] < 2:
            raise ValueError(f"{self.name} must have at least 2 images, has {shape[0]}.")
        return shape[0], (shape[1], shape[2])

    def _read_statistics(self, keys: list[str]) -> dict[str, np.ndarray]:
        statistics = {}
        for mean, covariance in STATISTICS_KEYS:
            for key in (key for key in (mean, covariance) if key in keys):
                with self._sound(), np.load(self.path) as archive:
                    array = archive[key]
                if array.dtype.kind != "f" or not np.isfinite(array).all():
                    raise ValueError(
                        f"{key!r} of {self.name} must hold finite floating point numbers, got {array.dtype}."
                    )
                statistics[key] = array.astype(np.float64)
            shapes = [statistics[key].shape if key in statistics else None for key in (mean, covariance)]
            if shapes == [None, None]:
                continue
            if shapes[0] is None or len(shapes[0]) != 1 or shapes[1] != 2 * shapes[0]:
                raise ValueError(
                    f"{self.name} must hold {mean!r} of shape (features,) and {covariance!r} of shape (features, features), "
                    f"has {shapes[0]} and {shapes[1]}."
                )
            difference = np.abs(statistics[covariance] - statistics[covariance].T).max()
            if difference > 1e-5 * np.abs(statistics[covariance]).max():
                raise ValueError(f"{covariance!r} of {self.name} must be symmetric, differs by up to {difference:g}.")
        return statistics

    @contextmanager
    def _sound(self) -> Iterator[None]:
        try:
            yield
        except DAMAGES as error:
            raise ValueError(
                f"{self.name} is damaged or no npz file: {type(error).__name__}: {error}. Copy or download it again."
            ) from error


# --------------------------------------------------------------------------------------------------------------------
# Data sets


class DatasetImages(ImageSet):
    """Images of a data set: see [`open_image_set`]."""

    def __init__(
        self,
        argument: str,
        source: str,
        split: str | None,
        image_column: str | None,
        image_size: tuple[int, int] | None,
        interpolation: str,
    ):
        self.name = f"`{argument}` = {source!r}"
        dataset = cast(datasets.Dataset, data.load_source(argument, source, split, preferred_splits=["train"]))
        if split is None:
            self._check_completeness(source, len(dataset))
        self.statistics = {}
        self.num_images = len(dataset)
        if self.num_images < 2:
            raise ValueError(f"{self.name} must have at least 2 images, has {self.num_images}.")
        config = data.ReadingConfig(image_column=image_column, interpolation=interpolation, resize_ratio=1.0)
        self._images = data.OrderedImages(
            self.name, dataset, image_size, self._num_channels(dataset, image_column), config
        )
        self.image_size = self._images.image_size
        self.description = {
            "kind": "hub" if is_hub_name(source) else "files",
            "name": without_folders(source),
            "split": str(dataset.split),
            "num_images": self.num_images,
            "image_size": list(self.image_size),
            "resize": None if image_size is None else f"{interpolation}, centre cut",
            # A fingerprint of the data's origin, not of its contents: a copy elsewhere has another one.
            "fingerprint": dataset._fingerprint,
        }

    def prepare(self, folder: Path) -> None:
        pass

    def read(self, numbers: range) -> torch.Tensor:
        size = -(-len(numbers) // DECODING_THREADS)
        parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            images = torch.cat(list(pool.map(self._images.read, parts)))
        return images.expand(-1, 3, -1, -1).contiguous()

    def _num_channels(self, dataset: datasets.Dataset, image_column: str | None) -> int:
        column = data.find_image_column(dataset, image_column)
        feature = features_of(dataset)[column]
        if not isinstance(feature, datasets.Array3D):
            return 3
        if feature.dtype != "uint8" or feature.shape[0] not in (1, 3):
            raise ValueError(
                f"Column {column!r} of {self.name} must hold images, or bytes (uint8) of shape (3, height, width), got "
                f"{feature.dtype} of shape {feature.shape}."
            )
        return feature.shape[0]

    def _check_completeness(self, source: str, num_rows: int) -> None:
        """Raise a `ValueError` if a folder has other splits than the one that was read."""
        folder = Path(source).expanduser()
        # A data set's name on the Hub may be a folder here, too: then datasets takes the folder.
        found = len(ImageFolder(self.name, str(folder)).images) if folder.is_dir() else 0
        if found > num_rows:
            raise ValueError(
                f"{self.name} has {found} images, of which datasets reads {num_rows} where no split is chosen: it takes words "
                "such as train or test in the names of files and folders for splits. Choose one, or rename them."
            )


def _text(image_size: tuple[int, ...] | None) -> str:
    return "no" if image_size is None else f"{image_size[0]}x{image_size[1]}"
