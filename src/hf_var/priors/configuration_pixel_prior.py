# SPDX-License-Identifier: Apache-2.0
"""What the configurations of the convolutional priors share: the map of codes and its classes."""

from transformers import PreTrainedConfig

from ..loading import CheckedConfigMixin
from ..ranges import PartialShare, PositiveInt
from ..scales import ScheduleMixin, normalize_size
from .label_set import LabelSetMixin


MapSize = int | list[int] | tuple[int, int]


class PixelPriorConfig(LabelSetMixin, ScheduleMixin, CheckedConfigMixin, PreTrainedConfig):
    """Configuration of a prior of one map of codes, predicted code by code in raster order."""

    codebook_size: PositiveInt = 512
    map_size: MapSize = 8
    class_dropout_prob: PartialShare = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.map_size = normalize_size("map_size", self.map_size)

    @property
    def patch_nums(self) -> list[list[int]]:
        """The one token map, in the form of a schedule."""
        return [list(self.map_size)]  # pyright: ignore[reportArgumentType]

    @property
    def height(self) -> int:
        """Rows of the map."""
        return self.scale_sizes[0][0]

    @property
    def width(self) -> int:
        """Columns of the map."""
        return self.scale_sizes[0][1]

    @property
    def length(self) -> int:
        """Codes of the map."""
        return self.height * self.width

    @property
    def has_unconditional_class(self) -> bool:
        """Whether the class embedding has a last row for no class, which training must have seen."""
        return bool(self.num_labels) and self.class_dropout_prob > 0

    @property
    def num_class_embeddings(self) -> int:
        """Rows of the class embedding."""
        return (self.num_labels or 0) + self.has_unconditional_class


def check_kernel_sizes(**sizes: int) -> None:
    """Raise a `ValueError` for a kernel without neighbours or without a centre."""
    for name, size in sizes.items():
        if size < 3 or size % 2 == 0:
            raise ValueError(f"`{name}` must be an odd integer of at least 3, got {size}.")
