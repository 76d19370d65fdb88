# SPDX-License-Identifier: Apache-2.0
"""Grids and animations of images, coarse to fine."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import export_to_gif, make_image_grid
from PIL import Image, ImageOps

from .checks import check_count


# Smaller images are enlarged until their shorter side has at least about this many pixels.
VISIBLE_SIDE = 64

# How many times longer than the others the last image of an animation stays.
LAST_FRAME_TIMES = 4


def progress_strip(progress: Sequence[Sequence[Image.Image]]) -> Image.Image:
    r"""
    A row for each image, a column for each scale: the image after the first scale at the left, the final one at the
    right.

    Args:
        progress (`list[list[PIL.Image.Image]]`):
            For each scale the images of the batch, as [`~VARPipeline.decode_progress`] returns them.

    Returns:
        `PIL.Image.Image`: In RGB, images under 64 pixels enlarged by an integer factor.

    Raises:
        `ValueError`: If there is no image, or not the same number of them after each scale.
    """
    columns = _enlarged(progress)
    return make_image_grid(
        [image for row in zip(*columns, strict=True) for image in row], len(columns[0]), len(columns)
    )


def save_progress_gif(progress: Sequence[Sequence[Image.Image]], path: str | Path, fps: int = 2) -> None:
    r"""
    Save an endless animation, coarse to fine, of all images side by side. The last scale stays for longer.

    Args:
        progress (`list[list[PIL.Image.Image]]`):
            For each scale the images of the batch, as [`~VARPipeline.decode_progress`] returns them.
        path (`str`): File to write, which ends with `.gif`.
        fps (`int`, *optional*, defaults to 2): Scales per second.

    Raises:
        `ValueError`: If there is no image, not the same number of them after each scale, or an argument is out of range.
    """
    check_count("fps", fps)
    if not isinstance(path, (str, PathLike)):
        raise ValueError(f"`path` must be a file, got {path!r}.")
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"`path` must end with .gif, got {str(path)!r}.")
    frames = [make_image_grid(images, rows=1, cols=len(images)) for images in _enlarged(progress)]
    export_to_gif(frames + frames[-1:] * (LAST_FRAME_TIMES - 1), str(path), fps=fps)


def image_grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Images in rows of at most `columns`, the last of which is filled up with black ones."""
    columns = min(columns, len(images))
    blank = Image.new(images[0].mode, images[0].size)
    images = images + [blank] * (-len(images) % columns)
    if blank.mode in ("L", "I;16"):
        # Ids of classes stay ids, where diffusers' function would make colours of them.
        arrays = [np.asarray(image) for image in images]
        rows = [np.hstack(arrays[start : start + columns]) for start in range(0, len(arrays), columns)]
        return Image.fromarray(np.vstack(rows))
    return make_image_grid(images, rows=len(images) // columns, cols=columns)


def _is_list(value: Any, kind: type = object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(element, kind) for element in value)


def _enlarged(progress: Sequence[Sequence[Image.Image]]) -> list[list[Image.Image]]:
    """The same, large enough to be seen; pixels stay visible as squares."""
    if not _is_list(progress) or not all(_is_list(images, Image.Image) for images in progress):
        raise ValueError(f"`progress` must be a list of lists of pictures, got {type(progress).__name__}.")
    counts = {len(images) for images in progress}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            "`progress` must hold, for each scale, the same number of images and at least one, got "
            f"{[len(images) for images in progress]}."
        )
    factor = max(1, round(VISIBLE_SIDE / min(progress[0][0].size)))
    return [[ImageOps.scale(image, factor, Image.Resampling.NEAREST) for image in images] for images in progress]
