# SPDX-License-Identifier: Apache-2.0
"""Texts as a transformer reads them: prompts through text encoders, or embeddings that were made before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

from ..priors import TextVARConfig
from ..text_encoders import TEXT_ENCODERS, TextEmbeddings, check_padding, encode_texts
from .checks import as_tensor
from .condition_inputs import as_texts
from .conditions import Condition


# Embeddings of the texts of several arguments, by their names.
TextEncoding = Callable[[Mapping[str, Sequence[str]]], Mapping[str, TextEmbeddings]]
# What a call without `original_size` means: the model is told of no crop.
SQUARE = (512, 512)


@dataclass(frozen=True)
class Prompts:
    """What a call was given: texts, or embeddings in their place. See [`VARTextToImagePipeline.encode_prompt`]."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.Tensor | None = None
    negative_prompt_attention_mask: torch.Tensor | None = None

    def given(self, config: TextVARConfig, prefix: str = "") -> TextEmbeddings | None:
        """The embeddings whose names begin with `prefix`; a `ValueError` unless there are all of them or none."""
        names = [f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds", f"{prefix}prompt_attention_mask"]
        found = {name: getattr(self, name) for name in names}
        missing = [name for name, value in found.items() if value is None]
        if len(missing) == len(names):
            return None
        if missing:
            there = next(name for name in names if name not in missing)
            raise ValueError(
                f"`{missing[0]}` must be passed beside `{there}`: `encode_prompt` returns hidden states, pooled "
                "vectors and masks of padding together."
            )
        if getattr(self, f"{prefix}prompt") is not None:
            raise ValueError(f"Pass one of `{prefix}prompt` and `{prefix}prompt_embeds`, not both.")
        hidden_states, pooled, mask = (found[name] for name in names)
        widths = {names[0]: config.cross_attention_dim, names[1]: config.pooled_projection_dim}
        for (name, width), value, number in zip(widths.items(), (hidden_states, pooled), (3, 2), strict=True):
            _check_floats(name, value, number, width)
        if len(pooled) != len(hidden_states):
            raise ValueError(
                f"`{names[1]}` must be those of as many texts as `{names[0]}`, {len(hidden_states)}, got "
                f"{len(pooled)}."
            )
        mask = _checked_mask(names[2], mask, hidden_states, names[0])
        if not config.learned_empty_text and not mask.bool().any(dim=1).all():
            raise ValueError(f"`{names[2]}` must be 1 for at least one token of each text.")
        return TextEmbeddings(hidden_states, pooled, mask)


def check_text_encoders(
    config: TextVARConfig, encoders: Sequence[Any], tokenizers: Sequence[PreTrainedTokenizerBase | None]
) -> None:
    """Raise a `ValueError` unless the encoders that there are make what the transformer of `config` reads."""
    names, widths = [], []
    for number, (encoder, tokenizer) in enumerate(zip(encoders, tokenizers, strict=True), start=1):
        suffix = "" if number == 1 else f"_{number}"
        if encoder is None:
            continue
        if isinstance(encoder, CLIPTextModelWithProjection):
            raise ValueError(
                f"`text_encoder{suffix}` must be a `CLIPTextModel`, whose pooled vector is not projected, got a "
                "CLIPTextModelWithProjection: load the same folder by `CLIPTextModel.from_pretrained`, since the "
                "weights are the same."
            )
        width = getattr(getattr(encoder, "config", None), "hidden_size", None)
        if not isinstance(width, int):
            raise ValueError(
                f"`text_encoder{suffix}` must be a text encoder such as `CLIPTextModel`, got {type(encoder).__name__}."
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"`tokenizer{suffix}` must be the tokenizer of `text_encoder{suffix}`, got {type(tokenizer).__name__}."
            )
        check_padding(f"tokenizer{suffix}", tokenizer)
        names.append(f"text_encoder{suffix}")
        widths.append(width)
    if names and (sum(widths) != config.cross_attention_dim or widths[-1] != config.pooled_projection_dim):
        listed = " and ".join(f"`{name}`" for name in names)
        raise ValueError(
            f"{listed} must have hidden states of {config.cross_attention_dim} channels side by side, and pooled "
            f"vectors of {config.pooled_projection_dim} from the last one, for `transformer`, got the widths {widths}."
        )


def run_text_encoders(
    components: Mapping[str, Any], texts: Mapping[str, Sequence[str]], device: torch.device
) -> dict[str, TextEmbeddings]:
    """The embeddings of the texts of several arguments, by the text encoders among the `components` of a pipeline."""
    pairs = [(components[name], components[name.replace("text_encoder", "tokenizer")]) for name in TEXT_ENCODERS]
    pairs = [pair for pair in pairs if pair[0] is not None]
    if not pairs:
        raise ValueError(f"`{next(iter(texts))}_embeds` must be passed to a pipeline without text encoders.")
    return {name: encode_texts(pairs, values, device) for name, values in texts.items()}


def embed_prompts(
    prompts: Prompts, config: TextVARConfig, guided: bool, encode: TextEncoding
) -> tuple[TextEmbeddings, TextEmbeddings | None]:
    """What the transformer reads of the texts and, if `guided`, of the negative ones (one may serve all)."""
    texts = {}
    text = prompts.given(config)
    negative = prompts.given(config, "negative_") if guided else None
    if text is None:
        texts["prompt"] = as_texts("prompt", prompts.prompt)
    is_learned = config.learned_empty_text and prompts.negative_prompt is None
    if guided and negative is None and not is_learned:
        empty = prompts.negative_prompt is None
        texts["negative_prompt"] = [""] if empty else as_texts("negative_prompt", prompts.negative_prompt)
    encoded = encode(texts) if texts else {}
    text = encoded["prompt"] if text is None else text
    negative = encoded.get("negative_prompt", negative)
    if guided and negative is None:
        negative = text.nothing
    if negative is not None:
        check_negative(text, negative)
    return text, negative


def prompt_condition(
    prompts: Prompts, original_size: Any, config: TextVARConfig, guided: bool, encode: TextEncoding
) -> Condition:
    """The condition of the images of texts, for a transformer of `config`; with negative texts if `guided`."""
    text, negative = embed_prompts(prompts, config, guided, encode)
    crop_sizes = None
    if config.crop_conditioning:
        crop_sizes = size_pairs(SQUARE if original_size is None else original_size, len(text.pooled))
    elif original_size is not None:
        raise ValueError(f"`original_size` needs a transformer with crop_conditioning=True, got {original_size!r}.")
    return text_condition(text, negative, crop_sizes, "prompt" if prompts.prompt_embeds is None else "prompt_embeds")


def text_condition(
    text: TextEmbeddings, negative: TextEmbeddings | None, crop_sizes: torch.Tensor | None, name: str
) -> Condition:
    """
    The condition of the images of texts; `name` is the argument that gave them. Without `negative` there is no
    guidance. Functions that score images get the number of each image's text.
    """

    def entries(embeddings: TextEmbeddings) -> dict[str, torch.Tensor]:
        arguments = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
        crops = {} if crop_sizes is None else {"crop_sizes": crop_sizes}
        return {**dict(zip(arguments, embeddings, strict=True)), **crops}

    numbers = torch.arange(len(text.pooled))
    return Condition(entries(text), lambda: entries(text if negative is None else negative), numbers, name=name)


def check_negative(text: TextEmbeddings, negative: TextEmbeddings) -> None:
    """Raise a `ValueError` unless there is one negative text for all, or one for each, of the same length."""
    if len(negative.pooled) not in (1, len(text.pooled)):
        raise ValueError(
            f"`negative_prompt` must be one text or {len(text.pooled)}, one for each prompt, got "
            f"{len(negative.pooled)}."
        )
    if negative.mask.shape[1] != text.mask.shape[1]:
        raise ValueError(
            f"`negative_prompt_embeds` must be as long as the {text.mask.shape[1]} tokens of the prompts, got "
            f"{negative.mask.shape[1]}."
        )


def size_pairs(original_size: Any, number: int) -> torch.Tensor:
    """Heights and widths `(number, 2)` of one (height, width) pair or of one for each text."""
    sizes: Any = as_tensor(original_size)
    kinds = (torch.int64, torch.int32)
    if sizes is None or sizes.shape not in ((2,), (1, 2), (number, 2)) or sizes.dtype not in kinds or sizes.min() < 1:
        raise ValueError(
            f"`original_size` must be a (height, width) pair of positive integers, or {number} of them, got "
            f"{original_size!r}."
        )
    return sizes.long().expand(number, 2)


def _check_floats(name: str, value: Any, number: int, width: int) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"`{name}` must be a tensor of floating-point numbers, got {kind}.")
    if value.ndim != number or value.shape[-1] != width or value.numel() == 0:
        shape = ", ".join(["batch", "length", str(width)] if number == 3 else ["batch", str(width)])
        raise ValueError(f"`{name}` must have the shape ({shape}), got {tuple(value.shape)}.")
    if not value.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity among them.")


def _checked_mask(name: str, mask: Any, hidden_states: torch.Tensor, of: str) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.is_floating_point() or mask.is_complex():
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"`{name}` must be a tensor of 0 and 1, got {kind}.")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`{name}` must have the shape {tuple(hidden_states.shape[:2])} of `{of}`, got {tuple(mask.shape)}."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"`{name}` must be 0 or 1.")
    return mask
