# SPDX-License-Identifier: Apache-2.0
"""The two names of the cache, before and since transformers 5.24, in calls and in outputs."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hf_var import VARCache, VARTransformerOutput
from priors.tiny import tiny_inputs, tiny_model


NAMES = ["cache", "past_key_values"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs(model):
    return tiny_inputs(model.config)


@pytest.mark.parametrize(
    "make", [lambda model: VARCache(model.config), lambda model: DynamicCache()], ids=["own", "dynamic"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_call_fills_the_cache_by_either_name(model, inputs, name, make):
    cache = make(model)
    with torch.no_grad():
        expected = model(inputs["class_labels"], inputs["scale_inputs"]).logits
        first = model(inputs["class_labels"], **{name: cache})
        assert cache.get_seq_length() == 1
        rest = model(inputs["class_labels"], inputs["scale_inputs"], **{name: cache})
    assert first.cache is rest.cache is cache
    assert cache.get_seq_length() == 11
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected, atol=1e-5, rtol=1e-5)


def test_two_caches_are_refused(model, inputs):
    caches = VARCache(model.config), VARCache(model.config)
    with pytest.raises(ValueError, match="one of `cache` and `past_key_values`.*not both"):
        model(inputs["class_labels"], cache=caches[0], past_key_values=caches[1])
    assert [cache.get_seq_length() for cache in caches] == [0, 0]


@pytest.mark.parametrize("name", ["cache_params", "layer_past", "past_key_value", "past", "kv_cache"])
def test_a_name_of_another_models_cache_is_refused(model, inputs, name):
    message = rf"unknown arguments \['{name}'\]. A cache must be passed as `cache`"
    with pytest.raises(TypeError, match=message):
        model(inputs["class_labels"], **{name: VARCache(model.config)})


@pytest.mark.parametrize("name", NAMES)
def test_no_attention_function_gets_to_see_the_cache(inputs, name, monkeypatch):
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    model = tiny_model()
    model.config._attn_implementation = "watched"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "watched", attention)
    model(inputs["class_labels"], **{name: VARCache(model.config)})
    assert len(seen) == len(model.layers)
    for kwargs in seen:
        assert kwargs.keys() == {"dropout", "scaling", "is_causal"}
        assert not any(isinstance(value, Cache) for value in kwargs.values())


def test_an_output_is_read_by_either_name(model):
    cache = VARCache(model.config)
    output = VARTransformerOutput(logits=torch.zeros(1), cache=cache)
    warnings = []
    logger = logging.get_logger("transformers.utils.generic")
    logger.addFilter(lambda record: warnings.append(record.getMessage()))
    try:
        assert output.cache is output.past_key_values is cache
        assert output["cache"] is output["past_key_values"] is cache
    finally:
        logger.filters.clear()
    assert warnings == []
    assert list(output) == ["logits", "cache"]
    assert output.to_tuple()[1] is output[1] is cache
    assert VARTransformerOutput(logits=torch.zeros(1)).past_key_values is None
    for twin in (copy.copy(output), pickle.loads(pickle.dumps(output))):
        assert isinstance(twin.past_key_values, VARCache)
        assert list(twin) == ["logits", "cache"]
    with pytest.raises(KeyError):
        output["past"]


def test_both_names_are_known_to_those_who_place_or_gather(model):
    """Hooks of Accelerate must not move the cache, transformers' trainer must not collect it as a prediction."""
    assert set(model._skip_keys_device_placement) == set(NAMES)
    assert model.config.keys_to_ignore_at_inference == NAMES
    assert "keys_to_ignore_at_inference" not in model.config.to_dict()
