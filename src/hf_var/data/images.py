# SPDX-License-Identifier: Apache-2.0
"""From rows with encoded images or arrays to model inputs."""

import os
import random
from dataclasses import dataclass, replace
from typing import Any, cast

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ..autoencoders import TokenizerConfig
from ..image_decoding import (
    PIL_MODES,
    BrokenImageError,
    decode_class_map,
    decode_image,
    decode_picture,
    normalize_pixels,
)
from .conditions import Condition
from .config import INTERPOLATION_NAMES, AugmentConfig, ReadingConfig
from .rows import rows_of
from .sources import AnyDataset, check_column, features_of, find_image_column, holds_files


INTERPOLATIONS = {name: InterpolationMode(name) for name in INTERPOLATION_NAMES}
# Features that hold arrays in place of files.
ARRAYS = (datasets.Array2D, datasets.Array3D)
# An enlarged image of this many times the pixels of its cut is not made as a whole.
MOST_ENLARGED = 64


class ImageTransform:
    """
    How images become model inputs: enlarged or reduced until they cover `resize_ratio` times the size, and cut to it:
    at random places and with random distortions if they are augmented, in the middle otherwise. Maps of `num_classes`
    classes are treated likewise, with the same random numbers, but no id lies between others: theirs is that of the
    nearest pixel. What a distortion leaves open is of the brightness `augment_fill`, or of class 0.
    """

    def __init__(
        self,
        reading: ReadingConfig,
        augment: AugmentConfig | None,
        image_size: tuple[int, int],
        num_channels: int,
        num_classes: int | None = None,
    ):
        self.height, self.width = image_size
        self.num_channels = num_channels
        self.num_classes = num_classes
        self.is_random = augment is not None
        self.resize_ratio = reading.resize_ratio
        self.interpolation = (
            INTERPOLATIONS[reading.interpolation] if num_classes is None else InterpolationMode.NEAREST
        )
        self.flips, self.limits, self.fill = False, None, 0
        if augment is not None:
            self.fill = augment.augment_fill if num_classes is None else 0
            self.flips = augment.horizontal_flip
            # Largest rotation, shifts to the right and down, zoom, and shear in both directions.
            limits = (
                augment.augment_rotation,
                augment.augment_translation * self.width,
                augment.augment_translation * self.height,
                augment.augment_zoom,
                augment.augment_shear,
                augment.augment_shear,
            )
            self.limits = limits if any(limits) else None

    def __call__(self, image: Image.Image, generator: random.Random | None = None) -> torch.Tensor:
        """
        A `(channels, height, width)` tensor in `[-1, 1]`, or the ids `(height, width)` of a class map. `generator` is
        needed for augmentation.
        """
        if self.num_classes is not None:
            ids = stored_ids(decode_class_map(image, self.num_classes), self.num_classes)
            return torch.from_numpy(np.array(self.pixels(ids, generator))).long()
        pixels = self.pixels(decode_picture(image, self.num_channels), generator)
        return normalize_pixels(torch.from_numpy(np.array(pixels)))

    def pixels(self, image: Image.Image | torch.Tensor, generator: random.Random | None = None) -> np.ndarray:
        """
        The same as an array of bytes, for an image that has its channels already; for the ids of a class map,
        `(1, height, width)`, an array `(height, width)` of their type.
        """
        if self.num_classes is not None:
            image = cast(torch.Tensor, image)
            return self._cover_and_distort(image, (image.shape[1], image.shape[2]), generator)[0].numpy()
        if isinstance(image, torch.Tensor):
            return self._cover_and_distort(image, (image.shape[1], image.shape[2]), generator).numpy()
        pixels = np.asarray(self._cover_and_distort(image, (image.height, image.width), generator))
        return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]  # (channels, height, width)

    # torchvision's functions take images and tensors alike, but say so of tensors alone. Its own random transforms would
    # take their numbers from torch's global generator.
    def _cover_and_distort(self, image: Any, image_size: tuple[int, int], generator: random.Random | None) -> Any:
        size = (self.height, self.width)
        ratio = self.resize_ratio * max(side / image_side for side, image_side in zip(size, image_size, strict=True))
        # Rounding may cost a pixel, which the cut needs.
        covering = tuple(max(side, round(old * ratio)) for side, old in zip(size, image_size, strict=True))
        cut = [0, 0]
        if covering != size:
            spare = [whole - side for whole, side in zip(covering, size, strict=True)]
            cut = [_generator(generator).randrange(n + 1) if self.is_random else round(n / 2) for n in spare]
        if covering[0] * covering[1] > MOST_ENLARGED * self.height * self.width:
            image = self._resized_cut(image, image_size, covering, cut)
        else:
            if covering != image_size:
                image = transforms.resize(image, list(covering), self._interpolation(image), antialias=True)
            if covering != size:
                image = transforms.crop(image, cut[0], cut[1], self.height, self.width)
        if self.flips and _generator(generator).random() < 0.5:
            image = transforms.horizontal_flip(image)
        return image if self.limits is None else self._distort(image, _generator(generator), self.limits)

    def _resized_cut(self, image: Any, image_size: tuple[int, int], covering: tuple[int, ...], cut: list[int]) -> Any:
        """Resizes the part that is kept alone: of a strip of 1 x 10,000 pixels the whole would fill gigabytes."""
        if isinstance(image, torch.Tensor):
            channels = [Image.fromarray(channel) for channel in image.numpy()]
            resized = [np.array(self._resized_cut(channel, image_size, covering, cut)) for channel in channels]
            return torch.from_numpy(np.stack(resized)).to(image.dtype)
        top, left = (start * old / whole for start, old, whole in zip(cut, image_size, covering, strict=True))
        bottom = min(image.height, top + self.height * image.height / covering[0])
        right = min(image.width, left + self.width * image.width / covering[1])
        kind = Image.Resampling[self.interpolation.value.upper()]
        return image.resize((self.width, self.height), kind, box=(left, top, right, bottom))

    def _distort(self, image: Any, generator: random.Random, limits: tuple[float, ...]) -> Any:
        """torchvision's own `RandomAffine` shifts by whole pixels, which is all or nothing for small images."""
        angle, right, down, zoom, *shear = ((2 * generator.random() - 1) * limit for limit in limits)
        # torchvision turns and shears tensors by bilinear interpolation at best.
        is_tensor = isinstance(image, torch.Tensor)
        interpolation = InterpolationMode.BILINEAR if is_tensor else InterpolationMode.BICUBIC
        if self.num_classes is not None:
            interpolation = InterpolationMode.NEAREST
        # A number is right for any number of channels, whatever the stubs say.
        fill: Any = self.fill
        place = [right, down]
        return transforms.affine(image, angle, place, 1 + zoom, shear, interpolation=interpolation, fill=fill)

    def _interpolation(self, image: Image.Image | torch.Tensor) -> InterpolationMode:
        if isinstance(image, Image.Image) or self.interpolation == InterpolationMode.BILINEAR:
            return self.interpolation
        if self.num_classes is not None:
            # The centre of each pixel, as Pillow.
            return InterpolationMode.NEAREST_EXACT
        # torchvision resizes tensors in no better way.
        return InterpolationMode.BICUBIC


def stored_ids(ids: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Class ids `(height, width)` as `(1, height, width)`, small but in another type than bytes, which are pixels."""
    return ids[None].to(torch.int16 if num_classes <= 2**15 else torch.int32)


def _generator(generator: random.Random | None) -> random.Random:
    if generator is None:
        raise ValueError("`generator` is needed for a transform that augments.")
    return generator


# --------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class ImageRows:
    """
    Turns a row into `pixel_values` and, with a condition, `class_labels` or `class_embeds`. Pixels are bytes
    `(channels, height, width)`, of `num_classes` classes ids `(height, width)`, int16 or int32.
    """

    reading: ReadingConfig
    transform: ImageTransform | None
    column: str
    num_channels: int
    holds_arrays: bool
    condition: Condition | None
    num_classes: int | None = None

    @property
    def is_random(self) -> bool:
        return self.transform is not None and self.transform.is_random

    def prepare(self, dataset: AnyDataset) -> AnyDataset:
        """The columns that are needed, with images as they are stored."""
        dataset = dataset.select_columns([self.column] + ([self.condition.source_column] if self.condition else []))
        if isinstance(self.condition, ImageCondition):
            dataset = self.condition.prepare(dataset)
        if self.holds_arrays:
            return dataset.with_format("numpy")
        if isinstance(features_of(dataset)[self.column], datasets.Value):
            return dataset
        return dataset.cast_column(self.column, datasets.Image(decode=False))

    def __call__(self, row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
        """The item of a row."""
        if isinstance(self.condition, ImageCondition):
            # Both are cut and distorted in the same way.
            state = generator.getstate()
            condition = self.condition.read(row, generator)
            generator.setstate(state)
        else:
            condition = self.condition.read(row) if self.condition else {}
        image = self._decode(row[self.column])
        if self.transform is not None:
            pixels = self.transform.pixels(image, generator)
        elif self.num_classes is not None:
            pixels = cast(torch.Tensor, image)[0].numpy()
        else:
            pixels = (
                image.numpy() if isinstance(image, torch.Tensor) else decode_image(image, self.num_channels).numpy()
            )
        return {"pixel_values": pixels} | condition

    def _decode(self, value: Any) -> Image.Image | torch.Tensor:
        num_classes = self.num_classes
        if self.holds_arrays and num_classes is not None:
            array = torch.from_numpy(np.asarray(value).astype(np.int64))
            return stored_ids(decode_class_map(array, num_classes, name="an array in a map's place"), num_classes)
        if self.holds_arrays:
            array = torch.from_numpy(np.asarray(value).astype(np.uint8))
            return decode_image(array, self.num_channels, name="an array in an image's place")
        # As `datasets` stores images, or bare contents or paths.
        stored: dict[str, Any] = value if isinstance(value, dict) else {}
        content = value if isinstance(value, bytes) else stored.get("bytes")
        path = value if isinstance(value, str) else stored.get("path")
        if content is None and path is None:
            raise BrokenImageError("a row without an image")
        image: Any = content
        if content is None:
            image = path if os.path.exists(str(path)) else _remote_image(str(path))
        most = self.reading.max_image_pixels
        if num_classes is not None:
            return stored_ids(decode_class_map(image, num_classes, max_pixels=most, name=path), num_classes)
        value_range = self.reading.image_range
        return decode_picture(image, self.num_channels, value_range=value_range, max_pixels=most, name=path)


def _remote_image(path: str) -> Image.Image:
    """A file of a stream on the Hub, opened through `datasets`."""
    try:
        return datasets.Image().decode_example({"path": path, "bytes": None})
    except Exception as error:
        raise BrokenImageError(f"{path}: {type(error).__name__}: {error}") from error


@dataclass
class ImageCondition:
    """Another image, `condition_pixel_values`, as `rows` reads it, which becomes `size` tokens."""

    rows: ImageRows
    size: int

    @property
    def source_column(self) -> str:
        return self.rows.column

    def prepare(self, dataset: AnyDataset) -> AnyDataset:
        """Its column as it is stored, beside the others."""
        if isinstance(features_of(dataset)[self.rows.column], datasets.Image):
            return dataset.cast_column(self.rows.column, datasets.Image(decode=False))
        return dataset

    def read(self, row: dict[str, Any], generator: random.Random | None = None) -> dict[str, Any]:
        pixels = self.rows(row, random.Random(0) if generator is None else generator)["pixel_values"]
        return {"condition_pixel_values": pixels}


def image_rows(
    data: ReadingConfig,
    augment: AugmentConfig | None,
    dataset: AnyDataset,
    image_size: tuple[int, int] | None,
    in_channels: int,
    condition: Condition | None = None,
    num_classes: int | None = None,
) -> ImageRows:
    """
    How the rows of a data set of images become items. The images are files in any format that Pillow reads, as an
    `Image` feature or as bytes, or an `Array3D` feature of bytes `(channels, height, width)`. They keep their size if
    `image_size` is `None`, and are not changed at random if `augment` is. The condition is a [`Condition`] or the name
    of a column of labels below `num_labels`. With `num_classes` they are maps of that many classes instead, whose
    pixels are ids: see [`~hf_var.image_decoding.decode_class_map`] for files, and an `Array2D` feature of integers.
    """
    column = find_image_column(dataset, data.image_column)
    feature = features_of(dataset)[column]
    if num_classes is None:
        _check_images(data, column, feature, in_channels)
    else:
        _check_class_maps(data, column, feature)
    holds_arrays = isinstance(feature, ARRAYS)
    transform = None if image_size is None else ImageTransform(data, augment, image_size, in_channels, num_classes)
    return ImageRows(data, transform, column, in_channels, holds_arrays, condition, num_classes)


def _check_images(data: ReadingConfig, column: str, feature: Any, in_channels: int) -> None:
    """Raise a `ValueError` unless a column holds images that can have as many channels."""
    if isinstance(feature, datasets.Array3D):
        if feature.shape[0] != in_channels or feature.dtype != "uint8":
            raise ValueError(
                f"`image_column` = {column!r} must hold arrays of bytes of shape ({in_channels}, height, width), as "
                f"`in_channels` of the tokenizer is {in_channels}, got {feature.dtype} of shape {feature.shape}."
            )
        if data.image_range is not None:
            raise ValueError(
                f"`image_range` is for image files, but `image_column` = {column!r} holds arrays of bytes."
            )
    elif not holds_files(feature):
        raise ValueError(f"`image_column` = {column!r} must hold images or arrays of bytes, got {feature}.")
    elif in_channels not in PIL_MODES:
        raise ValueError(
            f"`in_channels` of the tokenizer must be one of {list(PIL_MODES)} for images, got {in_channels}. Other "
            "numbers need an `image_column` of arrays, `Array3D` of bytes."
        )


def _check_class_maps(data: ReadingConfig, column: str, feature: Any) -> None:
    """Raise a `ValueError` unless a column holds maps of class ids."""
    if data.image_range is not None:
        raise ValueError(f"`image_range` is for images, but the tokenizer reads class ids, got {data.image_range}.")
    if isinstance(feature, ARRAYS):
        is_map = isinstance(feature, datasets.Array2D) or feature.shape[0] == 1
        if not is_map or not feature.dtype.startswith(("int", "uint")):
            raise ValueError(
                f"`image_column` = {column!r} must hold integers of shape (height, width), as the tokenizer reads "
                f"class ids, got {feature.dtype} of shape {feature.shape}."
            )
    elif not holds_files(feature):
        raise ValueError(f"`image_column` = {column!r} must hold images or arrays of class ids, got {feature}.")


def image_condition(
    data: ReadingConfig, augment: AugmentConfig | None, dataset: AnyDataset, column: str, tokenizer: TokenizerConfig
) -> ImageCondition:
    """The condition that another column of images is, as a tokenizer with this configuration reads them."""
    check_column("condition_column", column, features_of(dataset))
    # The range is that of the images.
    reading = replace(data, image_column=column, image_range=None)
    num_classes = tokenizer.num_pixel_classes
    rows = image_rows(reading, augment, dataset, tokenizer.image_size, tokenizer.in_channels, num_classes=num_classes)
    return ImageCondition(rows, sum(tokenizer.scale_lengths))


class OrderedImages:
    """All images of a data set in their order, of one size, by default that of the first; broken images are errors."""

    def __init__(
        self,
        name: str,
        dataset: datasets.Dataset,
        image_size: tuple[int, int] | None,
        in_channels: int,
        data: ReadingConfig,
    ):
        self.name = name
        self._read_row = image_rows(data, None, dataset, image_size, in_channels)
        self._rows: Any = self._read_row.prepare(dataset)
        self.num_images = len(dataset)
        self.image_size = image_size or tuple(self._pixels(0, self._rows[0]).shape[1:])

    def read(self, rows: range) -> torch.Tensor:
        """The images of a range of rows, bytes `(rows, in_channels, height, width)`."""
        columns = rows_of(self._rows[rows.start : rows.stop])
        images = [self._pixels(number, row) for number, row in zip(rows, columns, strict=True)]
        for number, image in zip(rows, images, strict=True):
            if image.shape[1:] != self.image_size:
                found, expected = (f"{height}x{width}" for height, width in (image.shape[1:], self.image_size))
                raise ValueError(
                    f"Row {number} of {self.name} cannot be used: it has {found} pixels, the first image {expected}. "
                    "Images of several sizes have to be brought to one `image_size`."
                )
        return torch.from_numpy(np.ascontiguousarray(np.stack(images)))

    def _pixels(self, number: int, row: dict[str, Any]) -> np.ndarray:
        try:
            # No generator, because there is no augmentation.
            return self._read_row(row, random.Random(0))["pixel_values"]
        except BrokenImageError as error:
            raise ValueError(f"Row {number} of {self.name} cannot be used: {error}") from error
