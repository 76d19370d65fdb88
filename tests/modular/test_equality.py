# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines draw what the ordinary ones draw, byte for byte."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import TemperatureLogitsWarper

from hf_var import (
    TokenPruning,
    VARImg2ImgPipeline,
    VARInpaintPipeline,
    VARTextImg2ImgPipeline,
    VARTextInpaintPipeline,
)
from modular.blocks import draw, modular_of
from pipelines.texts import PROMPTS, embeddings_of, make_text_pipeline, make_text_transformer
from pipelines.tiny import make_pipeline, make_transformer, seeded


IMAGES = torch.rand(2, 3, 8, 8, generator=seeded(5))
MASK = torch.zeros(8, 8)
MASK[:, :4] = 1
TEXT = {"prompt": PROMPTS[:2]}
OPTIONS = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": lambda k, number: 4.0 if k == number - 1 else 1.0},
    {"top_k": [5, 0, 3], "top_p": 0.5, "temperature": [2.0, 1.0, 0.7]},
    {"smooth": True},
    {"output_type": "pil"},
    {"output_type": "np"},
    {"output_type": "latent"},
    {"generator": [1, 2]},
    {"logits_processor": TemperatureLogitsWarper(0.5)},
    {"layer_hooks": [TokenPruning([0.5])]},
]


def options_of(number: int, options: dict, images: int = 2) -> dict:
    """Options with new generators."""
    seeds = options.get("generator", 0)
    generator = [seeded(seeds[0] + i) for i in range(images)] if isinstance(seeds, list) else seeded(number)
    return {"output_type": "pt", **options, "generator": generator}


def assert_equal(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert type(found) is type(expected)
        assert np.array_equal(np.stack(list(map(np.asarray, found))), np.stack(list(map(np.asarray, expected))))


def check(pipe, call, number: int, options: dict, images: int = 2, **inputs) -> None:
    expected = call(**inputs, **options_of(number, options, images))
    found, codes = draw(modular_of(pipe), **inputs, **options_of(number, options, images))
    assert torch.equal(codes, expected.codes)
    assert_equal(found, expected.images)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def text_pipe():
    return make_text_pipeline()


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_classes(pipe, number):
    check(pipe, pipe, number, OPTIONS[number], class_labels=[3, "goldfish"])


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_texts(text_pipe, number):
    check(text_pipe, text_pipe, number, OPTIONS[number], **TEXT)


@pytest.mark.parametrize("number", [0, 2, 4, 5, 8])
@pytest.mark.parametrize("inputs", [{"strength": 0.7}, {"num_kept_scales": 1}, {"strength": 0.0}, {}])
def test_variations(pipe, text_pipe, number, inputs):
    options = OPTIONS[number]
    check(pipe, VARImg2ImgPipeline.from_pipe(pipe), number, options, image=IMAGES, class_labels=[1, None], **inputs)
    check(text_pipe, VARTextImg2ImgPipeline.from_pipe(text_pipe), number, options, image=IMAGES, **TEXT, **inputs)


@pytest.mark.parametrize("number", [0, 2, 4, 5, 8])
@pytest.mark.parametrize("inputs", [{}, {"paste_original": True}, {"paste_original": True, "feather_width": 0}])
def test_in_painting(pipe, text_pipe, number, inputs):
    options, given = OPTIONS[number], {"image": IMAGES, "mask_image": MASK, **inputs}
    check(pipe, VARInpaintPipeline.from_pipe(pipe), number, options, class_labels=[1, None], **given)
    check(text_pipe, VARTextInpaintPipeline.from_pipe(text_pipe), number, options, **TEXT, **given)


@pytest.mark.parametrize("labels", [None, -1, 4, "goldfish", torch.tensor([2]), [[0]]])
def test_all_kinds_of_labels(pipe, labels):
    check(pipe, pipe, 0, {"num_images_per_label": 3, "generator": [4]}, images=3, class_labels=labels)


def test_labels_as_prompts(pipe):
    inputs = {"prompt": ["goldfish", "3"], "num_images_per_prompt": 2}
    expected = pipe(**inputs, generator=seeded(), output_type="pt").images
    found = modular_of(pipe)(**inputs, generator=seeded(), output_type="pt", output="images")
    assert torch.equal(found, expected)
    assert len(found) == 4
    numbers = ({"num_images_per_label": 2, "num_images_per_prompt": number} for number in (1, 2))
    for both in ({"class_labels": [1], "prompt": ["3"]}, *numbers):
        with pytest.raises(ValueError, match="Pass one of"):
            modular_of(pipe)(**{"class_labels": [1], **both})


def test_inputs_of_one_serve_all(pipe):
    picture = PIL.Image.fromarray((IMAGES[0].movedim(0, -1).numpy() * 255).astype("uint8"))
    given = {"image": picture, "mask_image": MASK, "num_images_per_label": 2, "paste_original": True}
    check(pipe, VARInpaintPipeline.from_pipe(pipe), 0, {}, class_labels=[1, 2], **given)


def test_class_embeds(pipe):
    embeds = torch.lerp(*pipe.get_class_embeds([0, 3]).split(1), 0.5)
    check(pipe, pipe, 0, {}, class_embeds=embeds)


def test_a_refiner(pipe, text_pipe):
    options = {"refiner_start": 1}
    check(pipe, pipe, 0, options, class_labels=[1, 2], refiner=make_transformer(seed=7, num_hidden_layers=1))
    check(text_pipe, text_pipe, 0, options, refiner=make_text_transformer(seed=7, num_hidden_layers=1), **TEXT)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_start": 1},
        {"guidance_end": 2, "smooth": True, "smooth_start": 1},
        {"negative_prompt": "dark", "num_images_per_prompt": 2},
    ],
)
def test_options_of_texts(text_pipe, options):
    check(text_pipe, text_pipe, 0, options, **TEXT)


def test_embeddings_of_texts(text_pipe):
    alone = make_text_pipeline(has_encoders=False)
    check(alone, alone, 0, {}, **embeddings_of(text_pipe, PROMPTS))


def test_crop_conditioning():
    pipe = make_text_pipeline({"crop_conditioning": True})
    check(pipe, pipe, 0, {}, original_size=(300, 400), **TEXT)


def test_defaults_of_the_checkpoint():
    """They are others than those of a pipeline without any."""
    pipe = make_pipeline()
    pipe.register_to_config(guidance_scale=5.0, top_p=0.3, temperature=1.7)
    check(pipe, pipe, 0, {}, class_labels=[0, 1])
    pipe = make_text_pipeline()
    pipe.register_to_config(guidance_scale=5.0, top_k=3, top_p=0.3, smooth_rule="filtered", guidance_rule="constant")
    check(pipe, pipe, 0, {"smooth": True}, **TEXT)


def test_models_in_training_mode_are_sampled_without_dropout(pipe):
    transformer = make_transformer(attention_dropout=0.5).train()
    made = modular_of(pipe)
    made.update_components(transformer=transformer)
    first, second = (draw(made, class_labels=[1, 2], generator=seeded(), output_type="pt")[0] for _ in range(2))
    assert torch.equal(first, second)
    assert transformer.training
