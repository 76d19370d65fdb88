# SPDX-License-Identifier: Apache-2.0
"""The transformer that reads texts: what its logits depend on, and that they are the same however calls are cut."""

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from hf_var import VARCache
from hf_var.priors import attention
from priors.text import (
    TEXT,
    logits_by_calls,
    logits_in_one_call,
    logits_scale_by_scale,
    text_inputs,
    text_model,
    text_of,
)
from priors.tiny import block_inputs


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SCHEDULES = {
    "three": {},
    "one": {"patch_nums": (3,)},
    "tall_and_wide": {"patch_nums": ((2, 1), (1, 3), (2, 2), (4, 3))},
}


@pytest.fixture(params=[False, True], ids=["own_scale", "causal"])
def model(request):
    return text_model(is_causal=request.param)


@pytest.fixture
def inputs(model):
    return text_inputs(model.config)


def cuts(number: int) -> list[list[int]]:
    ways = [[1] * number, [number]]
    return [*ways, [number - 1, 1], [1, number - 1]] if number > 2 else ways


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "blockwise_sdpa"])
@pytest.mark.parametrize("crop", [False, True], ids=["plain", "crop"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["own_scale", "causal"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_cut_gives_the_logits_of_one_call(schedule, is_causal, crop, implementation):
    fields = {"is_causal": is_causal, "crop_conditioning": crop, **SCHEDULES[schedule]}
    inputs = text_inputs(text_model(**fields).config)
    expected = logits_in_one_call(text_model("eager", **fields), inputs)
    assert expected.std(-1).mean() > 0.3
    model = text_model(implementation, **fields)
    for calls in cuts(len(model.config.patch_nums)):
        torch.testing.assert_close(logits_by_calls(model, inputs, calls, VARCache(model.config)), expected, **CLOSE)
        if is_causal:
            # A cache of another kind has no room for the text, which then comes with every call.
            logits = logits_by_calls(model, inputs, calls, DynamicCache(), text_at_every_call=True)
            torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("min_segment_length", [1, 4, 6, 100])
@pytest.mark.parametrize("calls", [[3], [1, 2], [2, 1]], ids=str)
def test_segments_of_any_length_equal_a_masked_call(model, inputs, calls, min_segment_length, monkeypatch):
    monkeypatch.setattr(attention, "MIN_SEGMENT_LENGTH", min_segment_length)
    expected = logits_in_one_call(model, inputs)
    model.set_attn_implementation(attention.BLOCKWISE_SDPA)
    torch.testing.assert_close(logits_by_calls(model, inputs, calls, VARCache(model.config)), expected, **CLOSE)


@pytest.mark.parametrize(("is_causal", "expected"), [(False, 1 + 16 + 36), (True, 1 + 4 * 5 + 6 * 11)])
def test_blockwise_attention_computes_what_is_seen_alone(is_causal, expected, monkeypatch):
    monkeypatch.setattr(attention, "MIN_SEGMENT_LENGTH", 1)
    model, pairs = text_model("blockwise_sdpa", is_causal=is_causal, num_hidden_layers=1), []
    original = functional.scaled_dot_product_attention

    def count(query, key, *args, **kwargs):
        pairs.append(query.shape[2] * key.shape[2])
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", count)
    logits_in_one_call(model, text_inputs(model.config))
    # The last one is that of the 11 tokens to the text.
    assert (sum(pairs[:-1]), pairs[-1]) == (expected, 11 * 5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("calls", [[3], [1, 2], [2, 1]], ids=str)
def test_flex_attention_equals_eager(model, inputs, calls):
    """Its kernels are compiled at the first use, hence slow."""
    expected = logits_in_one_call(model, inputs)
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits_by_calls(model, inputs, calls, VARCache(model.config)), expected, **CLOSE)


def test_use_cache_makes_a_cache(model, inputs):
    expected = logits_in_one_call(model, inputs)
    with torch.no_grad():
        assert model(**text_of(inputs)).cache is None
        output = model(**text_of(inputs), use_cache=True)
        rest = model(scale_inputs=inputs["scale_inputs"], past_key_values=output.cache)
    assert type(rest.cache) is VARCache
    assert rest.cache is output.cache
    torch.testing.assert_close(rest.logits, expected[:, 1:], **CLOSE)


# --- what the logits depend on ---------------------------------------------------------------------------------------


def test_a_scale_sees_earlier_ones_in_causal_models_only(model, inputs):
    expected = logits_in_one_call(model, inputs)
    inputs["scale_inputs"][:, :4] += 1
    logits = logits_in_one_call(model, inputs)
    assert torch.equal(logits[:, :1], expected[:, :1])
    assert not torch.allclose(logits[:, 1:5], expected[:, 1:5], atol=0.1)
    assert torch.allclose(logits[:, 5:], expected[:, 5:], atol=1e-6) == (not model.config.is_causal)
    # And no scale the ones after it.
    inputs["scale_inputs"][:, 4:] += 1
    later = logits_in_one_call(model, inputs)
    torch.testing.assert_close(later[:, :5], logits[:, :5], atol=1e-6, rtol=0)
    assert not torch.allclose(later[:, 5:], logits[:, 5:], atol=0.1)


@pytest.mark.parametrize(
    "name", ["encoder_hidden_states", "pooled_projections", "crop_sizes", "encoder_attention_mask"]
)
def test_every_part_of_the_text_counts(model, inputs, name):
    expected = logits_in_one_call(model, inputs)
    inputs[name] = inputs[name].roll(1, dims=0)
    changed = (logits_in_one_call(model, inputs) - expected).abs().amax(dim=(0, 2))
    assert (changed > 0.03).all()


def test_padding_counts_for_nothing(model, inputs):
    expected = logits_in_one_call(model, inputs)
    is_padding = inputs["encoder_attention_mask"] == 0
    inputs["encoder_hidden_states"][is_padding] = 100.0
    torch.testing.assert_close(logits_in_one_call(model, inputs), expected, **CLOSE)
    # Nor does its length.
    for image, length in enumerate(inputs["encoder_attention_mask"].sum(dim=1).tolist()):
        single = {name: values[image : image + 1] for name, values in inputs.items()}
        single["encoder_hidden_states"] = single["encoder_hidden_states"][:, :length]
        del single["encoder_attention_mask"]
        for logits in (logits_in_one_call(model, single), logits_scale_by_scale(model, single)):
            torch.testing.assert_close(logits, expected[image : image + 1], **CLOSE)


def test_no_mask_is_a_mask_of_ones(model, inputs):
    inputs["encoder_attention_mask"] = torch.ones(3, 5, dtype=torch.bool)
    expected = logits_in_one_call(model, inputs)
    del inputs["encoder_attention_mask"]
    torch.testing.assert_close(logits_in_one_call(model, inputs), expected, **CLOSE)


def test_a_batch_equals_its_images_one_by_one(model, inputs):
    expected = logits_scale_by_scale(model, inputs)
    for image in range(3):
        single = {name: values[image : image + 1] for name, values in inputs.items()}
        torch.testing.assert_close(logits_scale_by_scale(model, single), expected[image : image + 1], **CLOSE)


def test_no_sizes_are_those_of_a_square(model, inputs):
    for side in (512, 77):
        inputs["crop_sizes"] = torch.full((3, 2), side)
        expected = logits_in_one_call(model, inputs)
        text = {name: values for name, values in text_of(inputs).items() if name != "crop_sizes"}
        with torch.no_grad():
            logits = model(**text, scale_inputs=inputs["scale_inputs"]).logits
        assert torch.equal(logits, expected)


def test_integers_of_any_width_are_the_same(model, inputs):
    narrow = {**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"].to(torch.int8)}
    narrow |= {name: inputs[name].to(torch.int16) for name in ("crop_sizes", "labels")}
    assert torch.equal(model(**narrow).loss, model(**inputs).loss)


# --- the cache -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model, inputs, number):
    cache = VARCache(model.config)
    logits_by_calls(model, inputs, [1] * number, cache)
    return cache


@torch.no_grad()
def last_scale(model, inputs, cache):
    return model(scale_inputs=block_inputs(model.config, inputs["scale_inputs"], 2, 3), cache=cache).logits


def test_what_a_cache_holds(model, inputs):
    cache = fill(model, inputs, 2)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [5, 5]
    assert (cache.batch_size, cache.get_max_length(), len(cache.cross_attention)) == (3, 11, 2)
    for layer in range(2):
        keys, values = cache.cross_attention[layer]
        assert keys.shape == values.shape == (3, 2, 5, 16)
        held = cache.layers[layer].keys
        # Where tokens see their own scale alone, nothing is kept of them.
        assert held.shape == (3, 2, 11, 16) if model.config.is_causal else held is None
    assert torch.equal(cache.cross_mask, inputs["encoder_attention_mask"].bool())


def test_what_depends_on_the_text_is_computed_once_an_image(model, inputs):
    calls = []
    parts = [
        module for name, module in model.named_modules() if name.endswith("adaln.linear") or "context_norm" in name
    ]
    parts += [
        projection
        for layer in model.layers
        for projection in (layer.cross_attention.k_proj, layer.cross_attention.v_proj)
    ]
    parts += [model.embeddings.condition_proj, model.embeddings.crop_embedding]
    assert len(parts) == 3 + 2 + 4 + 2
    for part in parts:
        part.register_forward_hook(lambda *_: calls.append(1))
    cache = VARCache(model.config)
    for images in (1, 2):
        logits_by_calls(model, inputs, [1, 1, 1], cache)
        assert len(calls) == images * len(parts)
        cache.reset()


def test_reset_makes_room_for_the_next_image(model, inputs):
    cache = fill(model, inputs, 3)
    cache.reset()
    assert (cache.get_seq_length(), cache.modulations, cache.cross_attention, cache.cross_mask) == (0, {}, {}, None)
    other = text_inputs(model.config, seed=1)
    del other["encoder_attention_mask"]
    assert torch.equal(logits_by_calls(model, other, [1, 1, 1], cache), logits_scale_by_scale(model, other))


def test_crop_goes_back_to_an_earlier_scale(model, inputs):
    expected = logits_scale_by_scale(model, inputs)
    cache = fill(model, inputs, 3)
    cache.crop(-6)
    torch.testing.assert_close(last_scale(model, inputs, cache), expected[:, 5:], **CLOSE)
    cache.crop(-11)
    other = text_inputs(model.config, seed=1)
    logits = logits_by_calls(model, other, [1, 1, 1], cache)
    torch.testing.assert_close(logits, logits_scale_by_scale(model, other), **CLOSE)


@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
def test_images_can_be_chosen_and_reordered(model, inputs, operation):
    indices = torch.tensor([2, 0])
    cache = fill(model, inputs, 2)
    getattr(cache, operation)(indices)
    chosen = {name: values[indices] for name, values in inputs.items()}
    expected = logits_scale_by_scale(model, chosen)
    torch.testing.assert_close(last_scale(model, chosen, cache), expected[:, 5:], **CLOSE)
    assert cache.batch_size == 2


def test_images_can_be_repeated(model, inputs):
    cache = fill(model, inputs, 2)
    cache.batch_repeat_interleave(2)
    repeated = {name: values.repeat_interleave(2, dim=0) for name, values in inputs.items()}
    repeated["scale_inputs"][1::2, 4:] += 1
    expected = logits_scale_by_scale(model, repeated)
    torch.testing.assert_close(last_scale(model, repeated, cache), expected[:, 5:], **CLOSE)


def test_two_images_at_once_do_not_mix(model, inputs):
    """Nothing of an image's state lives in the modules, so two caches may take turns."""
    others = text_inputs(model.config, batch_size=2, seed=1)
    expected = [logits_scale_by_scale(model, each) for each in (inputs, others)]
    caches = [VARCache(model.config), VARCache(model.config)]
    with torch.no_grad():
        for scale, (begin, end) in enumerate([(0, 1), (1, 5), (5, 11)]):
            for cache, each, logits in zip(caches, (inputs, others), expected, strict=True):
                scale_inputs = block_inputs(model.config, each["scale_inputs"], scale, scale + 1)
                output = model(**text_of(each) if scale == 0 else {}, scale_inputs=scale_inputs, cache=cache)
                torch.testing.assert_close(output.logits, logits[:, begin:end], **CLOSE)


@pytest.mark.parametrize("calls", [[3], [2, 1]], ids=str)
def test_gradients_pass_through_a_cache(calls):
    """A call with our cache, and several with one that grows, have the gradients of a call without."""
    model = text_model(is_causal=True)
    inputs = text_inputs(model.config)

    def gradients(logits):
        functional.cross_entropy(logits.mT, inputs["labels"]).backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    text = text_of(inputs)
    expected = gradients(model(**text, scale_inputs=inputs["scale_inputs"]).logits)
    cache, logits, first = VARCache(model.config) if calls == [3] else DynamicCache(), [], 0
    for number in calls:
        scale_inputs = block_inputs(model.config, inputs["scale_inputs"], first, first + number)
        logits.append(model(**text, scale_inputs=scale_inputs, cache=cache).logits)
        first += number
    for name, gradient in gradients(torch.cat(logits, dim=1)).items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **CLOSE)


def test_contrast_of_these_tests(model, inputs):
    """What every comparison here rests upon: predictions differ between codes, tokens and images."""
    logits = logits_in_one_call(model, inputs)
    assert min(logits.std(dim).mean() for dim in (0, 1, 2)) > 0.3
    assert set(text_of(inputs)) == set(TEXT)


# --- no text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["own_scale", "causal"])
def test_learned_vectors_take_the_place_of_no_text(is_causal, implementation):
    model = text_model(implementation, is_causal=is_causal, learned_empty_text=True)
    inputs = text_inputs(model.config)
    expected = logits_in_one_call(model, inputs)
    empty = model.embeddings.empty_text
    inputs["encoder_attention_mask"][1] = 0
    logits = logits_in_one_call(model, inputs)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], **CLOSE)
    torch.testing.assert_close(logits_scale_by_scale(model, inputs), logits, **CLOSE)
    # What the text would have been does not matter.
    for name in ("encoder_hidden_states", "pooled_projections"):
        changed = {
            **inputs,
            name: inputs[name] + torch.tensor([0.0, 1.0, 0.0]).view(3, *[1] * (inputs[name].ndim - 1)),
        }
        assert torch.equal(logits_in_one_call(model, changed), logits)
    given = {name: values[1:2] for name, values in inputs.items()}
    given["encoder_hidden_states"] = empty.hidden_state.data.view(1, 1, -1)
    given["pooled_projections"] = empty.pooled.data[None]
    given["encoder_attention_mask"] = torch.ones(1, 1, dtype=torch.long)
    torch.testing.assert_close(logits_in_one_call(model, given), logits[1:2], **CLOSE)


def test_learned_vectors_are_trained_by_texts_that_are_missing():
    model = text_model(learned_empty_text=True)
    inputs = text_inputs(model.config)
    model(**inputs).loss.backward()
    empty = model.embeddings.empty_text
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in empty.parameters())
    inputs["encoder_attention_mask"][0] = 0
    model(**inputs).loss.backward()
    assert all(parameter.grad.any() for parameter in empty.parameters())


def test_other_models_have_no_such_vectors(model, inputs):
    assert not any("empty_text" in name for name, _ in model.named_parameters())
    assert model.embeddings.empty_text is None
