# SPDX-License-Identifier: Apache-2.0
"""
The image decoder of the package. A file, a PIL image or an array becomes an 8-bit PIL image or a tensor with a given number
of channels. 16 bits are scaled by their full range, and transparent images are composited on white if the result has no
transparency. Maps of class ids are read as they are.
"""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .ranges import MOST_PIXELS


PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# Whose pixels are numbers: black and white, gray, the indices of a palette, and the integers of 16 and 32 bits.
CLASS_MAP_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")
EXIF_ORIENTATION = 0x0112
# Depths of sensors, whose values are often stored in 16 bits as they are.
USUAL_BITS = (8, 10, 12, 14)
INTEGER_RANGES = {torch.uint8: (0, 255), torch.uint16: (0, 65535), torch.bool: (0, 1)}

ImageInput = bytes | str | os.PathLike | Image.Image | np.ndarray | torch.Tensor
ValueRange = tuple[float, float] | list[float]


class BrokenImageError(ValueError):
    """An image cannot be read. Says which and why."""


def decode_image(
    image: ImageInput,
    num_channels: int,
    *,
    value_range: ValueRange | None = None,
    max_pixels: int = MOST_PIXELS,
    name: str | None = None,
) -> torch.Tensor:
    """
    Decode an image to a tensor.

    Args:
        image (`bytes`, `str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Content or path of a file, a picture, an array `(height, width)` or `(height, width, channels)`, or a tensor
            `(channels, height, width)`. Arrays and tensors of floats hold values in `[0, 1]`, those of integers the whole
            range of `uint8` or `uint16`.
        num_channels (`int`):
            Channels of the result. Files and pictures are brought to 1 (gray), 2 (gray with transparency), 3 (colour) or
            4 (colour with transparency); arrays and tensors must have as many.
        value_range (`tuple[float, float]`, *optional*):
            Values that are black and white, where they are not those of the type: `(0, 4095)` for 12 bits in a file of 16.
        max_pixels (`int`, *optional*, defaults to 178,956,970):
            A file of more pixels is refused before it is decompressed.
        name (`str`, *optional*): What messages call the image.

    Returns:
        `torch.Tensor` of shape `(num_channels, height, width)`: `uint8`, or for arrays and tensors of floats `float32` in
        `[0, 1]`. [`normalize_pixels`] gives both the range of a model's inputs.

    Raises:
        [`BrokenImageError`]: A `ValueError`, if the image cannot be read, with the reason.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _decode_array(image, num_channels, value_range, name)
    picture = decode_picture(image, num_channels, value_range=value_range, max_pixels=max_pixels, name=name)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0).contiguous()


def decode_picture(
    image: bytes | str | os.PathLike | Image.Image,
    num_channels: int,
    *,
    value_range: ValueRange | None = None,
    max_pixels: int = MOST_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """
    The same for files and pictures, as a picture of 8 bits, turned the way that its EXIF data say: see [`decode_image`].

    Raises:
        [`BrokenImageError`]: A `ValueError`, if the image cannot be read, with the reason.
    """
    if num_channels not in PIL_MODES:
        raise ValueError(f"`num_channels` must be one of {list(PIL_MODES)} for pictures, got {num_channels}.")
    if name is None and isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
    with _named_errors(name):
        return with_channels(_open(image, max_pixels), num_channels, value_range)


def decode_class_map(
    image: ImageInput, num_classes: int, *, max_pixels: int = MOST_PIXELS, name: str | None = None
) -> torch.Tensor:
    """
    Decode a map of classes, such as a segmentation, whose pixels are ids.

    Args:
        image (`bytes`, `str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Content or path of a file, or a picture, in black and white, gray or with a palette, whose indices are the
            ids; or integers in an array `(height, width)` or `(height, width, 1)` or in a tensor `(height, width)` or
            `(1, height, width)`.
        num_classes (`int`): Number of classes.
        max_pixels (`int`, *optional*, defaults to 178,956,970):
            A file of more pixels is refused before it is decompressed.
        name (`str`, *optional*): What messages call the map.

    Returns:
        `torch.LongTensor` of shape `(height, width)`, in `[0, num_classes)`.

    Raises:
        [`BrokenImageError`]: A `ValueError`, if the map cannot be read, or holds colours or an id out of range.
    """
    if name is None and isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
    with _named_errors(name):
        if isinstance(image, (np.ndarray, torch.Tensor)):
            ids = _integers(image)
        else:
            picture = _open(image, max_pixels)
            if picture.mode not in CLASS_MAP_MODES:
                raise ValueError(
                    f"class ids have no colours or transparency, got a picture of the mode {picture.mode}"
                )
            ids = torch.from_numpy(np.array(picture).astype(np.int64))
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= num_classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"class ids must be from 0 to {num_classes - 1}, got {wrong}")
    return ids


def _open(image: bytes | str | os.PathLike | Image.Image, max_pixels: int) -> Image.Image:
    """A picture, or that of a file, turned the way that its EXIF data say."""
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, more than `max_image_pixels` = {max_pixels}"
            )
        image.load()
    if image.getexif().get(EXIF_ORIENTATION) is not None:
        image = ImageOps.exif_transpose(image)
    return image


@contextmanager
def _named_errors(name: str | None) -> Iterator[None]:
    """Errors of reading an image as a [`BrokenImageError`] that names it."""
    try:
        yield
    # Damaged files make Pillow raise almost anything: OSError, SyntaxError, struct.error, zlib.error, its own errors.
    except Exception as error:
        raise BrokenImageError(f"{name or 'an image without a name'}: {type(error).__name__}: {error}") from error


def with_channels(image: Image.Image, num_channels: int, value_range: ValueRange | None = None) -> Image.Image:
    """The picture as gray (1), gray with transparency (2), colour (3) or colour with transparency (4), 8 bits each."""
    mode = PIL_MODES[num_channels]
    if value_range is not None or image.mode.startswith("I") or image.mode == "F":
        image = _with_range(image, value_range)
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if num_channels in (1, 3):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes, or floats in `[0, 1]`, to floats in `[-1, 1]`."""
    if pixels.is_floating_point():
        return pixels * 2 - 1
    return pixels.float().div_(127.5).sub_(1)


def _with_range(image: Image.Image, value_range: ValueRange | None) -> Image.Image:
    """A picture of integers or floats as one of bytes, from black to white over `value_range`."""
    if value_range is None:
        if image.mode == "F":
            raise ValueError(
                "pixels that are floating point numbers have no known range: set `image_range` of a training to their black and white, or "
                "convert the picture to 8 bits"
            )
        # Pillow itself would cut off what is brighter than 255 of 65535.
        levels = np.asarray(image)
        _warn_of_range(int(levels.min()), int(levels.max()))
        return Image.fromarray(np.round(levels.clip(0, 65535) / 257).astype(np.uint8))
    if image.mode not in ("L", "RGB", "F") and not image.mode.startswith("I"):
        raise ValueError(f"`image_range` is for gray and for colour without transparency, got the mode {image.mode}")
    return Image.fromarray(
        (_unit_range(np.asarray(image, dtype=np.float32), value_range) * 255).round().astype(np.uint8)
    )


def _warn_of_range(lowest: int, highest: int) -> None:
    """Warn of values that are not those of 16 bits. The texts are few, so that each is shown once."""
    if lowest < 0 or highest > 65535:
        warnings.warn(
            "An image has values below 0 or above 65535, which are cut off. Set `image_range` of a training to the "
            "values that are black and white, or convert the image to 8 bits.",
            stacklevel=3,
        )
        return
    bits = next((bits for bits in USUAL_BITS if 0 < highest < 2**bits), None)
    if bits is not None:
        warnings.warn(
            f"An image of 16 bits has no value above {2**bits - 1} and is read as a dark one. If it was taken with {bits} "
            f"bits, set `image_range` to 0 and {2**bits - 1} in a training, or convert it to 8 bits.",
            stacklevel=3,
        )


def _unit_range(values: Any, value_range: ValueRange) -> Any:
    lowest, highest = value_range
    return (values.clip(lowest, highest) - lowest) / (highest - lowest)


def _decode_array(
    image: np.ndarray | torch.Tensor, num_channels: int, value_range: ValueRange | None, name: str | None
) -> torch.Tensor:
    name = name or "an image"
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "fbiu":
            raise BrokenImageError(f"{name}: an array of {image.dtype} instead of numbers")
        # torch does not accept reversed views, for example.
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
        layout = f"(height, width, {num_channels})"
    else:
        pixels = image.detach().cpu()
        layout = f"({num_channels}, height, width)"
    if pixels.ndim != 3 or pixels.shape[0] != num_channels or pixels.numel() == 0:
        raise BrokenImageError(f"{name}: an array of shape {tuple(image.shape)} instead of {layout}")
    if value_range is not None:
        return _unit_range(pixels.float(), value_range)
    if pixels.is_floating_point():
        pixels = pixels.float()
        if not ((pixels >= 0) & (pixels <= 1)).all():
            raise BrokenImageError(
                f"{name}: floating point numbers must be in [0, 1], got values from {pixels.min():g} to {pixels.max():g}"
            )
        return pixels
    if pixels.dtype not in INTEGER_RANGES:
        raise BrokenImageError(f"{name}: integers must be uint8 or uint16, or have a known range, got {pixels.dtype}")
    highest = INTEGER_RANGES[pixels.dtype][1]
    return pixels if highest == 255 else (pixels.to(torch.float64) * (255 / highest)).round().to(torch.uint8)


def _integers(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """An array or tensor of ids, int64 `(height, width)`."""
    is_array = isinstance(image, np.ndarray)
    is_integer = image.dtype.kind in "biu" if is_array else not (image.is_floating_point() or image.is_complex())
    if not is_integer:
        raise ValueError(f"class ids must be integers, got {image.dtype}")
    ids = torch.from_numpy(image.astype(np.int64)) if is_array else image.detach().cpu().long()
    channel = -1 if is_array else 0
    if ids.ndim == 3 and ids.shape[channel] == 1:
        ids = ids.squeeze(channel)
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"class ids must have the shape (height, width), got {tuple(image.shape)}")
    return ids
