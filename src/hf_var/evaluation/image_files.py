# SPDX-License-Identifier: Apache-2.0
"""Sampled images as PNG files, and as the one file of arrays that other evaluators read."""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import whole_file


DECODING_THREADS = 4
# Images in memory while they are gathered in one file.
IMAGES_PER_BLOCK = 64


def png_path(folder: str | Path, index: int) -> Path:
    """Where image number `index` lies: `000042.png`, so that the names' order is that of the numbers."""
    return Path(folder) / f"{index:06d}.png"


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write bytes `(3, height, width)`, atomically, so that an interrupted run leaves only whole files."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))  # (height, width, 3)
    with whole_file(path) as place:
        # More compression takes much longer and saves little.
        Image.fromarray(pixels).save(place, "PNG", compress_level=1)


def read_png(path: str | Path, image_size: tuple[int, int]) -> np.ndarray:
    """Read an image that [`write_png`] wrote, `(3, height, width)`."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.array(image)
    except FileNotFoundError:
        raise ValueError(f"{str(path)!r} is missing. Run the command again to sample it.") from None
    # Damaged files make Pillow raise almost anything: OSError, SyntaxError, struct.error, zlib.error, its own errors.
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}). Delete it and run the command again to sample it."
        ) from error
    if pixels.shape != (*image_size, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{str(path)!r} must be a colour image of {image_size[0]}x{image_size[1]} pixels, is an array of shape "
            f"{pixels.shape}. Delete it and run the command again to sample it."
        )
    return pixels.transpose(2, 0, 1)


def missing_images(folder: str | Path, numbers: Sequence[int]) -> list[int]:
    """Numbers of the images without a file."""
    return [number for number in numbers if not png_path(folder, number).exists()]


def known_images(folder: str | Path, image_size: tuple[int, int], numbers: Sequence[int]) -> dict[int, np.ndarray]:
    """The images that have a file, by number."""
    missing = set(missing_images(folder, numbers))
    return {number: read_png(png_path(folder, number), image_size) for number in numbers if number not in missing}


def complete(known: Mapping[int, np.ndarray], sample: Callable[[range], torch.Tensor], numbers: range) -> torch.Tensor:
    """A batch of images `(batch, 3, height, width)`: the known ones, and otherwise sampled."""
    if len(known) == len(numbers):
        return torch.from_numpy(np.stack([known[number] for number in numbers]))
    # Sample the whole batch, because rounding depends on its size.
    images = sample(numbers)
    # Files take precedence, because another batch size or device may round differently.
    for number, image in known.items():
        images[number - numbers.start] = torch.from_numpy(image).to(images.device)
    return images


def read_or_sample(
    folder: str | Path, image_size: tuple[int, int], sample: Callable[[range], torch.Tensor], numbers: range
) -> torch.Tensor:
    """A batch of images `(batch, 3, height, width)`: from their files, and otherwise sampled."""
    return complete(known_images(folder, image_size, numbers), sample, numbers)


def write_npz(path: str | Path, folder: str | Path, num_images: int, image_size: tuple[int, int]) -> None:
    """
    Gather images in the file that the evaluator of OpenAI's guided-diffusion reads: an `.npz` with one array `arr_0`,
    bytes of shape `(num_images, height, width, 3)`. Only a few images are in memory at a time, and the same images
    make the same bytes.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *image_size, 3)}
    with (
        whole_file(path) as place,
        zipfile.ZipFile(place, "w") as archive,
        # A ZipInfo holds no time of writing.
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for pixels in _read_in_order(folder, num_images, image_size):
            member.write(pixels.transpose(1, 2, 0).tobytes())


def _read_in_order(folder: str | Path, num_images: int, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for first in range(0, num_images, IMAGES_PER_BLOCK):
            indices = range(first, min(first + IMAGES_PER_BLOCK, num_images))
            yield from pool.map(lambda index: read_png(png_path(folder, index), image_size), indices)
