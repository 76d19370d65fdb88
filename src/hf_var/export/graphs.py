# SPDX-License-Identifier: Apache-2.0
"""Which graphs a model or pipeline has: functions of tensors, examples of their inputs, and the sizes that vary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..autoencoders import HierarchicalVQVAEModel, VQVAEModel
from ..pipelines import ARPipeline
from ..pipelines.base import PipelineBase
from ..pipelines.compilation import unwrapped
from ..priors import RQTransformer, VARTransformer
from ..priors.modeling_blocks import BlockTransformer
from ..priors.modeling_pixel_prior import PixelPrior
from ..text_encoders import TEXT_ENCODERS, text_length
from . import functions


BATCH = {0: "batch"}
# Sizes of the examples. torch takes a size of 0 or 1 for a constant, and equal sizes for the same one.
NUM_IMAGES, NUM_TEXT_TOKENS = 2, 5


@dataclass
class Graph:
    """
    A function of `modules` and tensors; `varying` names the sizes of inputs that vary, beside the batch, and `limits` says
    how large they are at most.
    """

    name: str
    modules: Sequence[nn.Module]
    function: Callable
    inputs: Mapping[str, torch.Tensor]
    outputs: Sequence[str]
    varying: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    def sizes(self, name: str) -> Mapping[int, str]:
        """Names of the sizes of an input that vary, by their dimension."""
        return self.varying.get(name, BATCH)


def find_graphs(model: Any) -> list[Graph]:
    """The graphs of a model or pipeline; a `ValueError` if there are none for it."""
    model = unwrapped(model)
    if isinstance(model, PipelineBase):
        return _pipeline_graphs(model)
    if isinstance(model, VQVAEModel | HierarchicalVQVAEModel):
        return _tokenizer_graphs(model)
    if isinstance(model, BlockTransformer):
        return _block_graphs(model)
    if isinstance(model, RQTransformer | PixelPrior):
        return [_prior_graph("prior", model)]
    raise ValueError(
        "`model` must be a pipeline of hf_var, a tokenizer (`VQVAEModel`, `HierarchicalVQVAEModel`) or a prior "
        "(`VARTransformer`, `TextVARTransformer`, `RQTransformer`, `PixelCNN`, `PixelSNAIL`), got "
        f"{type(model).__name__}."
    )


def _pipeline_graphs(pipe: Any) -> list[Graph]:
    vqvae = unwrapped(pipe.vqvae)
    if not isinstance(pipe, ARPipeline):
        graphs = [*_tokenizer_graphs(vqvae), *_block_graphs(unwrapped(pipe.transformer))]
        pairs = text_encoders(pipe)
        return [*graphs, _text_encoder_graph(pairs)] if pairs else graphs
    first = unwrapped(pipe.prior)
    if isinstance(first, VARTransformer):
        return [*_tokenizer_graphs(vqvae, is_raster=True), *_block_graphs(first)]
    graphs = _tokenizer_graphs(vqvae)
    for name in ("prior", "middle_prior", "bottom_prior"):
        if (prior := getattr(pipe, name)) is not None:
            graphs.append(_prior_graph(name, unwrapped(prior), vqvae))
    if pipe.condition_vqvae is not None:
        graphs.append(_encoding_graph("condition_encode", unwrapped(pipe.condition_vqvae)))
    return graphs


def _tokenizer_graphs(vqvae: Any, is_raster: bool = False) -> list[Graph]:
    codes = {"codes": _codes(vqvae.config, sum(vqvae.config.scale_lengths))}
    graphs = [_encoding_graph("encode", vqvae), Graph("decode", [vqvae], functions.decode, codes, ["sample"])]
    if isinstance(vqvae, VQVAEModel) and (is_raster or len(vqvae.config.patch_nums) > 1):
        function = functions.raster_inputs if is_raster else functions.scale_inputs
        graphs.append(Graph("scale_inputs", [vqvae], function, codes, ["scale_inputs"]))
    return graphs


def _encoding_graph(name: str, vqvae: Any) -> Graph:
    config = vqvae.config
    pixels = torch.zeros(NUM_IMAGES, config.in_channels, *config.image_size)
    if getattr(config, "num_pixel_classes", None) is not None:
        pixels = torch.zeros(NUM_IMAGES, *config.image_size, dtype=torch.long)
    return Graph(name, [vqvae], functions.encode, {"pixel_values": pixels}, ["codes"])


def _block_graphs(model: BlockTransformer) -> list[Graph]:
    """The condition of an image, and the tokens of any blocks: of all at once as in training, or of one after the other."""
    config, width = model.config, model.config.hidden_size
    varying: dict[str, dict[int, str]] = {"positions": {0: "tokens"}}
    heads = config.num_hidden_layers, NUM_IMAGES, config.num_attention_heads
    inputs = {
        "condition": torch.zeros(NUM_IMAGES, width),
        "modulations": torch.zeros(NUM_IMAGES, functions.num_modulations(config), width),
    }
    if isinstance(model, VARTransformer):
        given = {"class_labels": torch.zeros(NUM_IMAGES, dtype=torch.long)}
        function, found = functions.class_condition, list(inputs)
    else:
        mask = torch.ones(NUM_IMAGES, NUM_TEXT_TOKENS, dtype=torch.long)
        given = {
            "encoder_hidden_states": torch.zeros(NUM_IMAGES, NUM_TEXT_TOKENS, config.cross_attention_dim),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.zeros(NUM_IMAGES, config.pooled_projection_dim),
        }
        if config.crop_conditioning:
            given["crop_sizes"] = torch.full((NUM_IMAGES, 2), 512)
        for name in ("text_keys", "text_values"):
            inputs[name] = torch.zeros(*heads, NUM_TEXT_TOKENS, config.head_dim)
            varying[name] = {1: "batch", 3: "text"}
        inputs["text_mask"] = mask.bool()
        function, found = functions.text_condition, list(inputs)
        names = ("encoder_hidden_states", "encoder_attention_mask", "text_mask")
        varying |= dict.fromkeys(names, {0: "batch", 1: "text"})
    condition = Graph("condition", [model], function, given, found, varying)
    outputs = ["logits"]
    if config.length > config.block_lengths[0]:
        rest = config.length - config.block_lengths[0]
        inputs["scale_inputs"] = torch.zeros(NUM_IMAGES, rest, config.latent_channels)
    inputs["positions"] = torch.zeros(3, dtype=torch.long)
    if config.is_causal:
        outputs += ["keys", "values"]
        for name in ("past_keys", "past_values"):
            inputs[name] = torch.zeros(*heads, 4, config.head_dim)
            varying[name] = {1: "batch", 3: "past"}
    predict = functions.Predict(list(inputs))
    return [condition, Graph("transformer", [model], predict, inputs, outputs, varying)]


def _prior_graph(name: str, prior: Any, vqvae: Any = None) -> Graph:
    """The logits of all codes of an image, each from those before it."""
    config, modules = prior.config, [prior]
    inputs: dict[str, torch.Tensor] = {}
    if config.num_labels or getattr(config, "has_classes", False):
        inputs["class_labels"] = torch.zeros(NUM_IMAGES, dtype=torch.long)
    if not isinstance(prior, RQTransformer):
        inputs["codes"] = _codes(config, config.length)
        if getattr(config, "condition_map_size", None) is not None:
            inputs["condition_codes"] = torch.zeros(NUM_IMAGES, config.condition_length, dtype=torch.long)
        return Graph(name, modules, functions.Forward(list(inputs)), inputs, ["logits"])
    if not config.has_classes:
        inputs["condition_ids"] = torch.zeros(NUM_IMAGES, config.condition_length, dtype=torch.long)
    stacks = NUM_IMAGES, config.num_positions, config.depth
    if config.code_inputs == "vectors" and vqvae is None:
        inputs["code_vectors"] = torch.zeros(*stacks, config.latent_channels)
    else:
        inputs["codes"] = torch.zeros(*stacks, dtype=torch.long)
        modules += [vqvae] if config.code_inputs == "vectors" else []
    return Graph(name, modules, functions.Forward(list(inputs)), inputs, ["logits"])


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """The text encoders of a pipeline, each with its tokenizer; none of other pipelines and models."""
    names = [(name, name.replace("text_encoder", "tokenizer")) for name in TEXT_ENCODERS]
    pairs = [(getattr(pipe, name, None), getattr(pipe, tokenizer, None)) for name, tokenizer in names]
    return [pair for pair in pairs if pair[0] is not None]


def _text_encoder_graph(pairs: Sequence[tuple[Any, Any]]) -> Graph:
    encoders, tokenizers = zip(*pairs, strict=True)
    length = text_length(pairs)
    ids = torch.tensor([[0, 0, 0, -1, -1], [0, 0, 0, 0, 0]])[:, None, :length].repeat(1, len(pairs), 1)
    outputs = ["encoder_hidden_states", "pooled_projections", "encoder_attention_mask"]
    varying = {"text_ids": {0: "batch", 2: "text"} if length > 1 else {0: "batch"}}
    function, limits = functions.TextEncoder(tokenizers), {"text": length}
    return Graph("text_encoder", encoders, function, {"text_ids": ids}, outputs, varying, limits)


def _codes(config: Any, length: int) -> torch.Tensor:
    return torch.zeros(NUM_IMAGES, length, dtype=torch.long)
