# SPDX-License-Identifier: Apache-2.0
"""Configuration of PixelSNAIL."""

from ..ranges import NonNegativeInt, PartialShare, PositiveInt
from ..scales import normalize_size
from .configuration_pixel_prior import (
    MapSize,
    PixelPriorConfig,
    check_kernel_sizes,
)


class PixelSNAILConfig(PixelPriorConfig):
    r"""
    Configuration of a [`PixelSNAIL`]. The defaults are the widely used PyTorch code's for the top codes of a VQ-VAE-2 of
    256-pixel images; its bottom prior has `map_size=64, condition_map_size=32, attention=False`.

    Args:
        num_labels (`int`, *optional*, defaults to 0):
            Number of classes; 0 makes an unconditional model. Their names are `id2label`, whose length must agree.
        codebook_size (`int`, *optional*, defaults to 512):
            Number of codes of the tokenizer.
        map_size (`int` or `tuple[int, int]`, *optional*, defaults to 32):
            Height and width of the map of codes, one integer for a square map.
        condition_map_size (`int` or `tuple[int, int]`, *optional*):
            Height and width of the coarser map of codes that the model is conditioned on; each side of `map_size` must be
            a multiple. `None` means no such map.
        condition_codebook_size (`int`, *optional*):
            Number of codes of the coarser map. `None` means `codebook_size`.
        hidden_size (`int`, *optional*, defaults to 256):
            Channels between blocks. With attention, a multiple of twice the number of heads.
        residual_size (`int`, *optional*, defaults to 256):
            Channels within the gated residual blocks.
        kernel_size (`int`, *optional*, defaults to 5):
            Side of the convolutions, odd. Blocks of side 3 skip every second code to the left, which only attention sees.
        num_blocks (`int`, *optional*, defaults to 4):
            Number of blocks.
        num_res_blocks (`int`, *optional*, defaults to 4):
            Gated residual blocks per block.
        attention (`bool`, *optional*, defaults to `True`):
            Whether each block ends with attention to all earlier codes.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads, which share `hidden_size / 2` channels.
        num_condition_res_blocks (`int`, *optional*, defaults to 3):
            Gated residual blocks of the conditioning stack.
        condition_hidden_size (`int`, *optional*, defaults to 256):
            Channels of the conditioning stack and of the class embedding.
        num_output_res_blocks (`int`, *optional*, defaults to 0):
            Gated residual blocks before the output projection, of single positions.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout probability in gated residual blocks and of the attention weights. The reference code fixes 0.1 in the
            conditioning stack and the output blocks; here one value serves all.
        class_dropout_prob (`float`, *optional*, defaults to 0.0):
            Probability to replace the class by the unconditional one in training, for classifier-free guidance. Above 0
            the class embeddings have a row more, for no class.

    Raises:
        `ValueError`: If a field is out of its range or fields contradict each other.

    Example:

    ```python
    >>> from hf_var import PixelSNAIL, PixelSNAILConfig

    >>> config = PixelSNAILConfig(map_size=8, condition_map_size=4, attention=False, hidden_size=32, num_blocks=1)
    >>> config.length
    64
    >>> model = PixelSNAIL(config)
    ```
    """

    model_type = "hf_var_pixelsnail"

    map_size: MapSize = 32
    condition_map_size: MapSize | None = None
    condition_codebook_size: PositiveInt | None = None
    hidden_size: PositiveInt = 256
    residual_size: PositiveInt = 256
    kernel_size: PositiveInt = 5
    num_blocks: PositiveInt = 4
    num_res_blocks: PositiveInt = 4
    attention: bool = True
    num_attention_heads: PositiveInt = 8
    num_condition_res_blocks: PositiveInt = 3
    condition_hidden_size: PositiveInt = 256
    num_output_res_blocks: NonNegativeInt = 0
    dropout: PartialShare = 0.1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_kernel_sizes(kernel_size=self.kernel_size)
        if self.attention and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` must be a multiple of twice `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.condition_map_size is not None:
            self.condition_map_size = normalize_size("condition_map_size", self.condition_map_size)
            if self.height % self.condition_map_size[0] or self.width % self.condition_map_size[1]:
                raise ValueError(
                    f"`condition_map_size` must divide `map_size` on both sides, got {self.condition_map_size} and "
                    f"{self.map_size}."
                )

    @property
    def num_condition_codes(self) -> int:
        """Number of codes of the coarser map's codebook."""
        return self.codebook_size if self.condition_codebook_size is None else self.condition_codebook_size

    @property
    def condition_length(self) -> int:
        """Codes of the coarser map, 0 without one."""
        return 0 if self.condition_map_size is None else self.condition_map_size[0] * self.condition_map_size[1]  # pyright: ignore[reportIndexIssue]

    @property
    def has_condition(self) -> bool:
        """Whether anything is given beside the codes: a coarser map, a class or both."""
        return self.condition_length > 0 or self.num_class_embeddings > 0


__all__ = ["PixelSNAILConfig"]
