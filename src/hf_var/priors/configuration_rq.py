# SPDX-License-Identifier: Apache-2.0
"""Configuration of the RQ-Transformer."""

import copy
from typing import Annotated

from transformers import PreTrainedConfig

from ..loading import CheckedConfigMixin
from ..ranges import NonNegativeFloat, NonNegativeInt, OneOf, PartialShare, PositiveFloat, PositiveInt
from ..scales import ScheduleMixin
from .label_set import LabelSetMixin


class RQTransformerConfig(LabelSetMixin, ScheduleMixin, CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of an [`RQTransformer`]. The defaults are those of the released ImageNet model of 480 M parameters (Lee et
    al. 2022). With one map, no depth layers and `shared_embedding` it is the GPT of VQGAN (Esser et al. 2021).

    Args:
        num_labels (`int`, *optional*):
            Number of classes, which are the condition; 0 makes an unconditional model or one whose condition is
            `condition_ids`. 1000 by default, 0 if another field says what the condition is. Their names are `id2label`,
            whose length must agree.
        codebook_size (`int`, *optional*, defaults to 16384):
            Number of codes of the tokenizer.
        latent_channels (`int`, *optional*, defaults to 256):
            Length of the tokenizer's code vectors.
        patch_nums (`list`, *optional*, defaults to `(8, 8, 8, 8)`):
            Size of the tokenizer's maps, one for each depth, all equal: an integer for square maps or a (height, width)
            pair.
        condition_length (`int`, *optional*, defaults to 1):
            Number of condition tokens before the image.
        condition_vocab_size (`int`, *optional*):
            Number of ids that a condition token can have, for instance those of a text tokenizer. `None` means the classes.
        shared_embedding (`bool`, *optional*, defaults to `False`):
            Whether condition tokens are codes, embedded by the codes' table, as in VQGAN's GPT, where class 3 is code 3 and
            the start token of unconditional models is code 0.
        bidirectional_condition (`bool`, *optional*, defaults to `False`):
            Whether condition tokens see each other in both directions.
        condition_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight, of 1, of the loss of the condition tokens after the first one, which the model then predicts as well.
        max_position_embeddings (`int`, *optional*):
            Number of position embeddings. `None` means the tokens that are read: condition and image without the last code.
        code_inputs (`str`, *optional*, defaults to `"vectors"`):
            How codes are read: `"vectors"`, as the tokenizer's code vectors, or `"tokens"`, by an embedding table.
        separate_depth_embeddings (`bool`, *optional*, defaults to `False`):
            Whether each depth has an embedding table of its own, for `"tokens"`.
        cumulative_depth_inputs (`bool`, *optional*, defaults to `True`):
            Whether the depth layers read the sum of all codes of the position so far instead of the last one.
        separate_depth_heads (`bool`, *optional*, defaults to `False`):
            Whether each depth has an output projection of its own.
        head_bias (`bool`, *optional*, defaults to `True`):
            Whether output projections have a bias.
        hidden_size (`int`, *optional*, defaults to 1536):
            Width of the transformer.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of layers over the positions.
        num_depth_layers (`int`, *optional*, defaults to 4):
            Number of layers over the depths of a position; may be 0 for one depth.
        num_attention_heads (`int`, *optional*, defaults to 24):
            Attention heads, a divisor of `hidden_size`.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the feed-forward layers as a multiple of `hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward layers, `"gelu"` or `"quick_gelu"`.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer normalisations.
        dropout, attention_dropout, embedding_dropout (`float`, *optional*, defaults to 0.1, 0.0 and 0.0):
            Dropout probabilities after attention and feed-forward layers, of the attention weights and of the inputs.
        class_dropout_prob (`float`, *optional*, defaults to 0.0):
            Probability to replace the condition by the unconditional one in training, for classifier-free guidance. The
            embedding table has a row for this condition if it is above 0.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the loss.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        use_cache (`bool`, *optional*, defaults to `False`):
            Whether `forward` makes and returns a cache when none is passed.

    Raises:
        `ValueError`: If a field is out of its range or fields contradict each other.

    Example:

    ```python
    >>> from hf_var import RQTransformer, RQTransformerConfig

    >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_depth_layers": 1, "num_attention_heads": 2}
    >>> config = RQTransformerConfig(num_labels=10, patch_nums=(4, 4, 4), latent_channels=8, codebook_size=32, **sizes)
    >>> config.num_positions, config.depth
    (16, 3)
    >>> model = RQTransformer(config)
    ```
    """

    model_type = "hf_var_rq"
    _default_num_labels = 1000
    keys_to_ignore_at_inference = ["context", "condition_logits", "cache", "past_key_values"]

    codebook_size: PositiveInt = 16384
    latent_channels: PositiveInt = 256
    patch_nums: list[int | list[int]] | tuple[int | tuple[int, int], ...] = (8, 8, 8, 8)
    condition_length: PositiveInt = 1
    condition_vocab_size: PositiveInt | None = None
    shared_embedding: bool = False
    bidirectional_condition: bool = False
    condition_loss_weight: PartialShare = 0.0
    max_position_embeddings: PositiveInt | None = None
    code_inputs: Annotated[str, OneOf("vectors", "tokens")] = "vectors"
    separate_depth_embeddings: bool = False
    cumulative_depth_inputs: bool = True
    separate_depth_heads: bool = False
    head_bias: bool = True
    hidden_size: PositiveInt = 1536
    num_hidden_layers: PositiveInt = 12
    num_depth_layers: NonNegativeInt = 4
    num_attention_heads: PositiveInt = 24
    mlp_ratio: PositiveFloat = 4.0
    hidden_act: Annotated[str, OneOf("gelu", "quick_gelu")] = "gelu"
    layer_norm_eps: PositiveFloat = 1e-5
    dropout: PartialShare = 0.1
    attention_dropout: PartialShare = 0.0
    embedding_dropout: PartialShare = 0.0
    class_dropout_prob: PartialShare = 0.0
    label_smoothing: PartialShare = 0.0
    initializer_range: NonNegativeFloat = 0.02
    use_cache: bool = False

    def __post_init__(self, num_labels: int | None = None, **kwargs):
        if num_labels is None and (self.condition_vocab_size is not None or self.condition_length != 1):
            num_labels = 0 if self.id2label is None else None
        super().__post_init__(num_labels=num_labels, **kwargs)
        if any(size != self.scale_sizes[0] for size in self.scale_sizes):
            raise ValueError(f"`patch_nums` must be maps of one size, one for each depth, got {self.patch_nums}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.num_depth_layers == 0 and self.depth > 1:
            raise ValueError(f"`num_depth_layers` must be at least 1 for {self.depth} depths, got 0.")
        if self.separate_depth_embeddings and self.code_inputs != "tokens":
            raise ValueError("`separate_depth_embeddings` needs `code_inputs='tokens'`, got 'vectors'.")
        self._check_condition()
        num_read = self.condition_length + self.num_positions - 1
        if self.max_position_embeddings is not None and self.max_position_embeddings < num_read:
            raise ValueError(
                f"`max_position_embeddings` must be at least {num_read}, the tokens that are read, got "
                f"{self.max_position_embeddings}."
            )

    def _check_condition(self) -> None:
        num_labels = self.num_labels or 0
        if self.shared_embedding:
            if self.code_inputs != "tokens" or self.separate_depth_embeddings:
                raise ValueError("`shared_embedding` needs `code_inputs='tokens'` with one table for all depths.")
            if self.class_dropout_prob > 0:
                raise ValueError(
                    f"`class_dropout_prob` must be 0 with `shared_embedding`, whose table has no row for the unconditional "
                    f"condition, got {self.class_dropout_prob}."
                )
            if num_labels > self.codebook_size:
                raise ValueError(
                    f"`num_labels` must be at most the {self.codebook_size} codes of the table that it shares with them, got "
                    f"{num_labels}."
                )
        if self.condition_vocab_size is not None and (num_labels > 0 or self.shared_embedding):
            raise ValueError(
                f"`condition_vocab_size` must be None where classes or codes are the condition, got "
                f"{self.condition_vocab_size}."
            )
        if self.condition_length > 1:
            if num_labels > 0 or (self.condition_vocab_size is None and not self.shared_embedding):
                raise ValueError(
                    f"`condition_length` above 1 needs `condition_vocab_size` or `shared_embedding` and no labels, got "
                    f"{self.condition_length} with num_labels={num_labels}."
                )
        elif self.condition_loss_weight > 0:
            raise ValueError(
                f"`condition_loss_weight` must be 0 with one condition token, which nothing predicts, got "
                f"{self.condition_loss_weight}."
            )

    @property
    def depth(self) -> int:
        """Codes of a position."""
        return len(self.patch_nums)

    @property
    def num_positions(self) -> int:
        """Positions of an image."""
        return self.scale_lengths[0]

    @property
    def length(self) -> int:
        """Codes of an image."""
        return sum(self.scale_lengths)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_classes(self) -> bool:
        """Whether the condition is one class, or nothing, instead of `condition_ids`."""
        return bool(self.num_labels) or (self.condition_vocab_size is None and self.condition_length == 1)

    @property
    def num_condition_ids(self) -> int:
        """Ids that a condition token can have; 0 for unconditional models with a table of their own."""
        if self.shared_embedding:
            return self.codebook_size
        return (self.num_labels or 0) if self.condition_vocab_size is None else self.condition_vocab_size

    @property
    def unconditional_id(self) -> int | None:
        """
        Row of the condition's table for the unconditional condition: the last one, or code 0 where codes and condition share
        the table; `None` for models that know none.
        """
        if self.shared_embedding:
            return None if self.num_labels or self.condition_length > 1 else 0
        return self.num_condition_ids if self.class_dropout_prob > 0 or self.num_condition_ids == 0 else None

    @property
    def depth_config(self) -> "RQTransformerConfig":
        """A copy whose number of layers is that of the depth layers, to make a `StaticCache` for these."""
        config = copy.copy(self)
        config.num_hidden_layers = self.num_depth_layers
        return config


__all__ = ["RQTransformerConfig"]
