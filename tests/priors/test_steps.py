# SPDX-License-Identifier: Apache-2.0
"""The step protocol: however an image is cut into calls, its logits are those of one masked call."""

import pytest
import torch
from transformers import DynamicCache

from hf_var import VARCache
from priors.tiny import block_inputs, logits_block_by_block, logits_by_calls, tiny_inputs, tiny_model


SCHEDULES = {
    "scales": {},
    "raster": {"block_sizes": [1] * 11},
    "mixed": {"block_sizes": [2, 2, 1, 4, 2]},
    "one_scale": {"patch_nums": (3,)},
    "one_token": {"patch_nums": (1,)},
    "tall_and_wide": {"patch_nums": ((2, 1), (1, 3), (4, 3))},
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def cuts(num_blocks: int) -> list[list[int]]:
    """Ways to cut so many blocks into calls: one by one, several and then the rest, and the other way round."""
    ways = [[1] * num_blocks, [num_blocks]]
    if num_blocks > 2:
        ways += [[num_blocks - 1, 1], [1, num_blocks - 1], [2] + [1] * (num_blocks - 2)]
    if num_blocks > 4:
        ways += [[2, num_blocks - 3, 1]]
    return ways


@torch.no_grad()
def logits_in_one_call(model, inputs):
    return model(inputs["class_labels"], inputs["scale_inputs"]).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager", "blockwise_sdpa"])
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln_per_layer", "shared_adaln"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk_norm", "plain"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_cut_gives_the_logits_of_one_call(schedule, qk_norm, shared_adaln, attention):
    model = tiny_model(attention, qk_norm=qk_norm, shared_adaln=shared_adaln, **SCHEDULES[schedule])
    inputs = tiny_inputs(model.config)
    expected = logits_in_one_call(model, inputs)
    assert expected.shape == (3, model.config.length, model.config.codebook_size)
    assert expected.std(-1).mean() > 0.3
    for calls in cuts(len(model.config.block_lengths)):
        torch.testing.assert_close(logits_by_calls(model, inputs, calls, VARCache(model.config)), expected, **CLOSE)
        # A cache of another kind has no room for the class, which then comes with every call.
        logits = logits_by_calls(model, inputs, calls, DynamicCache(), label_every_call=True)
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [[3], [1, 2], [2, 1]])
def test_flex_attention_equals_eager(calls):
    """Square mask, rectangular mask, and none; its kernels are compiled at the first use, hence slow."""
    model = tiny_model("eager", num_hidden_layers=1)
    inputs = tiny_inputs(model.config)
    expected = logits_in_one_call(model, inputs)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        logits = logits_by_calls(model, inputs, calls, VARCache(model.config))
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_batch_equals_its_images_one_by_one():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    expected = logits_block_by_block(model, inputs)
    for image in range(3):
        single = {name: values[image : image + 1] for name, values in inputs.items()}
        torch.testing.assert_close(logits_block_by_block(model, single), expected[image : image + 1], **CLOSE)


def test_the_class_is_heard_at_the_first_call_only():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    expected = logits_in_one_call(model, inputs)
    cache = VARCache(model.config)
    other_classes = (inputs["class_labels"] + 1) % model.config.num_labels
    with torch.no_grad():
        model(inputs["class_labels"], cache=cache)
        second = block_inputs(model.config, inputs["scale_inputs"], 1, 2)
        logits = model(other_classes, second, cache=cache).logits
    torch.testing.assert_close(logits, expected[:, 1:5], **CLOSE)


def test_class_embeddings_stand_for_their_labels():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    expected = logits_in_one_call(model, inputs)
    embeds = model.embeddings.class_embedding.weight.detach()[inputs["class_labels"]]
    cache = VARCache(model.config)
    with torch.no_grad():
        logits = model(class_embeds=embeds, scale_inputs=inputs["scale_inputs"]).logits
        assert torch.equal(logits, expected)
        logits = [model(class_embeds=embeds, cache=cache).logits]
        logits.append(model(scale_inputs=inputs["scale_inputs"], cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


def test_blend_of_two_classes_lies_between_them():
    model = tiny_model()
    embeds = model.embeddings.class_embedding.weight.detach()
    with torch.no_grad():
        ends = model(torch.tensor([0, 1])).logits
        middle = model(class_embeds=(embeds[:1] + embeds[1:2]) / 2).logits
    assert not torch.allclose(middle, ends[:1], atol=0.1)
    assert not torch.allclose(middle, ends[1:], atol=0.1)


@pytest.mark.parametrize(
    "labels", [None, torch.tensor([-1]), torch.tensor([5])], ids=["none", "minus_one", "num_labels"]
)
def test_the_ways_to_say_unconditional_agree(labels):
    model = tiny_model()
    inputs = tiny_inputs(model.config, batch_size=1)
    inputs["class_labels"] = labels
    embeds = model.embeddings.class_embedding.weight[-1:].detach()
    with torch.no_grad():
        expected = model(class_embeds=embeds, scale_inputs=inputs["scale_inputs"]).logits
    assert torch.equal(logits_in_one_call(model, inputs), expected)
    torch.testing.assert_close(logits_block_by_block(model, inputs), expected, **CLOSE)


def test_none_is_unconditional_for_the_whole_batch():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    expected = logits_in_one_call(model, {**inputs, "class_labels": torch.full((3,), 5)})
    assert torch.equal(logits_in_one_call(model, {**inputs, "class_labels": None}), expected)
    # The first block alone has no input to tell the size of the batch from but the codes of its loss.
    with torch.no_grad():
        assert model(labels=inputs["labels"][:, :1]).logits.shape[0] == 3
        assert model().logits.shape[0] == 1


def test_a_model_without_classes():
    model = tiny_model(num_labels=0)
    assert model.embeddings.class_embedding.weight.shape == (1, 32)
    inputs = tiny_inputs(model.config)
    expected = logits_in_one_call(model, {**inputs, "class_labels": None})
    for label in (-1, 0):
        logits = logits_in_one_call(model, {**inputs, "class_labels": torch.full((3,), label)})
        assert torch.equal(logits, expected)
    with pytest.raises(ValueError, match="class_labels"):
        model(torch.tensor([1]))


def test_use_cache_makes_a_cache():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    expected = logits_in_one_call(model, inputs)
    with torch.no_grad():
        assert model(inputs["class_labels"]).cache is None
        output = model(inputs["class_labels"], use_cache=True)
        assert isinstance(output.cache, VARCache)
        rest = model(scale_inputs=inputs["scale_inputs"], cache=output.cache)
        assert rest.cache is output.cache
        torch.testing.assert_close(rest.logits, expected[:, 1:], **CLOSE)
        model.config.use_cache = True
        assert isinstance(model(inputs["class_labels"]).cache, VARCache)
        assert model(inputs["class_labels"], use_cache=False).cache is None
