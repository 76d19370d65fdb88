# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a training."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..priors import VARConfig, VARTransformer


def training_flops(config: VARConfig) -> float:
    """
    FLOPs of forward and backward pass for one image. A multiplication and an addition count as two; the backward pass
    costs twice the forward; only matrix products are counted, and attention over all pairs of tokens.
    """
    # Shapes alone: nothing is computed, and no random number is used.
    with torch.device("meta"), torch.no_grad():
        # A copy, as the attention implementation is kept in the configuration; the fused ones may hide their products.
        transformer = VARTransformer._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        scale_inputs = torch.empty(1, config.length - config.block_lengths[0], config.latent_channels)
        with FlopCounterMode(display=False) as counter:
            transformer(torch.zeros(1, dtype=torch.long), scale_inputs=scale_inputs)
    return 3.0 * counter.get_total_flops()
