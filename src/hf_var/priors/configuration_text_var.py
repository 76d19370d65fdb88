# SPDX-License-Identifier: Apache-2.0
"""Configuration of the VAR transformer that reads texts."""

from transformers import PreTrainedConfig

from ..loading import CheckedConfigMixin
from ..ranges import NonNegativeFloat, PartialShare, PositiveFloat, PositiveInt
from .configuration_blocks import BlocksMixin
from .label_set import LabelSetMixin


class TextVARConfig(LabelSetMixin, BlocksMixin, CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`TextVARTransformer`]. The defaults are those of Switti for 512 pixels (Voronov et al. 2024):
    depth d, width 64 d, d heads, and the text encoders of SDXL.

    Args:
        codebook_size (`int`, *optional*, defaults to 4096):
            Number of codes of the tokenizer.
        latent_channels (`int`, *optional*, defaults to 32):
            Length of the tokenizer's code vectors.
        patch_nums (`list`, *optional*, defaults to `(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)`):
            Size of the token map of every scale, coarse to fine: an integer for a square map or a (height, width)
            pair.
        cross_attention_dim (`int`, *optional*, defaults to 2048):
            Width of the hidden states of the text, `encoder_hidden_states`; of several text encoders, the sum of
            theirs.
        pooled_projection_dim (`int`, *optional*, defaults to 1280):
            Width of the vector of the whole text, `pooled_projections`.
        hidden_size (`int`, *optional*, defaults to 1920):
            Width of the transformer.
        intermediate_size (`int`, *optional*):
            Width of the feed-forward layers. `None` means 8/3 of `hidden_size`, rounded down.
        num_hidden_layers (`int`, *optional*, defaults to 30):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 30):
            Attention heads, a divisor of `hidden_size`; their width must be a multiple of 4.
        is_causal (`bool`, *optional*, defaults to `False`):
            Whether tokens attend to the scales before their own, too. Otherwise they know of these by their inputs
            alone, and a cache holds no keys and values of tokens.
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary positions' frequencies.
        rope_size (`float`, *optional*, defaults to 128.0):
            Position of the last column and row in every scale; the first is at 0.
        crop_conditioning (`bool`, *optional*, defaults to `True`):
            Whether the model is told the size of the picture that an image was cropped from, `crop_sizes`.
        learned_empty_text (`bool`, *optional*, defaults to `False`):
            Whether learned vectors take the place of a text without tokens, which training and guidance then have for no
            text at all, as VAR-CLIP has it. Otherwise that is the empty text, as the text encoders see it.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the normalisations before and after every branch.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the normalisations of queries, of keys and before the output projection.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability after attention and feed-forward layers.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the attention weights.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the loss.
        initializer_range (`float`, *optional*):
            Standard deviation of the initial weights. `None` means `sqrt(1 / (3 * hidden_size))`.
        initializer_head_factor (`float`, *optional*, defaults to 0.02):
            Factor on the initial weights of the output projection.
        initializer_adaln_factor (`float`, *optional*, defaults to 0.5):
            Factor on the initial AdaLN weights.
        initializer_adaln_gamma_factor (`float`, *optional*, defaults to 1e-5):
            Factor on the initial AdaLN weights that gate the branches.
        initializer_cross_attention_factor (`float`, *optional*, defaults to 1.0):
            Initial weights of the normalisation after cross-attention, a branch without a gate: at 1, as in the
            released models, it is as large as the tokens themselves from the first step on.
        use_cache (`bool`, *optional*, defaults to `False`):
            Whether `forward` makes and returns a cache when none is passed.

    Raises:
        `ValueError`: If a field is out of its range or fields contradict each other.

    Example:

    ```python
    >>> from hf_var import TextVARConfig, TextVARTransformer

    >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_nums": (1, 2, 4)}
    >>> config = TextVARConfig(cross_attention_dim=48, pooled_projection_dim=32, **sizes)
    >>> config.length
    21
    >>> model = TextVARTransformer(config)
    ```
    """

    model_type = "hf_var_text_var"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    codebook_size: PositiveInt = 4096
    latent_channels: PositiveInt = 32
    patch_nums: list[int | list[int]] | tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    cross_attention_dim: PositiveInt = 2048
    pooled_projection_dim: PositiveInt = 1280
    hidden_size: PositiveInt = 1920
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt = 30
    num_attention_heads: PositiveInt = 30
    is_causal: bool = False
    rope_theta: PositiveFloat = 10000.0
    rope_size: PositiveFloat = 128.0
    crop_conditioning: bool = True
    learned_empty_text: bool = False
    rms_norm_eps: PositiveFloat = 1e-6
    layer_norm_eps: PositiveFloat = 1e-6
    dropout: PartialShare = 0.0
    attention_dropout: PartialShare = 0.0
    label_smoothing: PartialShare = 0.0
    initializer_range: PositiveFloat | None = None
    initializer_head_factor: NonNegativeFloat = 0.02
    initializer_adaln_factor: NonNegativeFloat = 0.5
    initializer_adaln_gamma_factor: NonNegativeFloat = 1e-5
    initializer_cross_attention_factor: NonNegativeFloat = 1.0
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.id2label:
            raise ValueError(
                f"`num_labels` must be 0 for a model whose condition is a text, got {len(self.id2label)} labels."
            )
        if self.head_dim % 4:
            raise ValueError(
                f"`hidden_size` must be a multiple of 4 `num_attention_heads`, since rotary positions turn pairs of "
                f"channels by column and by row, got {self.hidden_size} and {self.num_attention_heads}."
            )
        if self.crop_conditioning and self.hidden_size % 8:
            raise ValueError(f"`hidden_size` must be a multiple of 8 for `crop_conditioning`, got {self.hidden_size}.")

    @property
    def has_classes(self) -> bool:
        """Whether the condition is a class."""
        return False

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.hidden_size * 8 // 3 if self.intermediate_size is None else self.intermediate_size


__all__ = ["TextVARConfig"]
