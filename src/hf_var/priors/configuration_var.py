# SPDX-License-Identifier: Apache-2.0
"""Configuration of the VAR transformer."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from ..loading import CheckedConfigMixin
from ..ranges import NonNegativeFloat, PartialShare, PositiveFloat, PositiveInt
from .configuration_blocks import BlocksMixin
from .label_set import LabelSetMixin


# The file beside an adapter's weights that names the labels it was trained with.
ADAPTER_LABELS_NAME = "labels.json"


class VARConfig(LabelSetMixin, BlocksMixin, CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`VARTransformer`]. The defaults are those of VAR-d16 (Tian et al. 2024, section 4.2): depth d,
    width 64 d, d heads.

    Args:
        num_labels (`int`, *optional*, defaults to 1000):
            Number of classes; 0 makes an unconditional model. Their names are `id2label`, whose length must agree.
        codebook_size (`int`, *optional*, defaults to 4096):
            Number of codes of the tokenizer.
        latent_channels (`int`, *optional*, defaults to 32):
            Length of the tokenizer's code vectors.
        patch_nums (`list`, *optional*, defaults to `(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)`):
            Size of the token map of every scale, coarse to fine: an integer for a square map or a (height, width)
            pair.
        block_sizes (`list[int]`, *optional*):
            Lengths of the blocks that are predicted in one step each. `None` means one block per scale; all ones means
            raster order, one token after the other.
        condition_channels (`int`, *optional*):
            Width of the class embeddings, which a linear layer then brings to `hidden_size`, for embeddings that another
            model made. `None` means `hidden_size`, without a layer.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the transformer.
        num_hidden_layers (`int`, *optional*, defaults to 16):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Attention heads, a divisor of `hidden_size`.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the feed-forward layers as a multiple of `hidden_size`.
        qk_norm (`bool`, *optional*, defaults to `True`):
            Whether queries and keys have unit length, with a learned scale per head.
        shared_adaln (`bool`, *optional*, defaults to `False`):
            Whether one projection of the class serves all layers, each with an offset of its own (VAR-d36), instead of
            one projection per layer.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the layer normalisations.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability after attention and feed-forward layers.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the attention weights.
        drop_path_rate (`float`, *optional*):
            Probability to skip the branches of the last layer in training; it grows linearly from 0 at the first.
            `None` means the rule of the released models, `0.1 * num_hidden_layers / 24`.
        class_dropout_prob (`float`, *optional*, defaults to 0.1):
            Probability to replace the class or its embedding by the unconditional one in training, for classifier-free
            guidance.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the loss.
        initializer_range (`float`, *optional*):
            Standard deviation of the initial weights. `None` means `sqrt(1 / (3 * hidden_size))`.
        initializer_head_factor (`float`, *optional*, defaults to 0.02):
            Factor on the initial weights of the output projection.
        initializer_adaln_factor (`float`, *optional*, defaults to 0.5):
            Factor on the initial AdaLN weights.
        initializer_adaln_gamma_factor (`float`, *optional*, defaults to 1e-5):
            Factor on the initial AdaLN weights that gate the branches. The released models used 1e-3 (d16, d20), 1e-4
            (d24), 1e-5 (d30) and 5e-6 (d36).
        use_cache (`bool`, *optional*, defaults to `False`):
            Whether `forward` makes and returns a cache when none is passed.

    Raises:
        `ValueError`: If a field is out of its range or fields contradict each other.

    Example:

    ```python
    >>> from hf_var import VARConfig, VARTransformer

    >>> config = VARConfig(num_labels=10, patch_nums=(1, 2, 4), hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> config.length
    21
    >>> model = VARTransformer(config)
    ```
    """

    model_type = "hf_var"
    _default_num_labels = 1000
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    codebook_size: PositiveInt = 4096
    latent_channels: PositiveInt = 32
    patch_nums: list[int | list[int]] | tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    block_sizes: Sequence[PositiveInt] | None = None
    condition_channels: PositiveInt | None = None
    hidden_size: PositiveInt = 1024
    num_hidden_layers: PositiveInt = 16
    num_attention_heads: PositiveInt = 16
    mlp_ratio: PositiveFloat = 4.0
    qk_norm: bool = True
    shared_adaln: bool = False
    layer_norm_eps: PositiveFloat = 1e-6
    dropout: PartialShare = 0.0
    attention_dropout: PartialShare = 0.0
    drop_path_rate: PartialShare | None = None
    class_dropout_prob: PartialShare = 0.1
    label_smoothing: PartialShare = 0.0
    initializer_range: PositiveFloat | None = None
    initializer_head_factor: NonNegativeFloat = 0.02
    initializer_adaln_factor: NonNegativeFloat = 0.5
    initializer_adaln_gamma_factor: NonNegativeFloat = 1e-5
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if round(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"`mlp_ratio` times `hidden_size` must be at least 1, got {self.mlp_ratio}.")
        if self.block_sizes is not None and sum(self.block_sizes) != self.length:
            raise ValueError(
                f"`block_sizes` must add up to the {self.length} tokens of patch_nums={self.patch_nums}, got "
                f"{sum(self.block_sizes)} tokens in {len(self.block_sizes)} blocks."
            )

    @property
    def is_causal(self) -> bool:
        """Whether a block sees those before it."""
        return True

    @property
    def block_lengths(self) -> list[int]:
        """Tokens of every block that one step predicts."""
        return self.scale_lengths if self.block_sizes is None else list(self.block_sizes)

    @property
    def condition_size(self) -> int:
        """Width of class embeddings, `class_embeds`."""
        return self.hidden_size if self.condition_channels is None else self.condition_channels

    @property
    def drop_path_rates(self) -> list[float]:
        """Probability to skip the branches of every layer in training."""
        last = 0.1 * self.num_hidden_layers / 24 if self.drop_path_rate is None else self.drop_path_rate
        steps = max(self.num_hidden_layers - 1, 1)
        return [last * layer / steps for layer in range(self.num_hidden_layers)]


__all__ = ["VARConfig"]
