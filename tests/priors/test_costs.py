# SPDX-License-Identifier: Apache-2.0
"""Costs of a transformer, counted by hand and in its steps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_var import VARCache, VARConfig, VARTransformer
from hf_var.priors.costs import training_flops, var_costs


def flops_by_hand(config: VARConfig) -> int:
    """Three times the matrix products of a forward pass: two FLOPs for each multiplication and addition."""
    width, length, layers = config.hidden_size, config.length, config.num_hidden_layers
    inputs = (length - config.block_lengths[0]) * config.latent_channels * width
    attention = 4 * length * width**2 + 2 * length**2 * width
    mlp = 2 * length * width * round(config.mlp_ratio * width)
    # The class modulates all layers at once or each by itself, and the head.
    modulations = 6 * width**2 * (1 if config.shared_adaln else layers) + 2 * width**2
    head_products = length * width * config.codebook_size
    return 3 * 2 * (inputs + layers * (attention + mlp) + modulations + head_products)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_hidden_layers": 36, "hidden_size": 2304, "num_attention_heads": 36, "shared_adaln": True},
        {"num_labels": 0, "patch_nums": (1,), "hidden_size": 64, "num_attention_heads": 2, "mlp_ratio": 2.5},
        {
            "patch_nums": ((2, 3),),
            "block_sizes": [1] * 6,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "qk_norm": False,
        },
    ],
)
def test_flops_are_those_of_the_formula(fields) -> None:
    config = VARConfig(**fields)
    before = torch.get_rng_state()
    assert training_flops(config) == flops_by_hand(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_device() == torch.device("cpu")


def test_counting_flops_leaves_the_configuration_alone() -> None:
    sizes = {
        "num_labels": 3,
        "patch_nums": (1, 2),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = VARTransformer._from_config(VARConfig(**sizes), attn_implementation="sdpa")
    training_flops(model.config)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fields", [{}, {"patch_nums": (1, (2, 3)), "block_sizes": [1] * 7}])
def test_costs_of_sampling_are_those_of_its_steps(fields) -> None:
    sizes = {"num_labels": 3, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "codebook_size": 32}
    config = VARConfig(**{"patch_nums": (1, 2, 3), **sizes, **fields})
    costs = var_costs(config)
    model = VARTransformer._from_config(config, attn_implementation="eager").eval()
    cache = VARCache(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for index, length in enumerate(config.block_lengths):
            scale_inputs = torch.zeros(1, length, config.latent_channels) if index > 0 else None
            model(torch.tensor([1]), scale_inputs=scale_inputs, cache=cache)
    assert costs.sampling_products + costs.sampling_attention == counter.get_total_flops()
    assert costs.sampling_attention == counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert costs.training == training_flops(config)
    assert costs.num_cached == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert costs.num_parameters == model.num_parameters()
