# SPDX-License-Identifier: Apache-2.0
"""Texts, embeddings and components that do not fit: refused before anything is sampled, by a message with the name."""

import pytest
import torch
from transformers import CLIPTextModelWithProjection

from hf_var import VARPipeline, VARTextToImagePipeline
from hf_var.scoring import log_likelihood
from pipelines.texts import (
    PROMPTS,
    embeddings_of,
    make_text_encoder,
    make_text_pipeline,
    make_text_transformer,
    make_tokenizer,
)
from pipelines.tiny import make_transformer, make_vqvae, seeded


NAN = float("nan")


@pytest.fixture(scope="module")
def pipe():
    return make_text_pipeline()


@pytest.fixture(scope="module")
def embeddings(pipe):
    return embeddings_of(pipe, PROMPTS)


@pytest.fixture(autouse=True)
def nothing_is_sampled(pipe):
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    yield
    handle.remove()
    assert calls == []


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, 3, [], [3], ["a", None], b"a"], ids=repr)
def test_prompts_that_are_no_texts(pipe, prompt):
    with pytest.raises(ValueError, match="`prompt` must be a text or a list of texts, got "):
        pipe(prompt)
    with pytest.raises(ValueError, match="`prompt` must be a text or a list of texts, got "):
        pipe.encode_prompt(prompt)


@pytest.mark.parametrize("negative_prompt", [3, [], [3], ["a", None, "b"]], ids=repr)
def test_negative_prompts_that_are_no_texts(pipe, negative_prompt):
    with pytest.raises(ValueError, match="`negative_prompt` must be a text or a list of texts, got "):
        pipe(PROMPTS, negative_prompt=negative_prompt)


def test_negative_prompts_of_another_number(pipe):
    with pytest.raises(ValueError, match="`negative_prompt` must be one text or 3, one for each prompt, got 2"):
        pipe(PROMPTS, negative_prompt=["a", "b"])


@pytest.mark.parametrize(
    "size",
    [512, (512,), (512, 512, 3), (0, 512), (-1, 5), (512.5, 512), [(512, 512)] * 2, "512", [[True, True]]],
    ids=repr,
)
def test_sizes(pipe, size):
    with pytest.raises(
        ValueError, match=r"`original_size` must be a \(height, width\) pair of positive integers, or 3"
    ):
        pipe(PROMPTS, original_size=size)


def test_a_size_for_a_model_that_reads_none(pipe):
    plain = make_text_pipeline(transformer={"crop_conditioning": False})
    with pytest.raises(ValueError, match="`original_size` needs a transformer with crop_conditioning=True"):
        plain(PROMPTS, original_size=(512, 512))
    plain(PROMPTS)


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "negative_"])
@pytest.mark.parametrize("missing", ["prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"])
def test_embeddings_in_part(pipe, embeddings, prefix, missing):
    name = f"{prefix}{missing}"
    some = {key: values for key, values in embeddings.items() if key != name}
    with pytest.raises(ValueError, match=f"`{name}` must be passed beside `{prefix}p"):
        pipe(**some)


def test_embeddings_and_texts(pipe, embeddings):
    with pytest.raises(ValueError, match="Pass one of `prompt` and `prompt_embeds`, not both"):
        pipe(PROMPTS, **embeddings)
    with pytest.raises(ValueError, match="Pass one of `negative_prompt` and `negative_prompt_embeds`, not both"):
        pipe(negative_prompt="", **embeddings)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prompt_embeds", lambda x: x[..., 1:], r"must have the shape \(batch, length, 40\), got \(3, 20, 39\)"),
        ("prompt_embeds", lambda x: x[0], r"must have the shape \(batch, length, 40\), got \(20, 40\)"),
        ("prompt_embeds", lambda x: x[:0], r"must have the shape \(batch, length, 40\), got \(0, 20, 40\)"),
        ("prompt_embeds", lambda x: x.long(), "must be a tensor of floating-point numbers, got torch.int64"),
        ("prompt_embeds", lambda x: x.tolist(), "must be a tensor of floating-point numbers, got list"),
        ("prompt_embeds", lambda x: x * NAN, "must be finite, got NaN or infinity among them"),
        ("pooled_prompt_embeds", lambda x: x[:, 1:], r"must have the shape \(batch, 16\), got \(3, 15\)"),
        ("pooled_prompt_embeds", lambda x: x[:, None], r"must have the shape \(batch, 16\), got \(3, 1, 16\)"),
        ("pooled_prompt_embeds", lambda x: x[:2], "must be those of as many texts as `prompt_embeds`, 3, got 2"),
        (
            "prompt_attention_mask",
            lambda x: x[:, 1:],
            r"must have the shape \(3, 20\) of `prompt_embeds`, got \(3, 19\)",
        ),
        ("prompt_attention_mask", lambda x: x[:2], r"must have the shape \(3, 20\) of `prompt_embeds`, got \(2, 20\)"),
        ("prompt_attention_mask", lambda x: x.float(), "must be a tensor of 0 and 1, got torch.float32"),
        ("prompt_attention_mask", lambda x: x.tolist(), "must be a tensor of 0 and 1, got list"),
        ("prompt_attention_mask", lambda x: x * 2, "must be 0 or 1"),
        ("prompt_attention_mask", lambda x: x * 0, "must be 1 for at least one token of each text"),
        ("negative_prompt_embeds", lambda x: x[..., 1:], r"must have the shape \(batch, length, 40\), got"),
        (
            "negative_pooled_prompt_embeds",
            lambda x: x[:2],
            "must be those of as many texts as `negative_prompt_embeds`",
        ),
    ],
)
def test_embeddings_of_another_kind(pipe, embeddings, name, change, message):
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        pipe(**{**embeddings, name: change(embeddings[name])})
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        pipe.encode_prompt(**{**embeddings, name: change(embeddings[name])})


def test_negative_embeddings_of_another_length(pipe, embeddings):
    shorter = {
        name: values[:, :9] if name in ("negative_prompt_embeds", "negative_prompt_attention_mask") else values
        for name, values in embeddings.items()
    }
    with pytest.raises(
        ValueError, match="`negative_prompt_embeds` must be as long as the 20 tokens of the prompts, got 9"
    ):
        pipe(**shorter)


def test_texts_without_text_encoders(pipe, embeddings):
    bare = make_text_pipeline(has_encoders=False)
    with pytest.raises(ValueError, match="`prompt_embeds` must be passed to a pipeline without text encoders"):
        bare(PROMPTS)
    positive = {name: values for name, values in embeddings.items() if "negative" not in name}
    with pytest.raises(
        ValueError, match="`negative_prompt_embeds` must be passed to a pipeline without text encoders"
    ):
        bare(**positive)
    bare(**positive, guidance_scale=1.0)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["guidance_start", "guidance_end", "smooth_start"])
@pytest.mark.parametrize("value", [-1, 4, 1.5, "1", True, NAN], ids=repr)
def test_numbers_of_scales(pipe, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number of scales from 0 to 3, got "):
        pipe(PROMPTS, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smooth": 1}, "`smooth` must be true or false, got 1"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1, got 0"),
        ({"guidance_scale": "7"}, "`guidance_scale` must be a finite number"),
        ({"generator": [seeded()]}, "`generator` must be one generator or 3, one per image, got 1"),
        ({"temperature": [1.0, 1.0]}, "`temperature` must be one value or 3, one per scale, got 2"),
        ({"refiner": make_transformer(), "refiner_start": 1}, "`refiner` must be a transformer like the pipeline's"),
        (
            {"refiner": make_text_transformer(pooled_projection_dim=8), "refiner_start": 1},
            "`refiner` must be a transformer like the pipeline's: pooled_projection_dim is 16 there, got 8",
        ),
    ],
    # Not the values, among which are models and generators.
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_values_of_options(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS, **settings)


@pytest.mark.parametrize("name", ["class_labels", "num_images_per_label", "class_embeds", "prompt_2", "negative"])
def test_options_of_other_pipelines(pipe, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        pipe(PROMPTS, **{name: 1})


def test_arguments_of_encoding(pipe):
    with pytest.raises(ValueError, match="`num_images_per_prompt` must be an integer of at least 1, got 0"):
        pipe.encode_prompt(PROMPTS, num_images_per_prompt=0)
    with pytest.raises(ValueError, match="`do_classifier_free_guidance` must be true or false, got 1"):
        pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=1)


# --- components ------------------------------------------------------------------------------------------------------


def parts(pipe, **changes):
    return {**pipe.components, **changes}


def test_a_text_encoder_with_a_projection(pipe):
    config = pipe.text_encoder_2.config
    with pytest.raises(
        ValueError, match="`text_encoder_2` must be a `CLIPTextModel`, whose pooled vector is not proj"
    ):
        VARTextToImagePipeline(**parts(pipe, text_encoder_2=CLIPTextModelWithProjection(config)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_2": None}, r"`text_encoder` must have hidden states of 40 .* got the widths \[24\]"),
        ({"text_encoder": None}, r"`text_encoder_2` must have hidden states of 40 .* got the widths \[16\]"),
        ({"tokenizer_2": None}, "`tokenizer_2` must be the tokenizer of `text_encoder_2`, got NoneType"),
        ({"tokenizer": "clip"}, "`tokenizer` must be the tokenizer of `text_encoder`, got str"),
        (
            {"text_encoder": torch.nn.Linear(2, 2)},
            "`text_encoder` must be a text encoder such as `CLIPTextModel`, got",
        ),
        (
            {"transformer": make_transformer()},
            "`transformer` must be a model with a TextVARConfig, got VARTransformer",
        ),
        ({"vqvae": make_vqvae(codebook_size=64)}, "`transformer` and `vqvae` do not belong together: codebook_size"),
        ({"guidance_scale": None}, "`guidance_scale` must be a finite number"),
        ({"top_k": None}, "`top_k` must be an integer, at least 0, got None"),
        ({"top_k": -1}, "`top_k` must be at least 0, got -1"),
        ({"smooth_rule": "other"}, "`smooth_rule` must be one of filtered, plain, got 'other'"),
    ],
    ids=str,
)
def test_components_that_do_not_belong_together(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        VARTextToImagePipeline(**parts(pipe, **changes))


def test_widths_of_text_encoders(pipe):
    with pytest.raises(ValueError, match=r"`text_encoder` and `text_encoder_2` must .* got the widths \[16, 16\]"):
        VARTextToImagePipeline(**parts(pipe, text_encoder=make_text_encoder(2), tokenizer=make_tokenizer(2)))


def test_the_pipeline_of_classes_refuses_it(pipe):
    with pytest.raises(ValueError, match="`transformer` must be a model with a VARConfig, got TextVARTransformer"):
        VARPipeline(make_text_transformer(), make_vqvae())
    with pytest.raises(
        ValueError, match="`class_labels` must be None for a pipeline of texts, which `prompt` has, got 0"
    ):
        log_likelihood(pipe, torch.rand(1, 3, 8, 8), 0)
