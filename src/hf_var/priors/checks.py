# SPDX-License-Identifier: Apache-2.0
"""Checks of the transformers' arguments, before any work; errors name the argument and what would fit."""

from typing import Any

from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from ..tensor_checks import as_indices, check_floats, check_range
from .configuration_blocks import BlocksMixin
from .configuration_var import VARConfig


# What transformers passes to all of its models.
KEYWORDS = frozenset({*TransformersKwargs.__annotations__, "return_dict"})
# The target of a token that the loss leaves out, torch's default.
IGNORED = -100


def check_blocks(config: BlocksMixin, begin: int, scale_inputs: Any) -> tuple[int, int]:
    """Number of blocks and tokens of a call which begins at position `begin`."""
    ends = [0, *config.block_ends]
    if begin == ends[-1]:
        raise ValueError(f"`cache` is full: it holds all {begin} tokens. Pass a new one or `reset()` it.")
    if begin not in ends:
        raise ValueError(f"`cache` must end with a whole block, at one of {ends[:-1]}, got {begin} tokens.")
    length = config.block_lengths[0] if begin == 0 else 0
    if scale_inputs is not None:
        check_floats("scale_inputs", scale_inputs)
        if scale_inputs.ndim != 3 or scale_inputs.shape[-1] != config.latent_channels:
            raise ValueError(
                f"`scale_inputs` must have the shape (batch, tokens, {config.latent_channels}), got "
                f"{tuple(scale_inputs.shape)}."
            )
        length += scale_inputs.shape[1]
    if length == 0:
        raise ValueError("`scale_inputs` must be passed: only the first block goes without.")
    if begin + length not in ends:
        fitting = [end - begin - (ends[1] if begin == 0 else 0) for end in ends if end > begin]
        raise ValueError(
            f"`scale_inputs` must hold whole blocks after position {begin}, that is one of {fitting} tokens for "
            f"patch_nums={config.patch_nums}, got {length - (ends[1] if begin == 0 else 0)}."
        )
    return ends.index(begin + length) - ends.index(begin), length


def as_targets(labels: Any, shape: tuple[int, ...], codebook_size: int) -> Any:
    """`labels` in int64; a `ValueError` unless they are a batch of codes of `shape`, or -100."""
    labels = as_indices("labels", labels)
    if labels.ndim == 0 or labels.shape[1:] != shape:
        expected = ", ".join(map(str, ("batch", *shape)))
        raise ValueError(f"`labels` must have the shape ({expected}), got {tuple(labels.shape)}.")
    accepted = f"in [0, {codebook_size}), or {IGNORED}"
    check_range("labels", labels.masked_fill(labels == IGNORED, 0), 0, codebook_size - 1, accepted)
    return labels


def as_class_labels(class_labels: Any, num_labels: int, has_unconditional: bool = True) -> Any:
    """`class_labels` in int64; a `ValueError` unless they are a batch of classes, or unconditional where that is known."""
    class_labels = as_indices("class_labels", class_labels)
    if class_labels.ndim != 1:
        raise ValueError(f"`class_labels` must have the shape (batch,), got {tuple(class_labels.shape)}.")
    accepted = f"in [0, {num_labels})" + f", or -1 or {num_labels} for unconditional" * has_unconditional
    check_range("class_labels", class_labels, -has_unconditional, num_labels - (not has_unconditional), accepted)
    return class_labels


def check_class_embeds(class_embeds: Any, config: VARConfig) -> None:
    """Raise a `ValueError` unless `class_embeds` is a batch of class embeddings."""
    check_floats("class_embeds", class_embeds)
    if class_embeds.ndim != 2 or class_embeds.shape[-1] != config.condition_size:
        raise ValueError(
            f"`class_embeds` must have the shape (batch, {config.condition_size}), got {tuple(class_embeds.shape)}."
        )


def check_keywords(model: PreTrainedModel, **keywords: Any) -> None:
    """
    Raise a `TypeError` for keywords that are unknown, and a `ValueError` for attention weights that cannot be had. Other
    attention implementations without weights warn.
    """
    unknown = [name for name in keywords if name not in KEYWORDS]
    if unknown:
        hint = (
            " A cache must be passed as `cache`." if any("cache" in name or "past" in name for name in unknown) else ""
        )
        raise TypeError(f"{type(model).__name__}.forward() got the unknown arguments {unknown}.{hint}")
    implementation = model.config._attn_implementation
    if keywords.get("output_attentions", model.config.output_attentions) and "flex" in str(implementation):
        raise ValueError(
            f"`output_attentions` needs the attention implementation 'eager', not {implementation!r}: call "
            "`set_attn_implementation('eager')`."
        )
