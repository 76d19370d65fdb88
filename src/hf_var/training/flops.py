# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a training."""

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..priors import TextVARConfig, TextVARTransformer, VARConfig, VARTransformer


# Tokens of a text, as CLIP's encoders have them.
TEXT_LENGTH = 77


def training_flops(config: VARConfig | TextVARConfig) -> float:
    """
    FLOPs of forward and backward pass for one image. A multiplication and an addition count as two; the backward pass
    costs twice the forward; only matrix products are counted, and attention over all pairs of tokens. A text has 77 tokens
    and is encoded before.
    """
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
    return 3.0 * counter.get_total_flops()
