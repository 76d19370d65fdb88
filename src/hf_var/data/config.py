# SPDX-License-Identifier: Apache-2.0
"""Configurations of reading data sets; their fields are arguments of the scripts."""

from dataclasses import dataclass, field
from typing import Annotated

from ..image_decoding import MOST_PIXELS
from ..ranges import CheckedFields, Interval, NonNegativeFloat, NonNegativeInt, OneOf, PositiveInt, Share


INTERPOLATION_NAMES = ("lanczos", "bicubic", "bilinear", "hamming", "box")


@dataclass(kw_only=True)
class ReadingConfig(CheckedFields):
    """How the rows of any data set become images of one size, with their labels."""

    image_column: str | None = field(default=None, metadata={"help": "default: the only column with images"})
    label_column: str | None = field(
        default=None, metadata={"help": "default: label, cls or the only column of labels"}
    )
    interpolation: Annotated[str, OneOf(*INTERPOLATION_NAMES)] = field(
        default="lanczos", metadata={"help": "lanczos, bicubic, bilinear, hamming or box"}
    )
    # Validation images are cropped from images of the same size, so this is not an augmentation.
    resize_ratio: Annotated[float, Interval(minimum=1)] = field(
        default=1.125, metadata={"help": "images cover this many times the size they are cut to"}
    )
    image_range: list[float] | None = field(
        default=None, metadata={"help": "values that are black and white; default: those of the images' type"}
    )
    max_image_pixels: Annotated[int, Interval(minimum=1, maximum=MOST_PIXELS)] = field(
        default=MOST_PIXELS, metadata={"help": "files of larger images count as broken instead of being decompressed"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the data set as it comes instead of downloading and indexing it first"}
    )
    max_broken_share: Share = field(
        default=0.01, metadata={"help": "stop when more than this share of the images cannot be read"}
    )
    dataloader_num_workers: NonNegativeInt = field(default=0, metadata={"help": "processes that load images"})

    def __post_init__(self):
        super().__post_init__()
        if self.image_range is not None and (len(self.image_range) != 2 or self.image_range[0] >= self.image_range[1]):
            raise ValueError(
                f"`image_range` must be the values of black and white, such as 0 4095, got {self.image_range}."
            )


@dataclass(kw_only=True)
class DataConfig(ReadingConfig):
    """Data and batches of a training and its validation."""

    train_data: str = field(
        metadata={"help": "Hub data set, folder of images in class folders, or glob of parquet or tar files"}
    )
    train_split: str | None = field(default=None, metadata={"help": "default: train, or the only split"})
    validation_data: str | None = field(default=None, metadata={"help": "as train_data; default: no validation"})
    validation_split: str | None = field(
        default=None, metadata={"help": "default: validation, test or the only split"}
    )
    validation_images: PositiveInt | None = field(default=None, metadata={"help": "only the first ones; default: all"})
    shuffle_buffer_size: PositiveInt = field(
        default=4096, metadata={"help": "rows that a streamed data set is shuffled in at a time, per loading process"}
    )
    train_batch_size: PositiveInt = field(default=64, metadata={"help": "images per process and forward pass"})


@dataclass(kw_only=True)
class AugmentConfig(CheckedFields):
    """How training images are changed at random, besides being cut at random places."""

    horizontal_flip: bool = field(default=False, metadata={"help": "mirror every other image"})
    augment_rotation: NonNegativeFloat = field(default=0.0, metadata={"help": "largest rotation, in degrees"})
    augment_translation: NonNegativeFloat = field(
        default=0.0, metadata={"help": "largest shift, as a share of the size"}
    )
    augment_zoom: NonNegativeFloat = field(
        default=0.0, metadata={"help": "largest zoom in or out: 0.1 means 0.9 to 1.1 times"}
    )
    augment_shear: NonNegativeFloat = field(
        default=0.0, metadata={"help": "largest shear in both directions, in degrees"}
    )
