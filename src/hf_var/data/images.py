# SPDX-License-Identifier: Apache-2.0
"""Encoded images, or arrays in their place, to tensors."""

import random
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from .config import ImageArguments
from .rows import BrokenImageError, read_label, scale_pixels
from .sources import AnyDataset, features_of, find_image_column


INTERPOLATIONS = {
    mode.value: mode
    for mode in InterpolationMode
    if mode not in (InterpolationMode.NEAREST, InterpolationMode.NEAREST_EXACT)
}
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


# --------------------------------------------------------------------------------------------------------------------
# Decoding


def decode_image(value: Any, num_channels: int) -> Image.Image:
    """
    Decode an image as `datasets` stores it, turn it the way that its EXIF data say, and give it `num_channels` channels.

    Raises:
        [`BrokenImageError`]: If it cannot be read.
    """
    try:
        image = datasets.Image().decode_example(value)
        if image is None:
            raise ValueError("the row has no image")
        return with_channels(image, num_channels)
    # Damaged files make Pillow raise almost anything: OSError, SyntaxError, struct.error, zlib.error, its own errors.
    except Exception as error:
        name = value.get("path") if isinstance(value, dict) else None
        raise BrokenImageError(f"{name or 'an image without a name'}: {type(error).__name__}: {error}") from error


def with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    """
    The image as gray (1), gray with transparency (2), colour (3) or colour with transparency (4), 8 bits each. Where the
    result has no transparency, what is transparent turns white.
    """
    mode = PIL_MODES[num_channels]
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow itself would cut off what is brighter than 255 of 65535.
        levels = np.asarray(image).clip(0, 65535)
        image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels that are floating point numbers have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if num_channels in (1, 3):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)


def decode_array(value: Any, num_channels: int) -> torch.Tensor:
    """
    An array in an image's place as a tensor of bytes of shape `(channels, height, width)`.

    Raises:
        [`BrokenImageError`]: If it has another shape.
    """
    array = np.asarray(value)
    if array.ndim != 3 or array.shape[0] != num_channels or array.size == 0:
        raise BrokenImageError(f"an array of shape {array.shape} instead of ({num_channels}, height, width)")
    return torch.from_numpy(array.astype(np.uint8))


# --------------------------------------------------------------------------------------------------------------------
# Resizing, cutting, distorting


class ImageTransform:
    """
    How images become model inputs: enlarged or reduced until they cover `resize_ratio` times the size, and cut to it: at
    random places and with random distortions if `augment`, in the middle otherwise.

    Args:
        args ([`ImageArguments`]): `interpolation`, `resize_ratio`, `horizontal_flip` and `augment_*`.
        image_size (`tuple[int, int]`): Height and width.
        num_channels (`int`): Channels of images; arrays bring their own.
        augment (`bool`): Whether this is training.

    Raises:
        `ValueError`: If `args` ask for something that cannot be.
    """

    def __init__(self, args: ImageArguments, image_size: tuple[int, int], num_channels: int, augment: bool):
        if args.interpolation not in INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {list(INTERPOLATIONS)}, got {args.interpolation!r}.")
        if args.resize_ratio < 1:
            raise ValueError(f"`resize_ratio` must be at least 1, got {args.resize_ratio}.")
        self.height, self.width = image_size
        self.num_channels = num_channels
        self.augment = augment
        self.resize_ratio = args.resize_ratio
        self.interpolation = INTERPOLATIONS[args.interpolation]
        self.flips = augment and args.horizontal_flip
        # Largest rotation, shifts to the right and down, zoom, and shear in both directions.
        limits = (
            args.augment_rotation,
            args.augment_translation * self.width,
            args.augment_translation * self.height,
            args.augment_zoom,
            args.augment_shear,
            args.augment_shear,
        )
        self.limits = limits if augment and any(limits) else None

    def __call__(self, image: Image.Image, generator: random.Random | None = None) -> torch.Tensor:
        """A `(channels, height, width)` tensor in `[-1, 1]`. `generator` is needed if `augment`."""
        pixels = self.pixels(with_channels(image, self.num_channels), generator)
        return scale_pixels(torch.from_numpy(np.array(pixels)))

    def pixels(self, image: Image.Image | torch.Tensor, generator: random.Random | None = None) -> np.ndarray:
        """The same as an array of bytes, for an image that has its channels already."""
        if isinstance(image, torch.Tensor):
            return self._cover_and_distort(image, image.shape[1], image.shape[2], generator).numpy()
        pixels = np.asarray(self._cover_and_distort(image, image.height, image.width, generator))
        return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]  # (channels, height, width)

    # torchvision's functions take images and tensors alike, but say so of tensors alone.
    def _cover_and_distort(
        self, image: Any, image_height: int, image_width: int, generator: random.Random | None
    ) -> Any:
        height, width = self.height, self.width
        ratio = self.resize_ratio * max(height / image_height, width / image_width)
        # Rounding may cost a pixel, which the cut needs.
        covering = (max(height, round(image_height * ratio)), max(width, round(image_width * ratio)))
        if covering != (image_height, image_width):
            image = transforms.resize(image, list(covering), self._interpolation(image), antialias=True)
        if covering != (height, width):
            spare = covering[0] - height, covering[1] - width
            if self.augment:
                top, left = (_generator(generator).randrange(pixels + 1) for pixels in spare)
            else:
                top, left = (round(pixels / 2) for pixels in spare)
            image = transforms.crop(image, top, left, height, width)
        if self.flips and _generator(generator).random() < 0.5:
            image = transforms.horizontal_flip(image)
        return image if self.limits is None else self._distort(image, _generator(generator), self.limits)

    def _distort(self, image: Any, generator: random.Random, limits: tuple[float, ...]) -> Any:
        """torchvision's own `RandomAffine` shifts by whole pixels, which is all or nothing for small images."""
        angle, right, down, zoom, *shear = ((2 * generator.random() - 1) * limit for limit in limits)
        # torchvision turns and shears tensors by bilinear interpolation at best.
        is_tensor = isinstance(image, torch.Tensor)
        interpolation = InterpolationMode.BILINEAR if is_tensor else InterpolationMode.BICUBIC
        return transforms.affine(image, angle, [right, down], 1 + zoom, shear, interpolation=interpolation)

    def _interpolation(self, image: Image.Image | torch.Tensor) -> InterpolationMode:
        if isinstance(image, Image.Image) or self.interpolation == InterpolationMode.BILINEAR:
            return self.interpolation
        # torchvision resizes tensors in no better way.
        return InterpolationMode.BICUBIC


def image_transform(
    args: ImageArguments, image_size: tuple[int, int], num_channels: int, augment: bool
) -> ImageTransform:
    """
    The [`ImageTransform`] of images.

    Raises:
        `ValueError`: If `args` or `num_channels` ask for something that images cannot be.
    """
    if num_channels not in PIL_MODES:
        raise ValueError(
            f"`in_channels` of the tokenizer must be one of {list(PIL_MODES)} for images, got {num_channels}. Other "
            "numbers need an `image_column` of arrays, `Array3D` of bytes."
        )
    return ImageTransform(args, image_size, num_channels, augment)


def _generator(generator: random.Random | None) -> random.Random:
    if generator is None:
        raise ValueError("`generator` is needed for a transform that augments.")
    return generator


# --------------------------------------------------------------------------------------------------------------------
# Rows


class ImageRows:
    """
    Turns a row into `pixel_values` and, with a `label_column`, `class_labels`: see [`image_rows`].
    """

    def __init__(
        self, transform: ImageTransform, feature: Any, column: str, label_column: str | None, num_labels: int | None
    ):
        self.transform = transform
        self.is_random = transform.augment
        self.column = column
        self.label_column = label_column
        self.num_labels = num_labels
        self._holds_arrays = isinstance(feature, datasets.Array3D)

    def prepare(self, dataset: AnyDataset) -> AnyDataset:
        """The columns that are needed, with images as they are stored."""
        dataset = dataset.select_columns([self.column] + ([self.label_column] if self.label_column else []))
        if self._holds_arrays:
            return dataset.with_format("numpy")
        return dataset.cast_column(self.column, datasets.Image(decode=False))

    def __call__(self, row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
        """The item of a row."""
        decode = decode_array if self._holds_arrays else decode_image
        item: dict[str, Any] = {
            "pixel_values": self.transform.pixels(decode(row[self.column], self.transform.num_channels), generator)
        }
        if self.label_column is not None:
            item["class_labels"] = read_label(row, self.label_column, self.num_labels)
        return item


def image_rows(
    args: ImageArguments,
    dataset: AnyDataset,
    image_size: tuple[int, int],
    in_channels: int,
    augment: bool,
    label_column: str | None = None,
    num_labels: int | None = None,
) -> ImageRows:
    """
    How the rows of a data set of images become items.

    Args:
        args ([`ImageArguments`]): `image_column` and what [`ImageTransform`] reads.
        dataset (`Dataset` or `IterableDataset`):
            The data set. Its images are files in any format that Pillow reads, as an `Image` feature or as bytes, or
            bytes of shape `(channels, height, width)` as an `Array3D` feature.
        image_size (`tuple[int, int]`): Height and width of the model's inputs.
        in_channels (`int`): Channels of the model's inputs.
        augment (`bool`): Whether this is training.
        label_column (`str`, *optional*): The column of labels.
        num_labels (`int`, *optional*): Number of classes, to check the labels as they are read.

    Raises:
        `ValueError`: If there is no such column, or if it cannot be brought to `in_channels` channels.
    """
    column = find_image_column(dataset, args.image_column)
    feature = features_of(dataset)[column]
    if isinstance(feature, datasets.Array3D):
        if feature.shape[0] != in_channels or feature.dtype != "uint8":
            raise ValueError(
                f"`image_column` = {column!r} must hold arrays of bytes of shape ({in_channels}, height, width), as "
                f"`in_channels` of the tokenizer is {in_channels}, got {feature.dtype} of shape {feature.shape}."
            )
        transform = ImageTransform(args, image_size, in_channels, augment)
    else:
        value_type = feature.dtype if isinstance(feature, datasets.Value) else None
        if not isinstance(feature, datasets.Image) and value_type not in ("binary", "large_binary", "string"):
            raise ValueError(f"`image_column` = {column!r} must hold images or arrays of bytes, got {feature}.")
        transform = image_transform(args, image_size, in_channels, augment)
    return ImageRows(transform, feature, column, label_column, num_labels)
