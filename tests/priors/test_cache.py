# SPDX-License-Identifier: Apache-2.0
"""The cache: what it holds, what it saves, and what its operations leave behind."""

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from hf_var import VARCache
from priors.tiny import block_inputs, logits_block_by_block, logits_by_calls, tiny_inputs, tiny_model


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=[False, True], ids=["adaln_per_layer", "shared_adaln"])
def model(request):
    return tiny_model(shared_adaln=request.param)


@pytest.fixture
def inputs(model):
    return tiny_inputs(model.config)


@torch.no_grad()
def fill(model, inputs, num_blocks):
    cache = VARCache(model.config)
    logits_by_calls(model, inputs, [1] * num_blocks, cache)
    return cache


@torch.no_grad()
def last_block(model, inputs, cache):
    num_blocks = len(model.config.block_lengths)
    scale_inputs = block_inputs(model.config, inputs["scale_inputs"], num_blocks - 1, num_blocks)
    return model(scale_inputs=scale_inputs, cache=cache).logits


def pointers(cache):
    return [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def test_buffers_are_allocated_once_and_hold_the_whole_length(model, inputs):
    cache = VARCache(model.config)
    assert not cache.is_initialized
    assert len(cache) == 2
    assert cache.get_max_length() == 11
    seen = []
    with torch.no_grad():
        for block, end in enumerate([1, 5, 11]):
            scale_inputs = block_inputs(model.config, inputs["scale_inputs"], block, block + 1)
            model(inputs["class_labels"] if block == 0 else None, scale_inputs, cache=cache)
            assert [cache.get_seq_length(layer) for layer in range(2)] == [end, end]
            seen.append(pointers(cache))
    assert seen[0] == seen[1] == seen[2]
    assert all(layer.keys.shape == layer.values.shape == (3, 2, 11, 16) for layer in cache.layers)
    assert cache.is_initialized
    assert cache.is_croppable


def test_adaln_is_computed_once_an_image(model, inputs):
    calls = []
    linears = [module for name, module in model.named_modules() if name.endswith("adaln.linear")]
    assert len(linears) == (2 if model.config.shared_adaln else 3)
    for linear in linears:
        linear.register_forward_hook(lambda *_: calls.append(1))
    offsets = []
    for layer in model.layers:
        layer.adaln.register_forward_hook(lambda *_: offsets.append(1))
    cache = VARCache(model.config)
    for images in (1, 2):
        logits_by_calls(model, inputs, [1, 1, 1], cache)
        assert len(calls) == images * len(linears)
        assert len(offsets) == images * len(model.layers)
        cache.reset()
    # Without a place to keep them, the vectors are made at every call.
    with torch.no_grad():
        model(inputs["class_labels"], inputs["scale_inputs"])
    assert len(calls) == 3 * len(linears)


def test_reset_makes_room_for_the_next_image(model, inputs):
    cache = fill(model, inputs, 3)
    before = pointers(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.modulations
    other = tiny_inputs(model.config, seed=1)
    logits = logits_by_calls(model, other, [1, 1, 1], cache)
    assert torch.equal(logits, logits_block_by_block(model, other))
    assert pointers(cache) == before


def test_crop_goes_back_to_an_earlier_block(model, inputs):
    expected = logits_block_by_block(model, inputs)
    cache = fill(model, inputs, 3)
    cache.crop(-6)
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(last_block(model, inputs, cache), expected[:, 5:], **CLOSE)
    # Another second block after the same first one.
    cache.crop(-10)
    other = {**inputs, "scale_inputs": tiny_inputs(model.config, seed=1)["scale_inputs"]}
    with torch.no_grad():
        logits = model(scale_inputs=other["scale_inputs"], cache=cache).logits
    torch.testing.assert_close(logits, logits_block_by_block(model, other)[:, 1:], **CLOSE)


def test_crop_to_nothing_forgets_the_class(model, inputs):
    cache = fill(model, inputs, 3)
    cache.crop(-11)
    other = tiny_inputs(model.config, seed=1)
    assert not torch.equal(other["class_labels"], inputs["class_labels"])
    logits = logits_by_calls(model, other, [1, 1, 1], cache)
    torch.testing.assert_close(logits, logits_block_by_block(model, other), **CLOSE)


@pytest.mark.parametrize("tokens", [1, -12])
def test_crop_checks_its_argument(model, inputs, tokens):
    cache = fill(model, inputs, 3)
    with pytest.raises(ValueError, match=rf"`tokens_to_remove` must be from -11 to 0, got {tokens}"):
        cache.crop(tokens)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
def test_images_can_be_chosen_and_reordered(model, inputs, operation):
    indices = torch.tensor([2, 0])
    cache = fill(model, inputs, 2)
    getattr(cache, operation)(indices)
    chosen = {name: values[indices] for name, values in inputs.items()}
    expected = logits_block_by_block(model, chosen)
    torch.testing.assert_close(last_block(model, chosen, cache), expected[:, 5:], **CLOSE)


def test_images_can_be_repeated(model, inputs):
    cache = fill(model, inputs, 2)
    cache.batch_repeat_interleave(2)
    repeated = {name: values.repeat_interleave(2, dim=0) for name, values in inputs.items()}
    # Two continuations of each image, which differ.
    repeated["scale_inputs"][1::2, 4:] += 1
    expected = logits_block_by_block(model, repeated)
    torch.testing.assert_close(last_block(model, repeated, cache), expected[:, 5:], **CLOSE)


def test_operations_on_an_unused_cache_change_nothing(model, inputs):
    cache = VARCache(model.config)
    cache.reset()
    cache.crop(0)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0]))
    logits = logits_by_calls(model, inputs, [1, 1, 1], cache)
    assert torch.equal(logits, logits_block_by_block(model, inputs))


def test_two_images_at_once_do_not_mix(model, inputs):
    """Nothing of an image's state lives in the modules, so two caches may take turns."""
    other = tiny_inputs(model.config, batch_size=2, seed=1)
    expected = [logits_block_by_block(model, each) for each in (inputs, other)]
    caches = [VARCache(model.config), VARCache(model.config)]
    with torch.no_grad():
        for block, (begin, end) in enumerate([(0, 1), (1, 5), (5, 11)]):
            for cache, each, logits in zip(caches, (inputs, other), expected, strict=True):
                scale_inputs = block_inputs(model.config, each["scale_inputs"], block, block + 1)
                output = model(each["class_labels"] if block == 0 else None, scale_inputs, cache=cache)
                torch.testing.assert_close(output.logits, logits[:, begin:end], **CLOSE)


def test_cache_takes_the_dtype_of_the_model(model, inputs):
    model.to(torch.bfloat16)
    cache = fill(model, inputs, 2)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    assert last_block(model, inputs, cache).dtype == torch.float32


@pytest.mark.parametrize("calls", [[3], [2, 1]])
def test_gradients_pass_through_a_cache(model, inputs, calls):
    """A call with our cache, and several with one that grows, have the gradients of a call without."""

    def gradients(logits):
        functional.cross_entropy(logits.mT, inputs["labels"]).backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    expected = gradients(model(inputs["class_labels"], inputs["scale_inputs"]).logits)
    cache = VARCache(model.config) if calls == [3] else DynamicCache()
    logits = logits_by_calls(model, inputs, calls, cache, label_every_call=True)
    for name, gradient in gradients(logits).items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **CLOSE)
