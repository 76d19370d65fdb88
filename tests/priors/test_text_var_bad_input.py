# SPDX-License-Identifier: Apache-2.0
"""Calls of a transformer that reads texts: each error names the argument and what would be right."""

import pytest
import torch
from transformers import DynamicCache

from hf_var import TextVARConfig, VARCache
from hf_var.compatibility import enable_activation_checkpointing
from priors.text import text_config, text_inputs, text_model, text_of
from priors.tiny import tiny_config


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.fixture
def inputs(model):
    return text_inputs(model.config)


@pytest.fixture
def cache(model, inputs):
    """A cache with the first two of three scales."""
    cache = VARCache(model.config)
    with torch.no_grad():
        model(**text_of(inputs), scale_inputs=inputs["scale_inputs"][:, :4], cache=cache)
    return cache


# --- the text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder_hidden_states", "pooled_projections"])
def test_a_text_that_is_missing(model, inputs, name):
    del inputs[name]
    with pytest.raises(ValueError, match=f"`{name}` must be passed with an image's first scale"):
        model(**inputs)
    causal, cache = text_model(is_causal=True), DynamicCache()
    text = text_of(text_inputs(causal.config))
    causal(**text, cache=cache)
    with pytest.raises(ValueError, match=f"`{name}` must be passed .* at every call with a cache which is not"):
        causal(**text_of(inputs), scale_inputs=inputs["scale_inputs"], cache=cache)
    assert cache.get_seq_length() == 1


@pytest.mark.parametrize(
    "name", ["encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "crop_sizes"]
)
def test_a_text_that_is_known(model, inputs, cache, name):
    with pytest.raises(ValueError, match=f"`{name}` must be passed with an image's first scale only: the cache keeps"):
        model(**{name: inputs[name]}, scale_inputs=inputs["scale_inputs"][:, 4:], cache=cache)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("encoder_hidden_states", [(3, 5, 11), (3, 12), (3, 0, 12), (3, 1, 5, 12)], r"\(batch, text length, 12\)"),
        ("pooled_projections", [(3, 11), (10,), (3, 1, 10)], r"\(batch, 10\)"),
        ("encoder_attention_mask", [(3, 4), (3, 5, 1), (5,)], r"\(batch, 5\) of the text's tokens"),
        ("crop_sizes", [(3, 4), (3,), (3, 2, 1)], r"\(batch, 2\)"),
    ],
)
def test_shapes_of_a_text(model, inputs, name, shapes, expected):
    for shape in shapes:
        others = inputs if name != "encoder_hidden_states" else {**inputs, "encoder_attention_mask": None}
        wrong = torch.ones(shape, dtype=inputs[name].dtype)
        with pytest.raises(ValueError, match=rf"`{name}` must have the shape {expected}, got \("):
            model(**{**others, name: wrong})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder_hidden_states", "floating-point numbers in a tensor"),
        ("pooled_projections", "floating-point numbers in a tensor"),
        ("encoder_attention_mask", "0 and 1, or truth values, in a tensor"),
        ("crop_sizes", "integers in a tensor"),
        ("scale_inputs", "floating-point numbers in a tensor"),
        ("labels", "integers in a tensor"),
    ],
)
def test_kinds_of_values(model, inputs, name, expected):
    other = inputs[name].long() if inputs[name].is_floating_point() else inputs[name].float()
    for wrong in (other, inputs[name].tolist(), "a cat", 3):
        with pytest.raises(ValueError, match=f"`{name}` must be {expected}, got "):
            model(**{**inputs, name: wrong})


def test_values_of_a_mask(model, inputs):
    for wrong in (-1, 2):
        mask = torch.where(torch.arange(5) == 3, wrong, inputs["encoder_attention_mask"])
        with pytest.raises(ValueError, match="`encoder_attention_mask` must be 0 or 1, got values from "):
            model(**{**inputs, "encoder_attention_mask": mask})
    inputs["encoder_attention_mask"][1] = 0
    with pytest.raises(ValueError, match="`encoder_attention_mask` must leave each text a token, got a row of zeros"):
        model(**inputs)


def test_sizes_of_crops(model, inputs):
    for wrong in (0, -3, 2**21):
        with pytest.raises(
            ValueError, match=rf"`crop_sizes` must be heights and widths from 1 to {2**20}, got values"
        ):
            model(**{**inputs, "crop_sizes": torch.tensor([[512, wrong]] * 3)})
    plain = text_model(crop_conditioning=False)
    with pytest.raises(ValueError, match="`crop_sizes` need a model with crop_conditioning=True: leave them out"):
        plain(**inputs)


def test_batch_sizes(model, inputs, cache):
    for name in inputs:
        with pytest.raises(ValueError, match=rf"All arguments must have the same batch size, got .*'{name}': 2"):
            model(**{**inputs, name: inputs[name][:2]})
    with pytest.raises(ValueError, match=r"All arguments must have the same batch size, got .*'cache': 3"):
        model(scale_inputs=inputs["scale_inputs"][:2, 4:], cache=cache)


def test_unknown_arguments(model, inputs):
    with pytest.raises(
        TypeError, match=r"TextVARTransformer.forward\(\) got the unknown arguments \['class_labels'\]"
    ):
        model(**inputs, class_labels=torch.tensor([1]))


# --- blocks and caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 5, 11])
def test_tokens_that_are_no_whole_scales(model, inputs, tokens):
    with pytest.raises(
        ValueError, match=rf"`scale_inputs` must hold whole blocks .* \[0, 4, 10\] tokens .*got {tokens}"
    ):
        model(**text_of(inputs), scale_inputs=torch.zeros(3, tokens, 4))


def test_a_full_cache(model, inputs, cache):
    model(scale_inputs=inputs["scale_inputs"][:, 4:], cache=cache)
    with pytest.raises(ValueError, match="`cache` is full: it holds all 11 tokens"):
        model(scale_inputs=inputs["scale_inputs"][:, :4], cache=cache)


def test_caches_of_another_kind(model, inputs):
    text = text_of(inputs)
    with pytest.raises(
        ValueError, match="`cache` must be a `VARCache` for a model with is_causal=False.*DynamicCache"
    ):
        model(**text, cache=DynamicCache())
    with pytest.raises(ValueError, match="`cache` must be a `VARCache` or another `Cache` of transformers, got tuple"):
        model(**text, cache=())
    causal = VARCache(text_config(is_causal=True))
    with pytest.raises(ValueError, match="for 2 layers and 11 tokens with is_causal=False, .* got one for 2 and 11."):
        model(**text, cache=causal)
    with pytest.raises(ValueError, match="for 2 layers and 11 tokens, .* got one for 2 and 11 with is_causal=False."):
        text_model(is_causal=True)(**text, cache=VARCache(model.config))
    with pytest.raises(ValueError, match="for 2 layers and 11 tokens with is_causal=False, .* got one for 3 and 11."):
        model(**text, cache=VARCache(tiny_config(num_hidden_layers=3)))


def test_a_checkpointed_step_cannot_read_a_cache(inputs):
    model, cache = text_model().train(), VARCache(text_config())
    with torch.no_grad():
        model(**text_of(inputs), cache=cache)
    enable_activation_checkpointing(model)
    with pytest.raises(ValueError, match="`cache` must be empty where layers are checkpointed"):
        model(scale_inputs=inputs["scale_inputs"], cache=cache)


def test_flash_attention_has_no_mask_of_blocks(inputs):
    model = text_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' has no mask of blocks.*use 'sdpa' or 'flex_attention'"):
        model(**inputs)


def test_attention_weights_that_cannot_be_had(inputs):
    model = text_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="`output_attentions` needs the attention implementation 'eager', not 'flex"):
        model(**inputs, output_attentions=True)


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 33}, "`hidden_size` must be a multiple of `num_attention_heads`, got 33 and 2"),
        ({"hidden_size": 36}, "`hidden_size` must be a multiple of 4 `num_attention_heads`.*got 36 and 2"),
        (
            {"hidden_size": 12, "num_attention_heads": 1},
            "`hidden_size` must be a multiple of 8 for `crop_conditioning`, got 12",
        ),
        ({"cross_attention_dim": 0}, "`cross_attention_dim` must be at least 1, got 0"),
        ({"pooled_projection_dim": 1.5}, "`pooled_projection_dim` must be an integer, at least 1, got 1.5"),
        ({"intermediate_size": 0}, "`intermediate_size` must be at least 1, got 0"),
        ({"rope_theta": 0.0}, "`rope_theta` must be positive, got 0.0"),
        ({"rope_size": "128"}, "`rope_size` must be a number, positive, got '128'"),
        ({"is_causal": None}, "`is_causal` must be true or false, got None"),
        ({"is_causal": 1}, "`is_causal` must be true or false, got 1"),
        ({"dropout": 1.0}, "`dropout` must be .*got 1.0"),
        ({"num_labels": 3}, "`num_labels` must be 0 for a model whose condition is a text, got 3 labels"),
        ({"id2label": {0: "cat"}}, "`num_labels` must be 0 for a model whose condition is a text, got 1 labels"),
        ({"block_lengths": [1]}, "`block_lengths` follows from other fields of TextVARConfig, leave it out"),
        ({"patch_nums": (3, 2)}, "`patch_nums` must end with its largest map"),
    ],
    ids=str,
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        text_config(**fields)


def test_other_widths_need_fewer_factors():
    assert text_config(hidden_size=12, num_attention_heads=1, crop_conditioning=False).feed_forward_size == 32
    assert TextVARConfig().feed_forward_size == 5120
