# SPDX-License-Identifier: Apache-2.0
"""Configurations of reading data sets; their fields are arguments of the scripts."""

from dataclasses import dataclass
from typing import Annotated

from ..ranges import (
    MOST_PIXELS,
    CheckedFields,
    Interval,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveInt,
    Share,
    argument,
)


INTERPOLATION_NAMES = ("lanczos", "bicubic", "bilinear", "hamming", "box")


@dataclass(kw_only=True)
class ReadingConfig(CheckedFields):
    """How the rows of any data set become images of one size, with their labels."""

    image_column: str | None = argument(None, help="default: the only column with images")
    label_column: str | None = argument(None, help="default: label, cls or the only column of labels")
    interpolation: Annotated[str, OneOf(*INTERPOLATION_NAMES)] = argument(
        "lanczos", help="lanczos, bicubic, bilinear, hamming or box"
    )
    # Validation images are cropped from images of the same size, so this is not an augmentation.
    resize_ratio: Annotated[float, Interval(minimum=1)] = argument(
        1.125, help="images cover this many times the size they are cut to"
    )
    image_range: list[float] | None = argument(
        None, help="values that are black and white; default: those of the images' type"
    )
    max_image_pixels: Annotated[int, Interval(minimum=1, maximum=MOST_PIXELS)] = argument(
        MOST_PIXELS, help="files of larger images count as broken instead of being decompressed"
    )
    streaming: bool = argument(
        False, help="read the data set as it comes instead of downloading and indexing it first"
    )
    max_broken_share: Share = argument(0.01, help="stop when more than this share of the images cannot be read")
    dataloader_num_workers: NonNegativeInt = argument(0, help="processes that load images")

    def __post_init__(self):
        super().__post_init__()
        if self.image_range is not None and (len(self.image_range) != 2 or self.image_range[0] >= self.image_range[1]):
            raise ValueError(
                f"`image_range` must be the values of black and white, such as 0 4095, got {self.image_range}."
            )


@dataclass(kw_only=True)
class DataConfig(ReadingConfig):
    """Data and batches of a training and its validation."""

    train_data: str = argument(help="Hub data set, folder of images in class folders, or glob of parquet or tar files")
    train_split: str | None = argument(None, help="default: train, or the only split")
    validation_data: str | None = argument(None, help="as train_data; default: no validation")
    validation_split: str | None = argument(None, help="default: validation, test or the only split")
    validation_images: PositiveInt | None = argument(None, help="only the first ones; default: all")
    shuffle_buffer_size: PositiveInt = argument(
        4096, help="rows that a streamed data set is shuffled in at a time, per loading process"
    )
    train_batch_size: PositiveInt = argument(64, help="images per process and forward pass")


@dataclass(kw_only=True)
class AugmentConfig(CheckedFields):
    """How training images are changed at random, besides being cut at random places."""

    horizontal_flip: bool = argument(False, help="mirror every other image")
    augment_rotation: NonNegativeFloat = argument(0.0, help="largest rotation, in degrees")
    augment_translation: NonNegativeFloat = argument(0.0, help="largest shift, as a share of the size")
    augment_zoom: NonNegativeFloat = argument(0.0, help="largest zoom in or out: 0.1 means 0.9 to 1.1 times")
    augment_shear: NonNegativeFloat = argument(0.0, help="largest shear in both directions, in degrees")
    augment_fill: Annotated[int, Interval(minimum=0, maximum=255)] = argument(
        0, help="brightness of what these leave open, 0 black to 255 white; of class maps it is class 0"
    )
