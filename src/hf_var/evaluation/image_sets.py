# SPDX-License-Identifier: Apache-2.0
"""Sets of images that others are compared with, read piece by piece and never in part without a word."""

import hashlib
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import datasets
import numpy as np
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .. import data
from ..data.sources import features_of
from ..hub.names import is_hub_name, without_folders


IMAGES_KEY = "arr_0"
# Mean and covariance of the pool features, and of the spatial ones.
STATISTICS_KEYS = ("mu", "sigma", "mu_s", "sigma_s")
CHUNK_SIZE = 2**20
# What zipfile, zlib and numpy raise when a file is damaged, cut off, or something else altogether.
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
    Images in a fixed order, all of one size: see [`open_image_set`].

    Attributes:
        num_images (`int`): Number of images; 0 for a file of statistics alone.
        image_size (`tuple[int, int]`, *optional*): Height and width, `None` for a file of statistics alone.
        statistics (`dict[str, np.ndarray]`):
            What the file stores besides, in double precision: `mu` `(features,)` and `sigma` `(features, features)` of the
            pool features, `mu_s` and `sigma_s` of the spatial ones.
        description (`dict[str, Any]`): What it is, for a report. Holds no folder's name.
    """

    num_images: int
    image_size: tuple[int, int] | None
    statistics: dict[str, np.ndarray]
    description: dict[str, Any]

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[torch.ByteTensor]:
        """
        Images in pieces, of which two are in memory at a time.

        The file's checksum is known to be right, and every image to be readable, when the iterator has ended.

        Args:
            ranges (`Iterable[tuple[int, int]]`): First image and the one after the last, of each piece, increasing.

        Yields:
            `torch.ByteTensor`: The images of a range, `(stop - start, 3, height, width)`.

        Raises:
            `ValueError`: If an image cannot be read, or if the ranges overlap or reach beyond the last image.
        """
        checked = self._checked(ranges)
        # Nothing is to be opened where there are no images, but ranges are wrong there, too.
        return self._read(checked) if self.num_images > 0 else iter(cast(Any, checked))

    @abstractmethod
    def _read(self, ranges: Iterator[tuple[int, int]]) -> Iterator[torch.ByteTensor]: ...

    def _checked(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        position = 0
        for start, stop in ranges:
            if not position <= start < stop <= self.num_images:
                raise ValueError(
                    f"`ranges` must increase and end at {self.num_images} at most, got ({start}, {stop}) after {position}."
                )
            yield start, stop
            position = stop


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
    Open the images that an argument of an evaluation names.

    Args:
        argument (`str`): Name of the argument, for messages.
        source (`str`):
            An `.npz` file as the evaluator of OpenAI's guided-diffusion reads it, with images as `arr_0`, bytes of shape
            `(images, height, width, 3)`, or statistics as `mu` and `sigma`, or both; or else a Hub data set, a folder of
            images, or a glob of parquet or tar files. The files of a folder are sorted by path.
        split (`str`, *optional*): Split of a data set. `None`: `train`, or the only one.
        image_column (`str`, *optional*): Column of a data set. `None`: the only one with images.
        image_size (`tuple[int, int]`, *optional*):
            Height and width to which images of a data set are resized, so that they cover it, and cut, in the middle.
            `None`: they stay as they are. An `.npz` file must have this size already.
        interpolation (`str`, *optional*, defaults to `"lanczos"`): How they are resized.

    Returns:
        [`ImageSet`]: The images.

    Raises:
        `ValueError`:
            If there is no such thing, if it is damaged, has fewer than two images or images of several sizes, or if not all
            images of a folder are part of it.
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
            raise ValueError(f"{self.name} is no file.")
        self.num_images, self.image_size, self._channels = 0, None, 3
        with self._sound(), zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
        keys = [member.filename.removesuffix(".npy") for member in members]
        self.statistics = {key: self._read_statistics(key) for key in STATISTICS_KEYS if key in keys}
        self._check_statistics()
        if IMAGES_KEY in keys:
            self._open_images()
        elif not self.statistics:
            raise ValueError(f"{self.name} must hold images as {IMAGES_KEY!r} or 'mu' and 'sigma', has {keys}.")
        if image_size is not None and self.image_size not in (None, tuple(image_size)):
            raise ValueError(
                f"{self.name} must have images of {_text(image_size)} pixels, has {_text(self.image_size)}. Images of a file "
                "are used as they are."
            )
        # Its directory has the checksum of every array, so that nothing else needs to be read.
        directory = sorted((member.filename, member.CRC, member.file_size) for member in members)
        self.description = {
            "kind": "npz",
            "name": self.path.name,
            "num_images": self.num_images,
            "image_size": None if self.image_size is None else list(self.image_size),
            "statistics": list(self.statistics),
            "fingerprint": hashlib.sha256(repr(directory).encode()).hexdigest()[:16],
        }

    def _read(self, ranges: Iterator[tuple[int, int]]) -> Iterator[torch.ByteTensor]:
        height, width = self.image_size or (0, 0)
        bytes_per_image = height * width * self._channels
        position = 0
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES_KEY}.npy") as member:
            with self._sound():
                _read_header(member)
            for start, stop in ranges:
                pixels = np.empty((stop - start, height, width, self._channels), dtype=np.uint8)
                with self._sound():
                    _skip(member, (start - position) * bytes_per_image)
                    _fill(member, memoryview(cast(Any, pixels)).cast("B"))
                position = stop
                images = torch.from_numpy(pixels).movedim(-1, 1)  # (stop - start, channels, height, width)
                yield cast(torch.ByteTensor, images.expand(-1, 3, -1, -1).contiguous())
            # The checksum is looked at behind the last byte only.
            with self._sound():
                _skip(member, (self.num_images - position) * bytes_per_image)

    def _open_images(self) -> None:
        with self._sound(), zipfile.ZipFile(self.path) as archive:
            size = archive.getinfo(f"{IMAGES_KEY}.npy").file_size
            with archive.open(f"{IMAGES_KEY}.npy") as member:
                shape, is_fortran, dtype = _read_header(member)
                size -= member.tell()
        wanted = f"{IMAGES_KEY!r} of {self.name} must be bytes (uint8) of shape (images, height, width, 3)"
        if dtype != np.uint8:
            hint = " Images of floats are to be brought to 0...255 and rounded first." if dtype.kind == "f" else ""
            raise ValueError(f"{wanted}, got {dtype}.{hint}")
        if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:] or is_fortran:
            raise ValueError(f"{wanted}, got {shape}{' in Fortran order' if is_fortran else ''}.")
        if shape[0] < 2:
            raise ValueError(f"{self.name} must have at least 2 images, has {shape[0]}.")
        if size != np.prod(shape, dtype=np.int64):
            raise ValueError(f"{wanted}, but {size} bytes are no array of shape {shape}.")
        self.num_images, height, width, self._channels = shape
        self.image_size = (height, width)

    def _read_statistics(self, key: str) -> np.ndarray:
        with self._sound(), zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"{key!r} of {self.name} must hold finite floating point numbers, got {array.dtype}.")
        return array.astype(np.float64)

    def _check_statistics(self) -> None:
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            shapes = [self.statistics[key].shape if key in self.statistics else None for key in (mean, covariance)]
            is_pair = shapes[0] is not None and len(shapes[0]) == 1 and shapes[1] == 2 * shapes[0]
            if shapes != [None, None] and not is_pair:
                raise ValueError(
                    f"{self.name} must hold {mean!r} of shape (features,) and {covariance!r} of shape (features, features), "
                    f"has {shapes[0]} and {shapes[1]}."
                )

    @contextmanager
    def _sound(self) -> Iterator[None]:
        try:
            yield
        except DAMAGES as error:
            raise ValueError(
                f"{self.name} is damaged or no npz file: {type(error).__name__}: {error}. Copy or download it again."
            ) from error


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    # Version 3 differs in the names of records' fields alone, which images have not.
    return np.lib.format.read_array_header_2_0(member)


def _skip(member: IO[bytes], size: int) -> None:
    buffer = memoryview(bytearray(min(size, CHUNK_SIZE)))
    for start in range(0, size, CHUNK_SIZE):
        _fill(member, buffer[: size - start])


def _fill(member: IO[bytes], buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        # Whole batches at once would be in memory twice.
        part = member.read(min(len(buffer) - filled, CHUNK_SIZE))
        if not part:
            raise EOFError("the file ends within an image")
        buffer[filled : filled + len(part)] = part
        filled += len(part)


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
        num_channels = self._num_channels(dataset, image_column)
        self._images = data.OrderedImages(self.name, dataset, image_size, num_channels, config)
        self.image_size = self._images.image_size
        self.description = {
            "kind": "hub" if is_hub_name(source) else "files",
            "name": without_folders(source),
            "split": str(dataset.split),
            "num_images": self.num_images,
            "image_size": list(self.image_size),
            "resize": None if image_size is None else f"{interpolation}, centre cut",
            # Of where the data came from, not of its contents: a copy elsewhere has another one.
            "fingerprint": dataset._fingerprint,
        }

    def _read(self, ranges: Iterator[tuple[int, int]]) -> Iterator[torch.ByteTensor]:
        for images in self._images.read(range(*ends) for ends in ranges):
            yield cast(torch.ByteTensor, images.expand(-1, 3, -1, -1).contiguous())  # (batch, 3, height, width)

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
        """From words such as `test` in files' names `datasets` infers splits, and leaves all other files out."""
        folder = Path(source).expanduser()
        # What Hub data sets are called may be a folder here, too: then datasets takes the folder.
        paths = folder.rglob("*") if folder.is_dir() else ()
        visible = [path for path in paths if not _is_hidden(path.relative_to(folder))]
        found = sum(path.suffix.lower() in ImageFolder.EXTENSIONS for path in visible)
        if found > num_rows:
            raise ValueError(
                f"{self.name} has {found} images, of which datasets reads {num_rows} where no split is chosen: it takes words "
                "such as train or test in the names of files and folders for splits. Choose one, or rename them."
            )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _text(image_size: tuple[int, int] | None) -> str:
    return "no" if image_size is None else f"{image_size[0]}x{image_size[1]}"
