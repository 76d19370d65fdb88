# SPDX-License-Identifier: Apache-2.0
"""Training on captions: text encoders, and what a transformer is told of a text."""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import nn

from .. import data
from ..autoencoders import VQVAEModel
from ..priors import TextVARTransformer
from ..priors.modeling_outputs import VARTransformerOutput
from ..ranges import CheckedFields, OneOf, PartialShare, PositiveInt, argument
from ..scales import GUIDANCE_RULES
from ..text_encoders import TextEmbeddings, TextEncoders, encode_ids, load_text_encoders, text_ids
from .prior_inputs import prior_inputs
from .setup import Rows


# What a [`TextVARTransformer`] is told, in the order of [`TextEmbeddings`].
TEXT_ARGUMENTS = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")


@dataclass(kw_only=True)
class CaptionConfig(CheckedFields):
    """Captions in place of classes."""

    caption_column: str | None = argument(
        None,
        help="column of texts, or of labels with names, that the images are conditioned on: trains a TextVARTransformer",
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
        0.1, help="read the empty text, or that of learned_empty_text, in place of a caption with this probability"
    )
    guidance_rule: Annotated[str, OneOf(*GUIDANCE_RULES)] | None = argument(
        None, help="default of the pipeline that is saved: linear, guidance grows from the first scale on, or constant"
    )
    clip_model: str | None = argument(
        None, help="folder or repository of a CLIPModel that measures how well samples agree with their texts"
    )
    sample_prompts: list[str] | None = argument(None, help="texts of the samples; default: captions of the data")

    def __post_init__(self) -> None:
        super().__post_init__()
        needing = ("text_encoder", "text_encoder_2", "train_text_encoder", "max_caption_length", "clip_model")
        for name in (*needing, "guidance_rule", "sample_prompts"):
            if self.caption_column is None and getattr(self, name):
                raise ValueError(f"`{name}` = {getattr(self, name)!r} needs a `caption_column`.")
        if self.text_encoder_2 is not None and self.text_encoder is None:
            raise ValueError(f"`text_encoder_2` = {self.text_encoder_2!r} needs a first `text_encoder`.")


def caption_encoders(config: CaptionConfig, pretrained: Any = None) -> TextEncoders:
    """The text encoders that the arguments name, or those of the pipeline that is trained further."""
    found = []
    if pretrained is not None:
        pairs = [(pretrained.text_encoder, pretrained.tokenizer), (pretrained.text_encoder_2, pretrained.tokenizer_2)]
        found = [pair for pair in pairs if pair[0] is not None]
    encoders = load_text_encoders(config.text_encoder, config.text_encoder_2, config.max_caption_length, found)
    for model in encoders.models:
        model.requires_grad_(config.train_text_encoder)
    return encoders


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

    def forward(
        self, caption_ids: torch.Tensor, is_dropped: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> VARTransformerOutput:
        text = text_arguments(encode_ids(self.encoders.pairs, caption_ids))
        return self.transformer(**_without_dropped(text, is_dropped), **inputs)


@dataclass
class CaptionInputs:
    """
    The arguments of a transformer for a batch of `codes` or `pixel_values` and of captions, some of which become the empty
    text, by torch's own generator, as dropout has it; if that is `learned`, the transformer puts its vectors in the place
    of texts without tokens. Captions are `caption_ids` or stored embeddings; text encoders that are trained come later.
    """

    vqvae: VQVAEModel
    encoders: TextEncoders
    is_encoded: bool
    is_learned: bool
    dropout_prob: float = 0.0

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        inputs = prior_inputs(self.vqvae, batch)
        names = ["caption_ids"] if "caption_ids" in inputs else list(TEXT_ARGUMENTS)
        if self.dropout_prob > 0:
            is_dropped = torch.rand(len(inputs["labels"]), device=inputs["labels"].device) < self.dropout_prob
            if self.is_learned:
                inputs["is_dropped"] = is_dropped
            else:
                inputs |= {name: self._drop(name, inputs[name], is_dropped) for name in names}
        if not self.is_encoded:
            return inputs
        if "caption_ids" in inputs:
            inputs |= text_arguments(encode_ids(self.encoders.pairs, inputs.pop("caption_ids")))
        return _without_dropped(inputs, inputs.pop("is_dropped", None))

    def _drop(self, name: str, value: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
        """The empty text in the place of some."""
        return torch.where(is_dropped.view(-1, *[1] * (value.ndim - 1)), self._empty[name].to(value), value)

    @cached_property
    def _empty(self) -> dict[str, torch.Tensor]:
        """The empty text in both forms."""
        ids = text_ids(self.encoders.tokenizers, [""], self.encoders.length)
        device = self.encoders.models[0].device
        embeddings = text_arguments(encode_ids(self.encoders.pairs, ids.to(device))) if self.is_encoded else {}
        return {"caption_ids": ids, **embeddings}


def _without_dropped(text: dict[str, Any], is_dropped: torch.Tensor | None) -> dict[str, Any]:
    """The same without the tokens of some texts, in whose place a transformer puts its vectors of the empty text."""
    if is_dropped is None:
        return text
    mask = text["encoder_attention_mask"].masked_fill(is_dropped[:, None], 0)
    return {**text, "encoder_attention_mask": mask}


def text_arguments(embeddings: TextEmbeddings) -> dict[str, torch.Tensor]:
    """The arguments of a [`TextVARTransformer`]."""
    return dict(zip(TEXT_ARGUMENTS, embeddings, strict=True))


def stored_captions(items: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored embeddings of items as arguments of a pipeline."""
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    return {name: items[argument] for name, argument in zip(names, TEXT_ARGUMENTS, strict=True)}


def read_captions(config: CaptionConfig, encoders: TextEncoders) -> Any:
    """What makes the condition of a column of captions, or of their stored embeddings, for [`load_prior_data`]."""

    def make(dataset: data.AnyDataset, column: str, augment: data.AugmentConfig | None) -> data.Condition:
        if not data.holds_embedded_captions(dataset, column):
            return data.caption_condition(dataset, column, encoders.tokenizers, encoders.length)
        if config.train_text_encoder:
            raise ValueError(f"`train_text_encoder` must be false for stored embeddings, which {column!r} holds.")
        return data.EmbeddedCaptionCondition(column, encoders.length)

    return make


def check_stored_embeddings(argument: str, source: str, rows: Rows, encoders: TextEncoders) -> None:
    """Raise a `ValueError` if the data that an argument names holds embeddings of other text encoders."""
    reader: Any = rows.reader
    if not isinstance(reader.condition, data.EmbeddedCaptionCondition):
        return
    made_by = data.codes_fingerprint(source, data.TEXT_ENCODER_KEY)
    if made_by is not None and made_by != encoders.fingerprint:
        raise ValueError(
            f"The embeddings in `{argument}` = {source!r} were made by another text encoder than `text_encoder`, or of "
            "captions of another length."
        )


def trained_module(transformer: TextVARTransformer, encoders: TextEncoders, config: CaptionConfig) -> nn.Module:
    """What is optimized: the transformer, with the text encoders if these are trained."""
    return CaptionedTransformer(transformer, encoders) if config.train_text_encoder else transformer
