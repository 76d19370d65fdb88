# SPDX-License-Identifier: Apache-2.0
"""Configuration of the hierarchical VQ-VAE."""

import math
from collections.abc import Sequence
from typing import Annotated

from transformers import PreTrainedConfig

from ..loading import CheckedConfigMixin
from ..ranges import Interval, NonNegativeFloat, NonNegativeInt, PositiveInt
from ..scales import ScheduleMixin, normalize_patch_nums, normalize_size


class HierarchicalVQVAEConfig(ScheduleMixin, CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`HierarchicalVQVAEModel`]. The defaults are VQ-VAE-2 for images of 256 pixels (Razavi et al. 2019,
    arXiv 1906.00446): maps of 32x32 and 64x64 codes.

    `strides` chooses the system: `(4,)` is VQ-VAE (van den Oord et al. 2017), `(4, 2)` VQ-VAE-2, and `(8, 2, 2)` VQ-VAE-2
    for images of 1024 pixels.

    Args:
        in_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        out_channels (`int`, *optional*):
            Channels of the reconstruction, as many as `in_channels` when `None`.
        image_size (`int` or `(int, int)`, *optional*, defaults to 256):
            Height and width of the images in pixels, multiples of the product of `strides`. One number stands for both.
        strides (`list[int]`, *optional*, defaults to `(4, 2)`):
            How many times smaller each level is than the one below, from the image upwards: the finest level is
            `strides[0]` times smaller than the image. Powers of two, each at least 2.
        base_channels (`int`, *optional*, defaults to 128):
            Width of the encoders and decoders, at least 2.
        num_res_blocks (`int`, *optional*, defaults to 2):
            Residual blocks of each of them.
        residual_channels (`int`, *optional*, defaults to 32):
            Width inside the residual blocks.
        latent_channels (`int`, *optional*, defaults to 64):
            Length of a code vector.
        codebook_size (`int`, *optional*, defaults to 512):
            Number of codes of every level. Each level has a codebook of its own.
        normalize_codebook (`bool`, *optional*, defaults to `False`):
            Whether the nearest code is the one of largest cosine instead of smallest Euclidean distance.
        commitment_loss_weight (`float`, *optional*, defaults to 0.25):
            Weight of the term that pulls the features to their code vectors, beta in VQ-VAE.
        codebook_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the term that pulls the code vectors to the features.

    Raises:
        `ValueError`: If a field is out of its range or `image_size` is no multiple of the strides.

    Example:

    ```python
    >>> from hf_var import HierarchicalVQVAEConfig

    >>> config = HierarchicalVQVAEConfig(image_size=(48, 32), base_channels=16)
    >>> config.patch_nums
    [[6, 4], [12, 8]]
    ```
    """

    model_type = "hf_var_hierarchical_vqvae"

    in_channels: PositiveInt = 3
    out_channels: PositiveInt | None = None
    # A single number is replaced by two.
    image_size: tuple[int, int] = 256  # pyright: ignore[reportAssignmentType]
    strides: Sequence[PositiveInt] = (4, 2)
    base_channels: Annotated[int, Interval(minimum=2)] = 128
    num_res_blocks: NonNegativeInt = 2
    residual_channels: PositiveInt = 32
    latent_channels: PositiveInt = 64
    codebook_size: PositiveInt = 512
    normalize_codebook: bool = False
    commitment_loss_weight: NonNegativeFloat = 0.25
    codebook_loss_weight: NonNegativeFloat = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.strides) == 0:
            raise ValueError(
                "`strides` must be a list with the stride of every level, from the image upwards, got []."
            )
        for level, stride in enumerate(self.strides):
            if stride < 2 or stride.bit_count() != 1:
                raise ValueError(f"`strides[{level}]` must be a power of two, at least 2, got {stride!r}.")
        factor = math.prod(self.strides)
        size, self.image_size = self.image_size, normalize_size("image_size", self.image_size)
        if any(side % factor for side in self.image_size):
            raise ValueError(
                f"`image_size` must be one or two positive multiples of {factor}, the product of `strides` = "
                f"{self.strides}, got {size!r}."
            )

    @property
    def patch_nums(self) -> list[int | list[int]]:
        """Size of the map of every level, coarse to fine."""
        height, width = self.image_size
        factors = [math.prod(self.strides[:number]) for number in range(len(self.strides), 0, -1)]
        return normalize_patch_nums([(height // factor, width // factor) for factor in factors])

    @property
    def num_codebooks(self) -> int:
        """Codebooks, one for each level."""
        return len(self.strides)

    @property
    def has_trainable_codes(self) -> bool:
        """Whether the code vectors are weights."""
        return True

    @property
    def num_output_channels(self) -> int:
        """Channels of the reconstruction."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def num_pixel_classes(self) -> None:
        """`None`, since the pixels are those of images, as those of most [`VQVAEConfig`]s."""
        return None

    @property
    def downsampling_factor(self) -> int:
        """How many times smaller than the image the finest level is."""
        return self.strides[0]


__all__ = ["HierarchicalVQVAEConfig"]
