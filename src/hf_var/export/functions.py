# SPDX-License-Identifier: Apache-2.0
"""What the graphs compute: functions of a list of modules and of tensors, with the cache as tensors that come and go."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..priors import VARCache
from ..priors.attention import token_blocks
from ..priors.cache import VARCacheLayer
from ..priors.configuration_blocks import BlocksMixin
from ..text_encoders import encode_ids


class GrowingCacheLayer(VARCacheLayer):
    """Keys and values of one layer as tensors that grow, since a graph writes into no buffers."""

    keys: Any
    values: Any

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__(max_length=0)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        return self.keys, self.values  # (batch, heads, length so far, head_dim)


def encode(modules: Sequence[Any], pixel_values: torch.Tensor) -> torch.Tensor:
    return modules[0].encode(pixel_values, return_dict=True).codes


def decode(modules: Sequence[Any], codes: torch.Tensor) -> torch.Tensor:
    return modules[0].decode(codes, return_dict=True).sample


def scale_inputs(modules: Sequence[Any], codes: torch.Tensor) -> torch.Tensor:
    return modules[0].teacher_forcing(codes)


def raster_inputs(modules: Sequence[Any], codes: torch.Tensor) -> torch.Tensor:
    return modules[0].teacher_forcing(codes, is_raster=True)


def class_condition(modules: Sequence[Any], class_labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What depends on the class alone: what the first tokens are made of, and the AdaLN vectors of all layers."""
    (model,) = modules
    cache = _first_step(model, class_labels=class_labels)
    condition = model.embeddings.project_condition(model.get_class_embeds(class_labels))
    return condition, _modulations(cache)


def text_condition(
    modules: Sequence[Any],
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    pooled_projections: torch.Tensor,
    crop_sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The same of a text, with keys and values for all layers, each `(layers, batch, heads, text, head_dim)`, and its mask."""
    (model,) = modules
    cache = _first_step(
        model,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        pooled_projections=pooled_projections,
        crop_sizes=crop_sizes,
    )
    mask: Any = cache.cross_mask
    told = model._embed_text(encoder_hidden_states, encoder_attention_mask.bool(), pooled_projections, crop_sizes)
    text = zip(*(cache.cross_attention[layer] for layer in range(len(cache.cross_attention))), strict=True)
    return told.pooled, _modulations(cache), *(torch.stack(states) for states in text), mask


def _first_step(model: Any, **condition: torch.Tensor | None) -> VARCache:
    """A cache that knows the condition; exporters leave the layers out, of which nothing is used."""
    cache = VARCache(model.config)
    model(**condition, cache=cache)
    return cache


def _modulations(cache: VARCache) -> torch.Tensor:
    """Of all layers and of the head, `(batch, vectors, hidden)`."""
    return torch.cat([cache.modulations[layer] for layer in range(len(cache.modulations))], dim=1)


def _num_vectors(config: BlocksMixin) -> list[int]:
    """AdaLN vectors of each layer and of the head."""
    return [6] * config.num_hidden_layers + [2]


def num_modulations(config: BlocksMixin) -> int:
    """All AdaLN vectors of an image."""
    return sum(_num_vectors(config))


class Predict:
    """
    Logits of the tokens at `positions`, which are whole blocks, from the inputs of all blocks of the image (those of
    later ones may be anything) and from the keys and values `(layers, batch, heads, past, head_dim)` of all tokens before.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names

    def __call__(self, modules: Sequence[Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (model,), inputs = modules, dict(zip(self.names, tensors, strict=True))
        config, positions = model.config, inputs["positions"]
        embedded = model.embed(inputs["condition"], inputs.get("scale_inputs"), 0, config.length)
        tokens = {"hidden_states": embedded["hidden_states"][:, positions]}
        if "position_embeddings" in embedded:
            tokens["position_embeddings"] = tuple(angles[positions] for angles in embedded["position_embeddings"])
        cache = _cache(config, inputs)
        mask = _mask(config, positions, inputs.get("past_keys"))
        logits = model.predict(**tokens, attention_mask=mask, cache=cache)
        if not config.is_causal:
            return (logits,)
        layers: Any = cache.layers
        return logits, torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers])


def _cache(config: Any, inputs: Mapping[str, torch.Tensor]) -> VARCache:
    """A cache that holds what the graph got."""
    cache = VARCache(config)
    cache.modulations = dict(enumerate(inputs["modulations"].split(_num_vectors(config), dim=1)))
    if "text_keys" in inputs:
        states = zip(inputs["text_keys"].unbind(), inputs["text_values"].unbind(), strict=True)
        cache.cross_attention, cache.cross_mask = dict(enumerate(states)), inputs["text_mask"]
    if config.is_causal:
        past = zip(inputs["past_keys"].unbind(), inputs["past_values"].unbind(), strict=True)
        layers: list[Any] = [GrowingCacheLayer(keys, values) for keys, values in past]
        cache.layers = layers
    return cache


def _mask(config: Any, positions: torch.Tensor, past_keys: torch.Tensor | None) -> torch.Tensor:
    """Which tokens `(1, 1, tokens, past + tokens)` the tokens at `positions` see."""
    blocks = token_blocks(config, positions.device)
    queries = blocks[positions][:, None]
    if past_keys is None:
        return (blocks[positions] == queries)[None, None]
    # Looked up, since a slice would limit the sizes that torch lets vary.
    keys = torch.arange(past_keys.shape[3] + positions.shape[0], device=positions.device)
    return (blocks[keys] <= queries)[None, None]


class Forward:
    """Logits of all codes, each from those before it; with a tokenizer behind the prior, the prior reads its vectors."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def __call__(self, modules: Sequence[Any], *tensors: torch.Tensor) -> torch.Tensor:
        prior, inputs = modules[0], dict(zip(self.names, tensors, strict=True))
        if len(modules) > 1:
            inputs["code_vectors"] = modules[1].code_vectors(inputs.pop("codes"))
        return prior(**inputs, return_dict=True).logits


class TextEncoder:
    """Text encoders, each with its tokenizer, over ids `(batch, encoders, text)` with -1 for padding."""

    def __init__(self, tokenizers: Sequence[Any]):
        self.tokenizers = tokenizers

    def __call__(self, modules: Sequence[Any], text_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(encode_ids(list(zip(modules, self.tokenizers, strict=True)), text_ids))
