# SPDX-License-Identifier: Apache-2.0
"""Configurations and calls of RQ-Transformers that cannot be meant."""

import pytest
import torch
from transformers import DynamicCache

from hf_var import RQTransformerConfig, VARCache
from hf_var.compatibility import enable_activation_checkpointing
from priors.rq import GPT, SIZES, TEXT, condition_of, rq_inputs, rq_model
from priors.tiny import tiny_config


@pytest.fixture(scope="module")
def model():
    return rq_model("classes")


@pytest.fixture(scope="module")
def text_model():
    return rq_model("bidirectional")


@pytest.fixture(scope="module")
def gpt():
    return rq_model("gpt")


@pytest.fixture
def inputs(model):
    return rq_inputs(model.config)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_nums": (4, 8)}, r"`patch_nums` must be maps of one size, one for each depth, got \[4, 8\]"),
        ({"patch_nums": ()}, "`patch_nums` must be a list"),
        ({"hidden_size": 33}, "`hidden_size` must be a multiple of `num_attention_heads`, got 33 and 2"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"num_hidden_layers": 2.5}, "`num_hidden_layers` must be an integer, at least 1, got 2.5"),
        ({"num_depth_layers": 0}, "`num_depth_layers` must be at least 1 for 3 depths, got 0"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1, got 1.0"),
        ({"code_inputs": "images"}, "`code_inputs` must be one of vectors, tokens, got 'images'"),
        ({"hidden_act": "relu"}, "`hidden_act` must be one of gelu, quick_gelu, got 'relu'"),
        (
            {"separate_depth_embeddings": True},
            "`separate_depth_embeddings` needs `code_inputs='tokens'`, got 'vectors'",
        ),
        ({"shared_embedding": True}, "`shared_embedding` needs `code_inputs='tokens'` with one table for all depths"),
        ({**GPT, "num_labels": 12}, "`num_labels` must be at most the 11 codes .*, got 12"),
        ({**GPT, "class_dropout_prob": 0.1}, "`class_dropout_prob` must be 0 with `shared_embedding`.*, got 0.1"),
        ({**GPT, "condition_vocab_size": 7}, "`condition_vocab_size` must be None where .*, got 7"),
        ({**TEXT, "num_labels": 5}, "`condition_vocab_size` must be None where .*, got 7"),
        (
            {"condition_length": 2},
            "`condition_length` above 1 needs `condition_vocab_size` or .*, got 2 with num_labels=0",
        ),
        ({"condition_loss_weight": 0.1}, "`condition_loss_weight` must be 0 with one condition token.*, got 0.1"),
        ({"max_position_embeddings": 5}, "`max_position_embeddings` must be at least 6, the tokens .*, got 5"),
        ({"num_labels": 3, "id2label": {0: "cat"}}, "`num_labels` is 3 but `id2label` names 1 labels"),
    ],
    ids=str,
)
def test_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        RQTransformerConfig(**{**SIZES, **fields})


def test_what_follows_from_a_configuration():
    config = RQTransformerConfig()
    assert (config.num_labels, config.depth, config.num_positions, config.length) == (1000, 4, 64, 256)
    assert (config.num_condition_ids, config.unconditional_id, config.head_dim) == (1000, None, 64)
    assert config.depth_config.num_hidden_layers == 4
    assert config.num_hidden_layers == 12
    assert RQTransformerConfig(class_dropout_prob=0.1).unconditional_id == 1000
    text = RQTransformerConfig(condition_length=32, condition_vocab_size=500)
    assert (text.num_labels, text.num_condition_ids, text.unconditional_id) == (0, 500, None)
    gpt = RQTransformerConfig(**{**SIZES, **GPT}, num_labels=0)
    assert (gpt.num_condition_ids, gpt.unconditional_id) == (11, 0)
    assert RQTransformerConfig(**{**SIZES, **GPT}, num_labels=3).unconditional_id is None
    with pytest.raises(ValueError, match="`dropout` must be at least 0 and below 1, got 2.0"):
        RQTransformerConfig.from_dict(config.to_dict(), dropout=2.0)


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 5, 100])
def test_class_out_of_range(model, inputs, label):
    message = rf"`class_labels` must be in \[0, 5\), got values from {min(0, label)} to {max(0, label)}"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([0, label]), use_cache=True)
    if label < 5:
        rq_model("guided")(torch.tensor([0, label]), use_cache=True)


def test_no_condition_at_all(model, inputs, text_model):
    with pytest.raises(ValueError, match="`class_labels` must be passed: this model knows no unconditional condition"):
        model(code_vectors=inputs["code_vectors"])
    with pytest.raises(ValueError, match="`condition_ids` must be passed"):
        text_model(code_vectors=inputs["code_vectors"])


def test_two_conditions(model):
    with pytest.raises(ValueError, match="Pass one of `class_labels` and `condition_ids`, not both"):
        model(torch.tensor([1]), condition_ids=torch.tensor([[1]]))


@pytest.mark.parametrize("labels", [torch.tensor(3), torch.tensor([[3]])])
def test_shape_of_classes(model, labels):
    with pytest.raises(ValueError, match=r"`class_labels` must have the shape \(batch,\)"):
        model(labels, use_cache=True)


def test_conditions_of_text(text_model):
    with pytest.raises(ValueError, match="`class_labels` need a model of classes: pass `condition_ids`"):
        text_model(torch.tensor([0]))
    for shape in ((1, 3), (4,), (1, 4, 1)):
        with pytest.raises(ValueError, match=r"`condition_ids` must have the shape \(batch, 4\), got \("):
            text_model(condition_ids=torch.zeros(shape, dtype=torch.long))
    for token in (-1, 7):
        with pytest.raises(ValueError, match=r"`condition_ids` must be in \[0, 7\), got values from "):
            text_model(condition_ids=torch.tensor([[0, 0, 0, token]]))


# --- codes -----------------------------------------------------------------------------------------------------------


def test_codes_of_the_wrong_kind(model, gpt, inputs):
    with pytest.raises(
        ValueError, match="`code_vectors` must be passed to a model with code_inputs='vectors', got `codes`"
    ):
        model(torch.tensor([1, 1, 1]), codes=inputs["labels"])
    with pytest.raises(
        ValueError, match="`codes` must be passed to a model with code_inputs='tokens', got `code_vectors`"
    ):
        gpt(torch.tensor([1, 1, 1]), code_vectors=inputs["code_vectors"])


@pytest.mark.parametrize("shape", [(1, 6, 3), (1, 6, 2, 4), (1, 6, 3, 5), (1, 0, 3, 4), (18, 4)])
def test_shape_of_code_vectors(model, shape):
    with pytest.raises(ValueError, match=r"`code_vectors` must have the shape \(batch, positions, 3, 4\), got \("):
        model(torch.tensor([1]), code_vectors=torch.zeros(shape))


def test_codes_out_of_range(gpt):
    with pytest.raises(ValueError, match=r"`codes` must be in \[0, 11\), got values from 0 to 11"):
        gpt(torch.tensor([1]), codes=torch.tensor([[[0], [11]]]))


def test_more_positions_than_there_are(model, inputs):
    vectors = inputs["code_vectors"]
    with pytest.raises(ValueError, match="Codes of at most 5 positions can be read after the condition.*got 6"):
        model(inputs["class_labels"], code_vectors=torch.cat([vectors, vectors[:, :1]], dim=1))
    cache = DynamicCache()
    model(inputs["class_labels"], code_vectors=vectors[:, :5], cache=cache)
    with pytest.raises(ValueError, match="Codes of at most 5 positions can be read after the condition.*got 6"):
        model(code_vectors=vectors[:, 5:], cache=cache)
    assert cache.get_seq_length() == 6


def test_condition_and_codes_in_the_wrong_calls(model, inputs):
    cache = DynamicCache()
    model(inputs["class_labels"], cache=cache)
    with pytest.raises(
        ValueError, match="`class_labels` must be passed with no call but an image's first.*holds 1 tokens"
    ):
        model(inputs["class_labels"], code_vectors=inputs["code_vectors"][:, :1], cache=cache)
    with pytest.raises(ValueError, match="`codes` must be passed with every call but an image's first"):
        model(cache=cache)


def test_a_part_of_the_condition(text_model):
    cache = DynamicCache()
    text_model(condition_ids=torch.zeros(1, 4, dtype=torch.long), cache=cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match="`cache` must hold the whole condition of 4 tokens or nothing, got 3"):
        text_model(code_vectors=torch.zeros(1, 1, 3, 4), cache=cache)


def test_batch_sizes(model, inputs):
    with pytest.raises(
        ValueError, match=r"All arguments must have the same batch size, got \{'class_labels': 2, 'codes': 3\}"
    ):
        model(torch.tensor([1, 2]), code_vectors=inputs["code_vectors"])
    cache = DynamicCache()
    model(torch.tensor([1, 2]), cache=cache)
    with pytest.raises(ValueError, match=r"All arguments must have the same batch size, got .*'cache': 2"):
        model(code_vectors=inputs["code_vectors"][:, :1], cache=cache)


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "gpt", "text"])
def test_integers_of_any_width_are_the_same(kind):
    model = rq_model(kind)
    inputs = rq_inputs(model.config)
    narrow = {
        name: values if values.is_floating_point() else values.to(torch.uint8) for name, values in inputs.items()
    }
    assert torch.equal(model(**narrow).loss, model(**inputs).loss)


@pytest.mark.parametrize("kind", ["classes", "gpt", "text"])
def test_values_of_another_type(kind):
    model = rq_model(kind)
    inputs = rq_inputs(model.config)
    for name, values in inputs.items():
        other, expected = (
            (values.long(), "floating-point numbers") if name == "code_vectors" else (values / 2, "integers")
        )
        for wrong in (other, values.tolist()):
            with pytest.raises(ValueError, match=f"`{name}` must be {expected} in a tensor, got "):
                model(**{**inputs, name: wrong})
    soft_labels = torch.zeros(*inputs.pop("labels").shape, 11, dtype=torch.long)
    with pytest.raises(ValueError, match="`soft_labels` must be floating-point numbers in a tensor, got torch.int64"):
        model(**inputs, soft_labels=soft_labels)
    with pytest.raises(ValueError, match="`context` must be floating-point numbers in a tensor, got torch.int64"):
        model.predict_depth(torch.zeros(1, 32, dtype=torch.long))


def test_unknown_arguments(model, inputs):
    with pytest.raises(TypeError, match=r"RQTransformer.forward\(\) got the unknown arguments \['input_ids'\]"):
        model(**inputs, input_ids=inputs["labels"])


def test_caches_that_are_none_or_of_another_model(model, inputs):
    with pytest.raises(ValueError, match="`cache` must be a `VARCache` or another `Cache` of transformers, got tuple"):
        model(inputs["class_labels"], cache=())
    with pytest.raises(ValueError, match="`cache` must be a `DynamicCache` or another .*, got VARCache"):
        model(inputs["class_labels"], cache=VARCache(tiny_config()))


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels(model, inputs):
    soft_labels = torch.full((3, 6, 3, 11), 1 / 11)
    with pytest.raises(ValueError, match="Pass one of `labels` and `soft_labels`, not both"):
        model(**inputs, soft_labels=soft_labels)
    with pytest.raises(ValueError, match="`labels` need codes to predict and a call without a cache"):
        model(**inputs, use_cache=True)
    labels = inputs.pop("labels")
    with pytest.raises(ValueError, match="`labels` need codes to predict"):
        model(inputs["class_labels"], labels=labels)
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(batch, 6, 3\), got \(3, 18\)"):
        model(**inputs, labels=labels.flatten(1))
    with pytest.raises(
        ValueError, match=r"`soft_labels` must have the shape \(3, 6, 3, 11\) of the codes, got \(3, 6, 3, 10\)"
    ):
        model(**inputs, soft_labels=soft_labels[..., :10])
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match=r"`labels` must be in \[0, 11\), or -100, got values from "):
            model(**inputs, labels=torch.where(labels == labels[0, 0, 0], wrong, labels))


# --- depths ----------------------------------------------------------------------------------------------------------


def test_depths(model, gpt):
    context, vectors = torch.randn(2, 32), torch.randn(2, 3, 4)
    for shape in ((32,), (2, 31), (2, 1, 32)):
        with pytest.raises(ValueError, match=r"`context` must have the shape \(batch, 32\), got \("):
            model.predict_depth(torch.zeros(shape))
    with pytest.raises(ValueError, match="`codes` must be fewer than the 3 of a position, got 3"):
        model.predict_depth(context, code_vectors=vectors)
    with pytest.raises(ValueError, match="`codes` must be fewer than the 1 of a position, got 1"):
        gpt.predict_depth(context, codes=torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match=r"`code_vectors` must have the shape \(batch, depths, 4\), got \(2, 4\)"):
        model.predict_depth(context, code_vectors=vectors[:, 0])
    with pytest.raises(ValueError, match="All arguments must have the same batch size"):
        model.predict_depth(context[:1], code_vectors=vectors[:, :1])
    cache = DynamicCache()
    model.predict_depth(context, cache=cache)
    with pytest.raises(
        ValueError, match="`cache` must be empty at a position's first code and hold at most 0 depths, got 1"
    ):
        model.predict_depth(context, cache=cache)


def test_a_checkpointed_step_cannot_read_a_cache(inputs):
    model = rq_model("classes").train()
    cache = DynamicCache()
    with torch.no_grad():
        model(**condition_of(inputs), cache=cache)
    enable_activation_checkpointing(model)
    with pytest.raises(ValueError, match="`cache` must be empty where layers are checkpointed"):
        model(code_vectors=inputs["code_vectors"][:, :1], cache=cache)
