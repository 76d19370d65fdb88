# SPDX-License-Identifier: Apache-2.0
"""Text encoders of transformers: from texts to ids, and from ids to what a transformer that reads texts is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, BatchEncoding, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .fingerprints import fingerprint


logger = logging.get_logger(__name__)

# Components of a pipeline, in the order in which their hidden states stand side by side.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class TextEmbeddings(NamedTuple):
    """Hidden states `(batch, length, width)`, pooled vectors `(batch, width)` and a mask of the tokens."""

    hidden_states: torch.Tensor
    pooled: torch.Tensor
    mask: torch.Tensor

    @property
    def nothing(self) -> "TextEmbeddings":
        """No text at all, for a transformer with `learned_empty_text`."""
        return TextEmbeddings(*(torch.zeros_like(values[:1]) for values in self))

    def to(self, device: torch.device) -> "TextEmbeddings":
        return TextEmbeddings(*(values.to(device) for values in self))


@dataclass
class TextEncoders:
    """Frozen or trained text encoders, each with its tokenizer, and the tokens of a text that they read."""

    pairs: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    length: int

    @property
    def models(self) -> list[PreTrainedModel]:
        return [model for model, _ in self.pairs]

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        return [tokenizer for _, tokenizer in self.pairs]

    @property
    def widths(self) -> dict[str, int]:
        """The fields of a [`TextVARConfig`] that follow from them."""
        widths = [model.config.hidden_size for model in self.models]
        return {"cross_attention_dim": sum(widths), "pooled_projection_dim": widths[-1]}

    @property
    def fingerprint(self) -> str:
        """A digest of everything that affects the embeddings of a text."""
        parts: dict[str, Any] = {"length": self.length}
        weights: dict[str, torch.Tensor] = {}
        for number, (model, tokenizer) in enumerate(self.pairs):
            parts[f"vocabulary_{number}"] = sorted(tokenizer.get_vocab().items())
            weights |= {f"{number}.{name}": tensor for name, tensor in model.state_dict().items()}
        return fingerprint(parts, weights)

    @property
    def components(self) -> dict[str, Any]:
        """The components of a pipeline."""
        found: dict[str, Any] = {}
        for name, (model, tokenizer) in zip(TEXT_ENCODERS, self.pairs, strict=False):
            found |= {name: model, name.replace("text_encoder", "tokenizer"): tokenizer}
        return found


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> BatchEncoding:
    """Ids and attention mask `(batch, length)` of texts, which are cut off or filled up."""
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids]
    if max(lengths) > length:
        logger.warning(f"`prompt` has {max(lengths)} tokens, of which the model reads the first {length}.")
    options: Any = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(list(texts), **options)


def encode_texts(encoders: Sequence[tuple[Any, Any]], texts: Sequence[str], device: torch.device) -> TextEmbeddings:
    """The same of texts, which are cut off where the shortest encoder ends."""
    tokenizers = [tokenizer for _, tokenizer in encoders]
    ids = text_ids(tokenizers, texts, text_length(encoders))
    return encode_ids(encoders, ids.to(device))


def text_length(encoders: Sequence[tuple[Any, Any]]) -> int:
    """Tokens of a text that all of the encoders, each with its tokenizer, read."""
    # Tokenizers that know no limit name an astronomical number.
    limits = [tokenizer.model_max_length for _, tokenizer in encoders]
    limits += [getattr(encoder.config, "max_position_embeddings", None) for encoder, _ in encoders]
    return min(int(limit) for limit in limits if limit is not None)


def text_ids(tokenizers: Sequence[Any], texts: Sequence[str], length: int) -> torch.Tensor:
    """Ids `(batch, tokenizers, length)` of texts, which are cut off or filled up with -1."""
    found = []
    for tokenizer in tokenizers:
        tokens: Any = tokenize(tokenizer, texts, length)
        found.append(tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -1))
    return torch.stack(found, dim=1)


def encode_ids(encoders: Sequence[tuple[Any, Any]], ids: torch.Tensor) -> TextEmbeddings:
    """
    Hidden states by all encoders, each with its tokenizer, after their last normalisation, side by side; pooled
    vectors and the mask of padding are those of the last one. `ids` are those of [`text_ids`].
    """
    hidden_states: list[torch.Tensor] = []
    pooled = mask = None
    for (encoder, tokenizer), own in zip(encoders, ids.unbind(1), strict=True):
        mask = (own >= 0).long()
        output = encoder(input_ids=own.masked_fill(own < 0, tokenizer.pad_token_id), attention_mask=mask)
        hidden_states.append(output.last_hidden_state)
        pooled = getattr(output, "pooler_output", None)
    if pooled is None or mask is None:
        raise ValueError("The last text encoder must return a `pooler_output`, as `CLIPTextModel` does.")
    return TextEmbeddings(torch.cat(hidden_states, dim=-1), pooled, mask)


def check_padding(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if a tokenizer cannot fill texts up."""
    if tokenizer.pad_token_id is None:
        raise ValueError(f"`{name}` must have a `pad_token`, since texts are filled up to one length.")


def load_text_encoder(source: str, argument: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A `CLIPTextModel` and its tokenizer, in one folder or repository, which `argument` names."""
    # transformers would go on with random weights in place of those that are not there.
    loaded: Any = CLIPTextModel.from_pretrained(source, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:
        missing = shorten(str(sorted(report["missing_keys"])), 80)
        raise ValueError(f"{argument} {source!r} lacks weights of a CLIPTextModel: {missing}.")
    return model, AutoTokenizer.from_pretrained(source)


def load_text_encoders(
    first: str | None,
    second: str | None,
    max_length: int | None,
    default: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]] = (),
) -> TextEncoders:
    """The text encoders that `text_encoder` and `text_encoder_2` name, else the `default`, for texts of `max_length`."""
    sources = dict(zip(TEXT_ENCODERS, (first, second), strict=True))
    named = {f"`{name}` =": source for name, source in sources.items() if source is not None}
    pairs = [load_text_encoder(source, name) for name, source in named.items()] or list(default)
    if not pairs:
        raise ValueError("`text_encoder` must name a CLIPTextModel for `caption_column`, got None.")
    for name, (_, tokenizer) in zip(TEXT_ENCODERS, pairs, strict=False):
        check_padding(name.replace("text_encoder", "tokenizer"), tokenizer)
    most = text_length(pairs)
    length = max_length or most
    if length > most:
        raise ValueError(f"`max_caption_length` must be at most {most}, which the text encoders read, got {length}.")
    for model, tokenizer in pairs:
        # The pipeline that is saved fills texts up to the same length.
        tokenizer.model_max_length = length
        model.float().requires_grad_(False)
    return TextEncoders(pairs, length)
