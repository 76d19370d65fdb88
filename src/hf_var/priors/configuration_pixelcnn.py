# SPDX-License-Identifier: Apache-2.0
"""Configuration of the gated PixelCNN."""

from ..ranges import PositiveInt
from .configuration_pixel_prior import PixelPriorConfig, check_kernel_sizes


class PixelCNNConfig(PixelPriorConfig):
    r"""
    Configuration of a [`PixelCNN`]. The defaults are those of the widely used PyTorch code for the codes of a VQ-VAE.

    Args:
        num_labels (`int`, *optional*, defaults to 0):
            Number of classes; 0 makes an unconditional model. Their names are `id2label`, whose length must agree.
        codebook_size (`int`, *optional*, defaults to 512):
            Number of codes of the tokenizer.
        map_size (`int` or `tuple[int, int]`, *optional*, defaults to 8):
            Height and width of the map of codes, one integer for a square map.
        hidden_size (`int`, *optional*, defaults to 64):
            Channels of both stacks.
        num_hidden_layers (`int`, *optional*, defaults to 15):
            Number of layers.
        kernel_size (`int`, *optional*, defaults to 3):
            Side of the convolutions, odd.
        first_kernel_size (`int`, *optional*, defaults to 7):
            Side of the first layer's convolutions, odd.
        head_hidden_size (`int`, *optional*, defaults to 512):
            Channels between the two output projections.
        class_dropout_prob (`float`, *optional*, defaults to 0.0):
            Probability to replace the class by the unconditional one in training, for classifier-free guidance. Above 0
            the class embeddings have a row more, for no class.

    Raises:
        `ValueError`: If a field is out of its range.

    Example:

    ```python
    >>> from hf_var import PixelCNN, PixelCNNConfig

    >>> config = PixelCNNConfig(num_labels=10, map_size=(4, 6), hidden_size=16, num_hidden_layers=3)
    >>> config.length
    24
    >>> model = PixelCNN(config)
    ```
    """

    model_type = "hf_var_pixelcnn"

    hidden_size: PositiveInt = 64
    num_hidden_layers: PositiveInt = 15
    kernel_size: PositiveInt = 3
    first_kernel_size: PositiveInt = 7
    head_hidden_size: PositiveInt = 512

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_kernel_sizes(kernel_size=self.kernel_size, first_kernel_size=self.first_kernel_size)


__all__ = ["PixelCNNConfig"]
