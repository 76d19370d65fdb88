# SPDX-License-Identifier: Apache-2.0
"""Attention block by block equals attention with a mask, and computes less."""

import pytest
import torch
from torch.nn import functional

from hf_var import VARCache
from hf_var.priors import attention
from priors.tiny import logits_by_calls, tiny_inputs, tiny_model


# Tokens of short blocks are taken together: 1 to take none, 4 to take the first two scales, 100 to take all.
LENGTHS = [1, 4, 6, 100]


def blocks(model):
    model.set_attn_implementation(attention.BLOCKWISE_SDPA)
    return model


@pytest.fixture(params=LENGTHS)
def min_segment_length(request, monkeypatch):
    monkeypatch.setattr(attention, "MIN_SEGMENT_LENGTH", request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"block_sizes": [1] * 11}, {"block_sizes": [2, 2, 1, 4, 2]}], ids=str)
@pytest.mark.parametrize("cut", ["whole", "prefix first", "prefix last"])
def test_equals_a_masked_call(fields, cut, min_segment_length):
    model = tiny_model("eager", **fields)
    inputs = tiny_inputs(model.config)
    expected = model(inputs["class_labels"], inputs["scale_inputs"]).logits
    number = len(model.config.block_lengths)
    calls = {"whole": [number], "prefix first": [1, number - 1], "prefix last": [number - 1, 1]}[cut]
    logits = logits_by_calls(blocks(model), inputs, calls, VARCache(model.config))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_has_the_gradients_of_a_masked_call(min_segment_length):
    gradients = []
    for implementation in ("eager", attention.BLOCKWISE_SDPA):
        model = tiny_model(implementation)
        model(**tiny_inputs(model.config)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["layers.0.attention.k_proj.weight"].abs().max() > 1e-4
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-6, msg=name)


def test_compiles(min_segment_length):
    model = tiny_model(attention.BLOCKWISE_SDPA)
    inputs = tiny_inputs(model.config)
    expected = model(**inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(compiled.logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("patch_nums", "expected"),
    [
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), [91, 64, 100, 169, 256]),
        ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), [66, 81, 169, 324, 576, 1024]),
    ],
    ids=["256 px", "512 px"],
)
def test_segments_of_the_released_schedules(patch_nums, expected):
    config = tiny_model(patch_nums=patch_nums, num_hidden_layers=1).config
    segments = attention._segments(config.block_ends, 0, config.length)
    assert [last - first for first, last, _ in segments] == expected
    # Only the first one is several blocks, which need a mask.
    assert [is_masked for _, _, is_masked in segments] == [True] + [False] * (len(expected) - 1)
    # What begins after a prefix is cut at the same places.
    assert attention._segments(config.block_ends, segments[1][1], config.length) == segments[2:]


@pytest.fixture
def lengths(monkeypatch):
    """Lengths of the queries and keys of each call of torch's attention, whichever kernel it takes."""
    lengths = []
    original = functional.scaled_dot_product_attention

    def count(query, key, *args, **kwargs):
        lengths.append((query.shape[2], key.shape[2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", count)
    return lengths


@torch.no_grad()
@pytest.mark.parametrize(
    ("patch_nums", "share"),
    [((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 0.65), ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 0.66)],
    ids=["256 px", "512 px"],
)
def test_leaves_out_a_third_of_the_products(patch_nums, share, lengths):
    model = tiny_model(patch_nums=patch_nums, num_hidden_layers=1)
    inputs = tiny_inputs(model.config, batch_size=1)

    def pairs_of_tokens():
        lengths.clear()
        model(inputs["class_labels"], inputs["scale_inputs"])
        return sum(queries * keys for queries, keys in lengths)

    dense = pairs_of_tokens()
    assert dense == model.config.length**2
    blocks(model)
    assert 0.6 * dense < pairs_of_tokens() < share * dense


def test_sampling_needs_one_call_per_block(lengths):
    model = tiny_model(attention.BLOCKWISE_SDPA)
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        logits_by_calls(model, inputs, [1, 1, 1], VARCache(model.config))
    assert lengths == [length for length in ((1, 1), (4, 5), (6, 11)) for _ in model.layers]
