# SPDX-License-Identifier: Apache-2.0
"""What a transformer costs: parameters, memory of its cache, FLOPs. Shapes alone are used, nothing is computed."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .configuration_text_var import TextVARConfig
from .configuration_var import VARConfig
from .modeling_text_var import TextVARTransformer
from .modeling_var import VARTransformer


# Tokens of a text, as CLIP's encoders have them.
TEXT_LENGTH = 77


@dataclass(frozen=True)
class VARCosts:
    """
    Costs of a [`VARTransformer`] for one image. A multiplication and an addition count as two FLOPs, and only matrix products
    are counted. Guidance doubles what sampling takes, as it predicts every token a second time without the class.

    Args:
        num_parameters (`int`): Weights.
        num_cached (`int`): Numbers in the cache of a sampled image: keys and values of all tokens in all layers.
        sampling_products (`int`): FLOPs of sampling in products with weights.
        sampling_attention (`int`): FLOPs of sampling in attention, where a block sees itself and those before it.
        training (`int`): FLOPs of a training step for one image, see [`training_flops`].
    """

    num_parameters: int
    num_cached: int
    sampling_products: int
    sampling_attention: int
    training: int


def var_costs(config: VARConfig) -> VARCosts:
    """The [`VARCosts`] of a configuration."""
    num_parameters, products, attention = _count(config)
    # Each token is read once in sampling as in a forward pass over all of them, which multiplies all pairs and masks some.
    pairs = sum(length * end for length, end in zip(config.block_lengths, config.block_ends, strict=True))
    return VARCosts(
        num_parameters=num_parameters,
        num_cached=2 * config.num_hidden_layers * config.length * config.hidden_size,
        sampling_products=products,
        sampling_attention=attention * pairs // config.length**2,
        training=3 * (products + attention),
    )


def training_flops(config: VARConfig | TextVARConfig) -> float:
    """
    FLOPs of forward and backward pass for one image. A multiplication and an addition count as two; the backward pass
    costs twice the forward; only matrix products are counted, and attention over all pairs of tokens. A text has 77 tokens
    and is encoded before.
    """
    _, products, attention = _count(config)
    return 3.0 * (products + attention)


def _count(config: VARConfig | TextVARConfig) -> tuple[int, int, int]:
    """Parameters, and FLOPs of a forward pass over all tokens of one image in products with weights and in attention."""
    # Shapes alone: nothing is computed, and no random number is used.
    with torch.device("meta"), torch.no_grad():
        # A copy, as the attention implementation is kept in the configuration; the fused ones may hide their products.
        model_class: Any = VARTransformer if isinstance(config, VARConfig) else TextVARTransformer
        transformer = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        if isinstance(config, VARConfig):
            condition = {"class_labels": torch.zeros(1, dtype=torch.long)}
        else:
            condition = {"encoder_hidden_states": torch.empty(1, TEXT_LENGTH, config.cross_attention_dim)}
            condition["pooled_projections"] = torch.empty(1, config.pooled_projection_dim)
        scale_inputs = torch.empty(1, config.length - config.block_lengths[0], config.latent_channels)
        with FlopCounterMode(display=False) as counter:
            transformer(**condition, scale_inputs=scale_inputs)
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return transformer.num_parameters(), counter.get_total_flops() - attention, attention
