# SPDX-License-Identifier: Apache-2.0
"""Labels as texts under the names that servers and other pipelines have for them: `prompt`, `num_images_per_prompt`."""

import inspect

import pytest
import torch

from hf_var import ARPipeline, VARImg2ImgPipeline, VARInpaintPipeline, VARPipeline
from pipelines import tiny_ar
from pipelines.stacked import image_pipeline, make_raster, make_stacked, text_pipeline
from pipelines.tiny import make_pipeline, seeded


IMAGE = torch.rand(1, 3, 8, 8, generator=seeded())
MASK = torch.ones(8, 8)
PIPELINES = {
    "generation": (make_pipeline, VARPipeline, ()),
    "variation": (make_pipeline, VARImg2ImgPipeline, (IMAGE,)),
    "in-painting": (make_pipeline, VARInpaintPipeline, (IMAGE, MASK)),
    "pixelcnn": (tiny_ar.make_pipeline, ARPipeline, ()),
    "levels": (lambda: tiny_ar.make_pipeline(2), ARPipeline, ()),
    "raster": (make_raster, ARPipeline, ()),
    "stacks": (lambda: make_stacked(class_dropout_prob=0.1), ARPipeline, ()),
}


@pytest.fixture(params=PIPELINES)
def draw(request):
    """A call of a pipeline: codes of labels."""
    make, pipeline_class, images = PIPELINES[request.param]
    pipe = pipeline_class.from_pipe(make())
    pipe.set_progress_bar_config(disable=True)
    return lambda **arguments: pipe(*images, generator=seeded(), **arguments).codes


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [("1", [1]), ("id:1", [1]), (["2", "0"], [2, 0]), ("", [None]), (("1", ""), [1, None])],
    ids=repr,
)
def test_a_prompt_is_a_label(draw, prompt, labels):
    assert torch.equal(draw(prompt=prompt), draw(class_labels=labels))


def test_a_prompt_is_a_name(pipe):
    for prompt, label in {"goldfish": 1, "tench, Tinca tinca": 0, "name:Arctic owl": 3}.items():
        expected = pipe(label, generator=seeded())
        assert torch.equal(pipe(prompt=prompt, generator=seeded()).codes, expected.codes)


def test_the_numbers_of_images_mean_the_same(draw):
    expected = draw(class_labels=[1, 0], num_images_per_label=3)
    assert len(expected) == 6
    assert torch.equal(draw(prompt=["1", "0"], num_images_per_prompt=3), expected)
    assert torch.equal(draw(class_labels=[1, 0], num_images_per_prompt=3), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "owl of snow"}, "`prompt` has the unknown name 'owl of snow'; "),
        ({"prompt": "99"}, r"`prompt` must be in \[0, .*got 99"),
        ({"prompt": ["1", "99"]}, r"`prompt` must be in \[0, .*got 99"),
        ({"prompt": 1}, "`prompt` must be a text or a list of texts, got 1"),
        ({"prompt": []}, r"`prompt` must be a text or a list of texts, got \[\]"),
        ({"prompt": ["1", None]}, r"`prompt` must be a text or a list of texts, got \['1', None\]"),
        ({"prompt": "1", "class_labels": 1}, "Pass one of `class_labels` and `prompt`, not both"),
        ({"prompt": "1", "class_labels": 0}, "Pass one of `class_labels` and `prompt`, not both"),
        ({"prompt": "1", "num_images_per_prompt": 0}, "`num_images_per_prompt` must be .*got 0"),
        (
            {"prompt": "1", "num_images_per_prompt": 2, "num_images_per_label": 2},
            "Pass one of `num_images_per_label` and `num_images_per_prompt`, which mean the same, not both",
        ),
    ],
    ids=repr,
)
def test_bad_prompts_are_refused(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)


def test_messages_name_the_prompt(pipe):
    embeds = pipe.get_class_embeds([1])
    with pytest.raises(ValueError, match="Pass one of `prompt` and `class_embeds`, not both"):
        pipe(prompt="1", class_embeds=embeds)
    vary = VARImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="`image` and `prompt` must be as many, or one for all, got 2 and 3"):
        vary(IMAGE.repeat(2, 1, 1, 1), prompt=["0", "1", "3"])
    with pytest.raises(ValueError, match="`prompt` must be classes: the prior was trained without class dropout"):
        make_stacked()(prompt="")


def test_a_model_without_classes_has_the_empty_prompt():
    pipe = make_pipeline(transformer={"num_labels": 0})
    assert torch.equal(pipe(prompt="", generator=seeded()).codes, pipe(generator=seeded()).codes)
    with pytest.raises(ValueError, match="`prompt` has the unknown name 'a cat'; the model has no classes"):
        pipe(prompt="a cat")


def test_models_of_other_conditions_keep_their_meaning():
    assert len(text_pipeline()(prompt="a thin three", generator=seeded()).images) == 1
    with pytest.raises(ValueError, match="`prompt` needs a pipeline with a `tokenizer`"):
        image_pipeline()(prompt="1")


@pytest.mark.parametrize("pipeline_class", [VARPipeline, VARImg2ImgPipeline, VARInpaintPipeline, ARPipeline])
def test_servers_find_the_arguments(pipeline_class):
    parameters = inspect.signature(pipeline_class.__call__).parameters
    assert parameters["prompt"].default is None
    assert parameters["num_images_per_prompt"].default == 1
