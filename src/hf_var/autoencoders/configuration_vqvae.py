# SPDX-License-Identifier: Apache-2.0
"""Configuration of the multi-scale VQ-VAE."""

import math
from collections.abc import Sequence
from typing import Annotated

from transformers import PreTrainedConfig

from ..loading import CheckedConfigMixin
from ..ranges import Interval, NonNegativeFloat, NonNegativeInt, OneOf, PartialShare, PositiveInt, Share
from ..scales import ScheduleMixin


class VQVAEConfig(ScheduleMixin, CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`VQVAEModel`]. The defaults are those of the tokenizer that was released with VAR (Tian et al.
    2024, section 3.2 and appendix): 16 times smaller latents, 4096 codes of 32 channels.

    `patch_nums` chooses the system: `(16,)` is a plain VQ-VAE or VQGAN, `(8, 8, 8, 8)` a residual quantizer (RQ-VAE),
    a growing list the multi-scale residual quantizer of VAR.

    Args:
        in_channels (`int`, *optional*, defaults to 3):
            Channels of the images: 1 for grayscale, 3 for RGB, 4 with alpha, any other number.
        out_channels (`int`, *optional*):
            Channels of the reconstruction, as many as `in_channels` when `None`.
        base_channels (`int`, *optional*, defaults to 160):
            Width of the first level.
        channel_multipliers (`list[int]`, *optional*, defaults to `(1, 1, 2, 2, 4)`):
            Width of every level as a multiple of `base_channels`. There is one downsampling by two between levels, so
            five levels make latents 16 times smaller than the image.
        num_res_blocks (`int`, *optional*, defaults to 2):
            Residual blocks per level of the encoder; the decoder has one more.
        last_level_attention (`bool`, *optional*):
            Whether the residual blocks of the coarsest level are followed by self-attention: `True`, or with
            `attention_levels` whether the coarsest level is among them, which it must agree with if given.
        attention_levels (`list[int]`, *optional*):
            Levels whose residual blocks are followed by self-attention, in the encoder and the decoder alike; 0 is the
            finest, at the resolution of the image. `None` leaves the choice to `last_level_attention`.
        mid_block_attention (`bool`, *optional*, defaults to `True`):
            Whether there is self-attention between the two residual blocks in the middle.
        norm_num_groups (`int`, *optional*, defaults to 32):
            Groups of the group normalisations. Every width must be a multiple of it.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability inside the residual blocks.
        encoder_out_channels (`int`, *optional*):
            Channels of the encoder's output, before the convolution that precedes the quantizer, and of the decoder's
            input, after the one that follows it (`z_channels` of VQGAN's code). As many as `latent_channels` when
            `None`.
        sample_type (`str`, *optional*, defaults to `"image"`):
            `"image"` for pixels in `[-1, 1]`; `"class_map"` for maps of `in_channels` classes, such as a segmentation:
            the pixels are one-hot over the channels, 0 and 1, and the decoder's output are logits of the classes
            (Esser et al. 2021, section 4.1).
        quantizer (`str`, *optional*, defaults to `"vq"`):
            `"vq"` searches a learned codebook, `"fsq"` rounds each channel (finite scalar quantization, Mentzer et al.
            2023, arXiv 2309.15505): its codebook is fixed, and there are no codebook and commitment terms.
        fsq_levels (`list[int]`, *optional*):
            Only with `"fsq"`: levels of every channel, each at least 2 (the paper: 5), as `(8, 5, 5, 5)`. The
            convolutions before and after the quantizer are the projection to and from so few channels.
        latent_channels (`int`, *optional*):
            Length of a code vector, channels of features and latents: 32, or with `"fsq"` the number of levels, which it
            must be if given.
        quant_conv_kernel_size (`int`, *optional*, defaults to 3):
            Kernel size of the convolutions before and after the quantizer, odd.
        codebook_size (`int`, *optional*):
            Number of codes, shared by all scales: 4096, or with `"fsq"` the product of the levels, which it must be if
            given.
        patch_nums (`list`, *optional*, defaults to `(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)`):
            Size of the token map of every scale, coarse to fine: an integer for a square map or a (height, width)
            pair. The last one is the grid of the latents and thereby fixes the image size.
        num_refinement_convs (`int`, *optional*, defaults to 4):
            Refinement convolutions phi that the scales share. 1 means one for all scales, 0 one per scale.
        refinement_ratio (`float`, *optional*, defaults to 0.5):
            Share r of the convolution in phi(x) = (1 - r) x + r conv(x). 0 leaves phi out.
        normalize_codebook (`bool`, *optional*, defaults to `False`):
            Whether the nearest code is the one of largest cosine instead of smallest Euclidean distance; not with `"fsq"`.
        codebook_averages (`bool`, *optional*, defaults to `False`):
            Whether the averages that a training by moving averages ends with are saved with the weights, so that
            another one can continue them; not with `"fsq"`. RQ-VAE's checkpoints hold them.
        commitment_loss_weight (`float`, *optional*, defaults to 0.25):
            Weight of the term that pulls the features to their quantization, beta in VQ-VAE.
        codebook_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the term that pulls codebook and phi to the features.

    Raises:
        `ValueError`: If a field is out of its range or widths and groups do not fit.

    Example:

    ```python
    >>> from hf_var import VQVAEConfig, VQVAEModel

    >>> config = VQVAEConfig(base_channels=32, channel_multipliers=(1, 2), latent_channels=8, patch_nums=(1, 2, 4))
    >>> config.image_size
    (8, 8)
    >>> model = VQVAEModel(config)
    ```
    """

    model_type = "hf_var_vqvae"

    in_channels: PositiveInt = 3
    out_channels: PositiveInt | None = None
    base_channels: PositiveInt = 160
    channel_multipliers: Sequence[PositiveInt] = (1, 1, 2, 2, 4)
    num_res_blocks: PositiveInt = 2
    # `None` is replaced by the value that follows from other fields, here and below.
    last_level_attention: bool = None  # pyright: ignore[reportAssignmentType]
    attention_levels: Sequence[NonNegativeInt] | None = None
    mid_block_attention: bool = True
    norm_num_groups: PositiveInt = 32
    dropout: PartialShare = 0.0
    encoder_out_channels: PositiveInt | None = None
    sample_type: Annotated[str, OneOf("image", "class_map")] = "image"
    quantizer: Annotated[str, OneOf("vq", "fsq")] = "vq"
    fsq_levels: Sequence[Annotated[int, Interval(minimum=2)]] | None = None
    latent_channels: PositiveInt = None  # pyright: ignore[reportAssignmentType]
    quant_conv_kernel_size: PositiveInt = 3
    codebook_size: PositiveInt = None  # pyright: ignore[reportAssignmentType]
    patch_nums: list[int | list[int]] | tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_refinement_convs: NonNegativeInt = 4
    refinement_ratio: Share = 0.5
    normalize_codebook: bool = False
    codebook_averages: bool = False
    commitment_loss_weight: NonNegativeFloat = 0.25
    codebook_loss_weight: NonNegativeFloat = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._set_code_sizes()
        if len(self.channel_multipliers) == 0:
            raise ValueError("`channel_multipliers` must be a list with one multiple per level, got [].")
        self._set_attention()
        for level, multiplier in enumerate(self.channel_multipliers):
            if self.base_channels * multiplier % self.norm_num_groups:
                raise ValueError(
                    f"`base_channels` times `channel_multipliers[{level}]` is {self.base_channels} x {multiplier}, not "
                    f"a multiple of `norm_num_groups` = {self.norm_num_groups}."
                )
        if self.quant_conv_kernel_size % 2 == 0:
            raise ValueError(f"`quant_conv_kernel_size` must be odd, got {self.quant_conv_kernel_size}.")
        if self.sample_type == "class_map" and not self.num_output_channels == self.in_channels > 1:
            raise ValueError(
                "`in_channels` must be the number of classes with sample_type='class_map', 2 or more, and "
                f"`out_channels` the same, got {self.in_channels} and {self.num_output_channels}."
            )

    def _set_attention(self) -> None:
        levels, last = self.attention_levels, len(self.channel_multipliers) - 1
        if levels is None:
            self.last_level_attention = self.last_level_attention is not False
            return
        if len(set(levels)) < len(levels) or any(level > last for level in levels):
            raise ValueError(f"`attention_levels` must be different levels from 0 to {last}, got {levels}.")
        if self.last_level_attention not in (None, last in levels):
            raise ValueError(
                f"`last_level_attention` must be {last in levels} with attention_levels={levels} of {last + 1} levels, "
                f"got {self.last_level_attention}. Leave it out."
            )
        self.attention_levels, self.last_level_attention = sorted(levels), last in levels

    def _set_code_sizes(self) -> None:
        if self.quantizer == "vq":
            if self.fsq_levels is not None:
                raise ValueError(f"`fsq_levels` goes with quantizer='fsq', got {self.fsq_levels!r} with 'vq'.")
            channels, size = 32, 4096
        else:
            levels = self.fsq_levels
            if not levels:
                raise ValueError(
                    f"`fsq_levels` must be a list with the levels of every channel, such as (8, 5, 5, 5), got {levels!r}."
                )
            channels, size = len(levels), math.prod(levels)
            if self.latent_channels not in (None, channels):
                raise ValueError(
                    f"`latent_channels` must be the number of `fsq_levels` = {levels}, {channels}, got "
                    f"{self.latent_channels!r}. Leave it out."
                )
            if self.codebook_size not in (None, size):
                raise ValueError(
                    f"`codebook_size` must be the product of `fsq_levels` = {levels}, {size}, got "
                    f"{self.codebook_size!r}. Leave it out."
                )
            for name in ("normalize_codebook", "codebook_averages"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` goes with quantizer='vq', got True with 'fsq'.")
        self.latent_channels = channels if self.latent_channels is None else self.latent_channels
        self.codebook_size = size if self.codebook_size is None else self.codebook_size

    @property
    def num_codebooks(self) -> int:
        """Codebooks: a single one for all scales."""
        return 1

    @property
    def has_trainable_codes(self) -> bool:
        """Whether the code vectors are weights, found by a search without a gradient."""
        return self.quantizer == "vq"

    @property
    def latent_size(self) -> tuple[int, int]:
        """`(height, width)` of features and latents."""
        return self.scale_sizes[-1]

    @property
    def num_output_channels(self) -> int:
        """Channels of the reconstruction."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def num_encoder_channels(self) -> int:
        """Channels of the encoder's output and of the decoder's input."""
        return self.latent_channels if self.encoder_out_channels is None else self.encoder_out_channels

    @property
    def num_pixel_classes(self) -> int | None:
        """Classes of the pixels of class maps, `None` for images."""
        return self.in_channels if self.sample_type == "class_map" else None

    @property
    def levels_with_attention(self) -> list[int]:
        """Levels whose residual blocks are followed by attention, 0 the finest."""
        if self.attention_levels is not None:
            return list(self.attention_levels)
        return [len(self.channel_multipliers) - 1] if self.last_level_attention else []

    @property
    def downsampling_factor(self) -> int:
        """How many times smaller than the image the latents are."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` of the images that fit the schedule, in pixels."""
        height, width = self.latent_size
        return height * self.downsampling_factor, width * self.downsampling_factor


__all__ = ["VQVAEConfig"]
