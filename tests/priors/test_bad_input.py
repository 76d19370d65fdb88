# SPDX-License-Identifier: Apache-2.0
"""Calls that cannot be meant: each error names the argument, what it was, and what would be right."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_var import VARCache
from priors.tiny import tiny_config, tiny_inputs, tiny_model


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
    message = rf"`class_labels` must be in \[0, 5\), or -1 or 5 for unconditional, got values from {min(0, label)} to {max(0, label)}"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([0, label]))
    with pytest.raises(ValueError, match=message):
        model.get_class_embeds(torch.tensor([0, label]))


@pytest.mark.parametrize("labels", [torch.tensor(3), torch.tensor([[3]])])
def test_shape_of_classes(model, labels):
    for call in (model, model.get_class_embeds):
        with pytest.raises(ValueError, match=r"`class_labels` must have the shape \(batch,\), got \("):
            call(labels)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("class_labels", torch.Tensor.tolist, "must be integers in a tensor, got list"),
        ("class_labels", lambda values: 3, "must be integers in a tensor, got int 3"),
        ("class_labels", torch.Tensor.float, r"must be integers in a tensor, got torch.float32 of the shape \(3,\)"),
        ("class_labels", torch.Tensor.bool, "must be integers in a tensor, got torch.bool"),
        ("scale_inputs", torch.Tensor.tolist, "must be floating-point numbers in a tensor, got list"),
        ("scale_inputs", torch.Tensor.long, "must be floating-point numbers in a tensor, got torch.int64"),
        ("labels", torch.Tensor.tolist, "must be integers in a tensor, got list"),
        ("labels", torch.Tensor.float, "must be integers in a tensor, got torch.float32"),
        ("labels", torch.Tensor.bool, "must be integers in a tensor, got torch.bool"),
        ("labels", lambda values: values + 19, r"must be in \[0, 19\), or -100, got values from 19 to 37"),
        ("labels", lambda values: values - 20, r"must be in \[0, 19\), or -100, got values from -20 to -2"),
    ],
)
def test_kind_of_every_input(model, inputs, name, change, message):
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        model(**inputs)
    if name == "class_labels":
        with pytest.raises(ValueError, match=f"`{name}` {message}"):
            model.get_class_embeds(inputs[name])


@pytest.mark.parametrize("embeds", [torch.zeros(1, 32, dtype=torch.int64), [[0.0] * 32], "cat"], ids=str)
def test_kind_of_class_embeddings(model, embeds):
    with pytest.raises(ValueError, match="`class_embeds` must be floating-point numbers in a tensor, got"):
        model(class_embeds=embeds)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_integers_of_any_width_are_the_same(dtype):
    # More classes than 8 bits hold: dropped ones would wrap around.
    model = tiny_model(num_labels=300, class_dropout_prob=0.999)
    inputs = tiny_inputs(model.config)
    inputs["class_labels"] = torch.tensor([0, 3, 100])
    small = {**inputs, **{name: inputs[name].to(dtype) for name in ("class_labels", "labels")}}
    for training in (False, True):
        model.train(training)
        expected, output = model(**inputs), model(**small)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)


def test_targets_may_be_left_out(model, inputs):
    inputs["labels"][:, 3:] = -100
    expected = torch.nn.functional.cross_entropy(
        model(inputs["class_labels"], inputs["scale_inputs"]).logits[:, :3].flatten(0, 1),
        inputs["labels"][:, :3].flatten(),
    )
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("name", ["scale_input", "input_ids", "class_label"])
def test_unknown_arguments(model, inputs, name):
    with pytest.raises(TypeError, match=rf"unknown arguments \['{name}'\]"):
        model(inputs["class_labels"], **{name: inputs["scale_inputs"]})


@pytest.mark.parametrize("cache", [(), "cache", {}], ids=str)
def test_cache_that_is_none(model, inputs, cache):
    with pytest.raises(ValueError, match="`cache` must be a `VARCache` or another `Cache` of transformers, got"):
        model(inputs["class_labels"], cache=cache)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1}, {"patch_nums": (1, 2)}], ids=str)
def test_cache_of_another_model(model, inputs, fields):
    cache = VARCache(tiny_config(**fields))
    with pytest.raises(
        ValueError, match=r"`cache` must be for 2 layers and 11 tokens, as .* got one for [12] and (5|11)"
    ):
        model(inputs["class_labels"], cache=cache)
    assert cache.get_seq_length() == 0


def test_cache_of_no_configuration(model):
    with pytest.raises(ValueError, match="`config` must be a `VARConfig` or a `TextVARConfig`, got VARTransformer"):
        VARCache(model)


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
    other = DynamicCache()
    model(inputs["class_labels"], cache=other)
    with pytest.raises(ValueError, match="same batch size, got .*'class_labels': 2.*'cache': 3"):
        model(inputs["class_labels"][:2], inputs["scale_inputs"][:2, :4], cache=other)


@pytest.mark.parametrize("attention", ["sdpa", "blockwise_sdpa"])
def test_attention_weights_that_torch_does_not_return(inputs, attention):
    model = tiny_model(attention)
    logger = logging.get_logger("transformers.integrations.sdpa_attention")
    logger.warning_once.cache_clear()
    with CaptureLogger(logger) as log, torch.no_grad():
        output = model(**inputs, output_attentions=True)
        assert torch.equal(output.logits, model(**inputs).logits)
    assert "attention does not support `output_attentions=True`. Please set your attention to `eager`" in log.out
    assert not output.attentions


def test_attention_weights_of_an_implementation_that_has_none_and_does_not_warn():
    model = tiny_model("flex_attention")
    message = (
        "`output_attentions` needs the attention implementation 'eager', not 'flex_attention': call `set_attn_impl"
    )
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([1]), output_attentions=True)


def test_flash_attention_over_several_blocks(inputs):
    model = tiny_model()
    # Without the kernels installed, the name can be set on the configuration alone; the mask is asked for before them.
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' has no mask of blocks.*use 'sdpa' or 'flex_attention'"):
        model(inputs["class_labels"], inputs["scale_inputs"])


def test_an_error_leaves_model_and_cache_usable(model, inputs):
    cache = VARCache(model.config)
    with torch.no_grad():
        expected = model(inputs["class_labels"]).logits
        with pytest.raises(ValueError, match="class_labels"):
            model(torch.tensor([99]), cache=cache)
        assert torch.equal(model(inputs["class_labels"], cache=cache).logits, expected)
