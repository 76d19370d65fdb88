# SPDX-License-Identifier: Apache-2.0
"""Training on captions: text encoders, and what a transformer is told of a text."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from .. import data
from ..autoencoders import VQVAEModel
from ..pipelines.text_encoding import TextEmbeddings, encode_ids, text_ids, text_length
from ..priors import TextVARTransformer
from ..priors.modeling_outputs import VARTransformerOutput
from ..ranges import CheckedFields, PartialShare, PositiveInt, argument
from .prior_inputs import prior_inputs


@dataclass(kw_only=True)
class CaptionConfig(CheckedFields):
    """Captions in place of classes."""

    caption_column: str | None = argument(
        None, help="column of texts that the images are conditioned on: a TextVARTransformer is trained"
    )
    text_encoder: str | None = argument(
        None, help="folder or repository of a CLIPTextModel with its tokenizer; default: those of pretrained_var"
    )
    text_encoder_2: str | None = argument(
        None, help="a second one, whose pooled vector is read in place of the first's"
    )
    train_text_encoder: bool = argument(False, help="train the text encoders with the transformer")
    max_caption_length: PositiveInt | None = argument(
        None, help="tokens of a caption; default: as many as the text encoders read"
    )
    caption_dropout_prob: PartialShare = argument(
        0.1, help="read the empty text in place of a caption with this probability, for guidance"
    )
    sample_prompts: list[str] | None = argument(None, help="texts of the samples; default: captions of the data")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_encoder", "text_encoder_2", "train_text_encoder", "max_caption_length", "sample_prompts"):
            if self.caption_column is None and getattr(self, name):
                raise ValueError(f"`{name}` = {getattr(self, name)!r} needs a `caption_column`.")
        if self.text_encoder_2 is not None and self.text_encoder is None:
            raise ValueError(f"`text_encoder_2` = {self.text_encoder_2!r} needs a first `text_encoder`.")


@dataclass
class TextEncoders:
    """Text encoders, each with its tokenizer, and the tokens of a text that they read."""

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
    def components(self) -> dict[str, Any]:
        """The components of a pipeline."""
        found: dict[str, Any] = {}
        for suffix, (model, tokenizer) in zip(("", "_2"), self.pairs, strict=False):
            found |= {f"text_encoder{suffix}": model, f"tokenizer{suffix}": tokenizer}
        return found


def load_text_encoders(config: CaptionConfig, pretrained: Any = None) -> TextEncoders:
    """The text encoders that the arguments name, or those of the pipeline that is trained further."""
    if config.text_encoder is not None:
        sources = {"text_encoder": config.text_encoder, "text_encoder_2": config.text_encoder_2}
        pairs = [load_text_encoder(source, name) for name, source in sources.items() if source is not None]
    else:
        found = [] if pretrained is None else [pretrained.text_encoder, pretrained.text_encoder_2]
        tokenizers = [] if pretrained is None else [pretrained.tokenizer, pretrained.tokenizer_2]
        pairs = [pair for pair in zip(found, tokenizers, strict=True) if pair[0] is not None]
    if not pairs:
        raise ValueError("`text_encoder` must name a CLIPTextModel for `caption_column`, got None.")
    for name, (_, tokenizer) in zip(("text_encoder", "text_encoder_2"), pairs, strict=False):
        if tokenizer.pad_token_id is None:
            raise ValueError(f"The tokenizer of `{name}` must have a `pad_token`.")
    most = text_length(pairs)
    length = config.max_caption_length or most
    if length > most:
        raise ValueError(f"`max_caption_length` must be at most {most}, which the text encoders read, got {length}.")
    for model, tokenizer in pairs:
        # The pipeline that is saved fills texts up to the same length.
        tokenizer.model_max_length = length
        model.float().requires_grad_(config.train_text_encoder)
    return TextEncoders(pairs, length)


def load_text_encoder(source: str, argument: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A `CLIPTextModel` and its tokenizer, in one folder or repository."""
    # transformers would go on with random weights in place of those that are not there.
    loaded: Any = CLIPTextModel.from_pretrained(source, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"`{argument}` = {source!r} lacks weights of a CLIPTextModel, such as {missing[0]}.")
    return model, AutoTokenizer.from_pretrained(source)


class CaptionedTransformer(nn.Module):
    """A transformer and the text encoders that are trained with it, called as one."""

    def __init__(self, transformer: TextVARTransformer, encoders: TextEncoders):
        super().__init__()
        self.transformer = transformer
        self.text_encoders = nn.ModuleList(encoders.models)
        self.encoders = encoders

    @property
    def config(self) -> Any:
        """That of the transformer."""
        return self.transformer.config

    def forward(self, caption_ids: torch.Tensor, **inputs: torch.Tensor) -> VARTransformerOutput:
        return self.transformer(**text_arguments(encode_ids(self.encoders.pairs, caption_ids)), **inputs)


@dataclass
class CaptionInputs:
    """
    The arguments of a transformer for a batch of `codes` or `pixel_values` and of `caption_ids`, some of which become the
    empty text, by torch's own generator, as dropout has it. Text encoders that are trained come later.
    """

    vqvae: VQVAEModel
    encoders: TextEncoders
    is_encoded: bool
    dropout_prob: float = 0.0

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        inputs = prior_inputs(self.vqvae, batch)
        ids = inputs.pop("caption_ids")
        if self.dropout_prob > 0:
            empty = text_ids(self.encoders.tokenizers, [""], self.encoders.length).to(ids.device)
            is_dropped = torch.rand(len(ids), 1, 1, device=ids.device) < self.dropout_prob
            ids = torch.where(is_dropped, empty, ids)
        if not self.is_encoded:
            return {**inputs, "caption_ids": ids}
        return {**inputs, **text_arguments(encode_ids(self.encoders.pairs, ids))}


def text_arguments(embeddings: TextEmbeddings) -> dict[str, torch.Tensor]:
    """The arguments of a [`TextVARTransformer`]."""
    return {
        "encoder_hidden_states": embeddings.hidden_states,
        "encoder_attention_mask": embeddings.mask,
        "pooled_projections": embeddings.pooled,
    }


def first_captions(dataset: data.AnyDataset, column: str, number: int) -> list[str]:
    """The first captions of a data set."""
    return [cast(Any, row)[column] for row in dataset.select_columns([column]).take(number)]


def read_captions(encoders: TextEncoders) -> Any:
    """What makes the condition of a column of captions, for [`load_prior_data`]."""

    def make(dataset: data.AnyDataset, column: str, augment: data.AugmentConfig | None) -> data.Condition:
        return data.caption_condition(dataset, column, encoders.tokenizers, encoders.length)

    return make


def trained_module(transformer: TextVARTransformer, encoders: TextEncoders, config: CaptionConfig) -> nn.Module:
    """What is optimized: the transformer, with the text encoders if these are trained."""
    return CaptionedTransformer(transformer, encoders) if config.train_text_encoder else transformer
