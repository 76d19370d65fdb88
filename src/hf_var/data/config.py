# SPDX-License-Identifier: Apache-2.0
"""What reading a data set is told: the arguments that trainings, tokenization and evaluation have in common."""

from dataclasses import dataclass, field

from ..ranges import CheckedFields, NonNegativeInt, PositiveInt, Share


@dataclass(kw_only=True)
class ImageArguments:
    """How the rows of a data set become images of one size."""

    image_column: str | None = field(default=None, metadata={"help": "default: the only column with images"})
    interpolation: str = field(default="lanczos", metadata={"help": "lanczos, bicubic, bilinear, hamming or box"})
    resize_ratio: float = field(
        default=1.125, metadata={"help": "images cover this many times the size they are cut to"}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "mirror every other image"})
    augment_rotation: float = field(default=0.0, metadata={"help": "largest rotation, in degrees"})
    augment_translation: float = field(default=0.0, metadata={"help": "largest shift, as a share of the size"})
    augment_zoom: float = field(default=0.0, metadata={"help": "largest zoom in or out: 0.1 means 0.9 to 1.1 times"})
    augment_shear: float = field(default=0.0, metadata={"help": "largest shear in both directions, in degrees"})


@dataclass(kw_only=True)
class DataArguments(ImageArguments):
    """How a whole data set is read."""

    label_column: str | None = field(
        default=None, metadata={"help": "default: label, cls or the only column of labels"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the data set as it comes instead of downloading and indexing it first"}
    )
    max_broken_share: float = field(
        default=0.01, metadata={"help": "stop when more than this share of the images cannot be read"}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that load images"})
    seed: int = field(default=0, metadata={"help": "fixes all random draws"})

    def __post_init__(self):
        for name in ("dataloader_num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(f"`max_broken_share` must be a share from 0 to 1, got {self.max_broken_share}.")


@dataclass(kw_only=True)
class BatchArguments(DataArguments):
    """How a data set becomes the batches of a training and of its validation."""

    shuffle_buffer_size: int = field(
        default=4096, metadata={"help": "rows that a streamed data set is shuffled in at a time, per loading process"}
    )
    train_batch_size: int = field(default=64, metadata={"help": "images per process and forward pass"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("shuffle_buffer_size", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass(kw_only=True)
class DataConfig(CheckedFields):
    """Which rows are read for a training and its validation, and how."""

    train_data: str = field(
        metadata={"help": "Hub data set, folder of images in class folders, or glob of parquet or tar files"}
    )
    train_split: str | None = field(default=None, metadata={"help": "default: train, or the only split"})
    validation_data: str | None = field(default=None, metadata={"help": "as train_data; default: no validation"})
    validation_split: str | None = field(
        default=None, metadata={"help": "default: validation, test or the only split"}
    )
    validation_images: PositiveInt | None = field(default=None, metadata={"help": "only the first ones; default: all"})
    image_column: str | None = field(default=None, metadata={"help": "default: the only column with images"})
    label_column: str | None = field(
        default=None, metadata={"help": "default: label, cls or the only column of labels"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the data set as it comes instead of downloading and indexing it first"}
    )
    shuffle_buffer_size: PositiveInt = field(
        default=4096, metadata={"help": "rows that a streamed data set is shuffled in at a time, per loading process"}
    )
    max_broken_share: Share = field(
        default=0.01, metadata={"help": "stop when more than this share of the images cannot be read"}
    )
    dataloader_num_workers: NonNegativeInt = field(default=0, metadata={"help": "processes that load images"})
    train_batch_size: PositiveInt = field(default=64, metadata={"help": "images per process and forward pass"})


@dataclass(kw_only=True)
class AugmentConfig(CheckedFields):
    """How images become images of one size, and how training changes them."""

    interpolation: str = field(default="lanczos", metadata={"help": "lanczos, bicubic, bilinear, hamming or box"})
    resize_ratio: float = field(
        default=1.125, metadata={"help": "images cover this many times the size they are cut to"}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "mirror every other image"})
    augment_rotation: float = field(default=0.0, metadata={"help": "largest rotation, in degrees"})
    augment_translation: float = field(default=0.0, metadata={"help": "largest shift, as a share of the size"})
    augment_zoom: float = field(default=0.0, metadata={"help": "largest zoom in or out: 0.1 means 0.9 to 1.1 times"})
    augment_shear: float = field(default=0.0, metadata={"help": "largest shear in both directions, in degrees"})
