# SPDX-License-Identifier: Apache-2.0
"""Calls that cannot be meant: each error names the argument, what it was, and what would be right."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_var import VARCache
from priors.tiny import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def inputs(model):
    return tiny_inputs(model.config)


@pytest.fixture
def cache(model, inputs):
    """A cache with the first two of three blocks."""
    cache = VARCache(model.config)
    with torch.no_grad():
        model(inputs["class_labels"], inputs["scale_inputs"][:, :4], cache=cache)
    return cache


@pytest.mark.parametrize("tokens", [1, 3, 5, 9, 11])
def test_tokens_that_are_no_whole_blocks(model, tokens):
    with pytest.raises(
        ValueError,
        match=rf"`scale_inputs` must hold whole blocks after position 0, that is one of \[0, 4, 10\] tokens for "
        rf"patch_nums=\[1, 2, \[2, 3\]\], got {tokens}",
    ):
        model(torch.tensor([1]), torch.zeros(1, tokens, 4))


@pytest.mark.parametrize("tokens", [1, 5, 7])
def test_tokens_that_do_not_follow_the_cache(model, cache, tokens):
    message = rf"`scale_inputs` must hold whole blocks after position 5, that is one of \[6\] tokens .*, got {tokens}"
    with pytest.raises(ValueError, match=message):
        model(scale_inputs=torch.zeros(3, tokens, 4), cache=cache)
    assert cache.get_seq_length() == 5


def test_no_tokens_for_a_later_block(model, cache):
    for scale_inputs in (None, torch.zeros(3, 0, 4)):
        with pytest.raises(ValueError, match="`scale_inputs` must be passed: only the first block goes without"):
            model(scale_inputs=scale_inputs, cache=cache)


def test_full_cache(model, inputs, cache):
    model(scale_inputs=inputs["scale_inputs"][:, 4:], cache=cache)
    with pytest.raises(ValueError, match=r"`cache` is full: it holds all 11 tokens. .* `reset\(\)` it"):
        model(scale_inputs=inputs["scale_inputs"][:, :4], cache=cache)


def test_cache_that_ends_inside_a_block(model, cache):
    cache.crop(-2)
    message = r"`cache` must end with a whole block, at one of \[0, 1, 5\], got 3 tokens"
    with pytest.raises(ValueError, match=message):
        model(scale_inputs=torch.zeros(3, 6, 4), cache=cache)


@pytest.mark.parametrize("shape", [(1, 10), (1, 10, 5), (10, 4), (1, 1, 10, 4)])
def test_shape_of_scale_inputs(model, shape):
    with pytest.raises(ValueError, match=r"`scale_inputs` must have the shape \(batch, tokens, 4\), got \("):
        model(torch.tensor([1]), torch.zeros(shape))


@pytest.mark.parametrize("label", [-2, 6, 1000])
def test_class_out_of_range(model, label):
    message = rf"`class_labels` must be in \[0, 5\), or -1 or 5 for unconditional, got \[0, {label}\]"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([0, label]))


@pytest.mark.parametrize("labels", [torch.tensor(3), torch.tensor([[3]])])
def test_shape_of_classes(model, labels):
    with pytest.raises(ValueError, match=r"`class_labels` must have the shape \(batch,\), got \("):
        model(labels)


def test_both_kinds_of_class(model):
    with pytest.raises(ValueError, match="Pass one of `class_labels` and `class_embeds`, not both"):
        model(torch.tensor([1]), class_embeds=torch.zeros(1, 32))


@pytest.mark.parametrize("shape", [(32,), (1, 31), (1, 1, 32)])
def test_shape_of_class_embeddings(model, shape):
    with pytest.raises(ValueError, match=r"`class_embeds` must have the shape \(batch, 32\), got \("):
        model(class_embeds=torch.zeros(shape))


def test_class_embeddings_after_the_first_block(model, inputs, cache):
    with pytest.raises(ValueError, match="`class_embeds` must be passed with an image's first block only"):
        model(scale_inputs=inputs["scale_inputs"][:, 4:], class_embeds=torch.zeros(3, 32), cache=cache)


def test_another_cache_needs_the_class_at_every_call(model, inputs):
    cache = DynamicCache()
    model(inputs["class_labels"], cache=cache)
    with pytest.raises(ValueError, match="`class_labels` must be passed at every call with a cache which is not a"):
        model(scale_inputs=inputs["scale_inputs"][:, :4], cache=cache)


def test_cache_that_hands_out_what_it_does_not_hold(model, inputs):
    cache = StaticCache(model.config, max_cache_len=11)
    with pytest.raises(ValueError, match="`cache` must hand out just the tokens it holds.*got StaticCache"):
        model(inputs["class_labels"], cache=cache)


@pytest.mark.parametrize("shape", [(3, 10), (3, 12), (3,), (3, 11, 1)])
def test_codes_of_another_length(model, inputs, shape):
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(batch, 11\), got \("):
        model(inputs["class_labels"], inputs["scale_inputs"], labels=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("name", ["class_labels", "scale_inputs", "labels"])
def test_batches_of_unequal_size(model, inputs, name):
    inputs[name] = inputs[name][:2]
    with pytest.raises(ValueError, match=f"All arguments must have the same batch size, got .*'{name}': 2"):
        model(**inputs)


def test_batch_of_another_size_than_the_cache(model, inputs, cache):
    for images in (1, 2):
        with pytest.raises(ValueError, match=f"same batch size, got .*'scale_inputs': {images}, 'cache': 3"):
            model(scale_inputs=inputs["scale_inputs"][:images, 4:], cache=cache)
    assert cache.get_seq_length() == 5
    cache.reset()
    with pytest.raises(ValueError, match="A cache keeps that of its first call: pass a new one"):
        model(inputs["class_labels"][:2], cache=cache)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_attention_weights_of_an_implementation_that_has_none(attention):
    model = tiny_model(attention)
    message = (
        rf"`output_attentions` needs the attention implementation 'eager', not '{attention}': call `set_attn_impl"
    )
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([1]), output_attentions=True)


def test_flash_attention_over_several_blocks(inputs):
    model = tiny_model()
    # Without the kernels installed, the name can be set on the configuration alone; the mask is asked for before them.
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="'flash_attention_2' has no block-causal mask.*use 'sdpa' or 'flex_attention'"
    ):
        model(inputs["class_labels"], inputs["scale_inputs"])


def test_an_error_leaves_model_and_cache_usable(model, inputs):
    cache = VARCache(model.config)
    with torch.no_grad():
        expected = model(inputs["class_labels"]).logits
        with pytest.raises(ValueError, match="class_labels"):
            model(torch.tensor([99]), cache=cache)
        assert torch.equal(model(inputs["class_labels"], cache=cache).logits, expected)
