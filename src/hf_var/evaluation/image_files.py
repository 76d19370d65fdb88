# SPDX-License-Identifier: Apache-2.0
"""Drawn images as PNG files, and as the one file of arrays that other evaluators read."""

import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.resumable_settings import UNFINISHED


DECODING_THREADS = 4
# Images in memory while they are gathered in one file.
IMAGES_PER_BLOCK = 64


def png_path(folder: str | Path, index: int) -> Path:
    """Where image number `index` lies: `000042.png`, so that the names' order is that of the numbers."""
    return Path(folder) / f"{index:06d}.png"


def write_png(path: str | Path, image: np.ndarray, compress_level: int = 1) -> None:
    """
    Write an image. The file has its name only when it is whole, so that a run may be killed at any time.

    Args:
        path (`str`): The file, in a folder that exists.
        image (`np.ndarray`): Bytes of shape `(3, height, width)`.
        compress_level (`int`, *optional*, defaults to 1): From 0 (none) to 9. More takes much longer and saves little.

    Raises:
        `ValueError`: If `image` is something else.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"`image` must be bytes of shape (3, height, width), got {image.dtype} of shape {image.shape}."
        )
    unfinished = _unfinished(Path(path))
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))  # (height, width, 3)
    Image.fromarray(pixels).save(unfinished, "PNG", compress_level=compress_level)
    os.replace(unfinished, path)


def read_png(path: str | Path, image_size: tuple[int, int]) -> np.ndarray:
    """
    Read an image that [`write_png`] wrote.

    Args:
        path (`str`): The file.
        image_size (`tuple[int, int]`): Height and width that it must have.

    Returns:
        `np.ndarray`: Bytes of shape `(3, height, width)`.

    Raises:
        `ValueError`: If the file is missing, damaged or another image.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.array(image)
    except FileNotFoundError:
        raise ValueError(f"{str(path)!r} is missing. Run the command again to draw it.") from None
    # Damaged files make Pillow raise almost anything: OSError, SyntaxError, struct.error, zlib.error, its own errors.
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}). Delete it and run the command again to draw it anew."
        ) from error
    if pixels.shape != (*image_size, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{str(path)!r} must be a colour image of {image_size[0]}x{image_size[1]} pixels, is an array of shape "
            f"{pixels.shape}. Delete it and run the command again to draw it anew."
        )
    return pixels.transpose(2, 0, 1)


def write_npz(path: str | Path, folder: str | Path, num_images: int, image_size: tuple[int, int]) -> None:
    """
    Gather images in the file that the evaluator of OpenAI's guided-diffusion reads: an `.npz` with one array `arr_0`, bytes
    of shape `(num_images, height, width, 3)`, in the order of the images' numbers. Only a few of them are in memory at a
    time, and the file has its name only when it is whole. The same images make the same bytes.

    Args:
        path (`str`): The file.
        folder (`str`): Folder of the images, see [`png_path`].
        num_images (`int`): Number of images.
        image_size (`tuple[int, int]`): Height and width of the images.

    Raises:
        `ValueError`: If an image is missing, damaged or of another size. There is no file then, or the one before.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *image_size, 3)}
    unfinished = _unfinished(Path(path))
    try:
        # A ZipInfo has no time of writing, whatever zipfile may give to a name.
        with (
            zipfile.ZipFile(unfinished, "w") as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for pixels in _read_in_order(folder, num_images, image_size):
                member.write(pixels.transpose(1, 2, 0).tobytes())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_pngs(folder: str | Path, num_images: int, image_size: tuple[int, int]) -> None:
    """
    Read the images that [`write_npz`] would gather.

    Raises:
        `ValueError`: If an image is missing, damaged or of another size.
    """
    for _ in _read_in_order(folder, num_images, image_size):
        pass


def _read_in_order(folder: str | Path, num_images: int, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for first in range(0, num_images, IMAGES_PER_BLOCK):
            indices = range(first, min(first + IMAGES_PER_BLOCK, num_images))
            yield from pool.map(lambda index: read_png(png_path(folder, index), image_size), indices)


def _unfinished(path: Path) -> Path:
    # Without an ending, so that nobody's glob takes it for an image.
    return path.with_name(f"{UNFINISHED}{path.stem}")
