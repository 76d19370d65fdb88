# SPDX-License-Identifier: Apache-2.0
"""In-painting and variations by a text: what is kept, what is drawn, and what both share with the pipelines of classes."""

import inspect

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline

from hf_var import VARTextImg2ImgPipeline, VARTextInpaintPipeline, VARTextToImagePipeline
from hf_var.pipelines.images import given_tokens
from hf_var.pipelines.options import TextCallOptions
from pipelines.texts import PROMPTS, embeddings_of, make_text_pipeline
from pipelines.tiny import seeded


PATCH_NUMS = (1, 2, 3, 4)
IMAGES = torch.rand(2, 3, 8, 8, generator=seeded(3))
HALF = torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], dim=1)


@pytest.fixture(params=[False, True], ids=["own_scale", "causal"])
def pipe(request):
    return make_text_pipeline(transformer={"is_causal": request.param}, patch_nums=PATCH_NUMS)


def edit(pipe, kind, *args, seed=0, **settings):
    made = kind.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made(*args, **{"generator": seeded(seed), "output_type": "pt", **settings})


def codes_of(pipe, images):
    with torch.no_grad():
        return pipe.vqvae.encode(images * 2 - 1).codes


@pytest.mark.parametrize("kind", [VARTextInpaintPipeline, VARTextImg2ImgPipeline])
def test_every_option_is_shown_and_documented(kind):
    parameters = inspect.signature(kind.__call__).parameters
    assert list(parameters)[:3] == ["self", "prompt", "image"]
    assert TextCallOptions.__optional_keys__ < parameters.keys()
    own = parameters.keys() - TextCallOptions.__optional_keys__ - {"self"}
    documentation = inspect.getdoc(kind.__call__)
    assert [name for name in own if f"{name} (" not in documentation] == []


# --- in-painting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"smooth": True}, {"guidance_scale": 1.0}, {"guidance_end": 2}], ids=str)
def test_kept_positions_hold_the_codes_of_the_image(pipe, settings):
    kept = given_tokens(HALF[None, None], pipe.vqvae.config)[0]
    assert 0 < kept.sum() < 30
    expected = codes_of(pipe, IMAGES[:1])
    outputs = [
        edit(pipe, VARTextInpaintPipeline, PROMPTS[0], IMAGES[:1], HALF, seed=seed, **settings) for seed in range(3)
    ]
    for output in outputs:
        assert torch.equal(output.codes[:, kept], expected[:, kept])
    assert len(torch.cat([output.codes[:, ~kept] for output in outputs]).unique(dim=0)) > 1
    other = edit(pipe, VARTextInpaintPipeline, PROMPTS[1], IMAGES[:1], HALF, **settings)
    assert not torch.equal(other.codes, outputs[0].codes)


def test_a_black_mask_gives_the_reconstruction(pipe):
    output = edit(pipe, VARTextInpaintPipeline, PROMPTS[0], IMAGES, torch.zeros(8, 8))
    assert torch.equal(output.codes, codes_of(pipe, IMAGES))
    pasted = edit(
        pipe, VARTextInpaintPipeline, PROMPTS[0], IMAGES, torch.zeros(8, 8), paste_original=True, feather_width=0
    )
    torch.testing.assert_close(pasted.images, IMAGES)


def test_the_drawn_part_is_what_the_transformer_expects(pipe):
    """Every drawn code is the most likely one, given the merged codes of all scales before."""
    output = edit(pipe, VARTextInpaintPipeline, PROMPTS[0], IMAGES[:1], HALF, top_k=1, guidance_scale=1.0)
    embeddings = embeddings_of(pipe, PROMPTS[0])
    with torch.no_grad():
        logits = pipe.transformer(
            embeddings["prompt_embeds"],
            embeddings["prompt_attention_mask"],
            embeddings["pooled_prompt_embeds"],
            scale_inputs=pipe.vqvae.teacher_forcing(output.codes),
        ).logits
    drawn = ~given_tokens(HALF[None, None], pipe.vqvae.config)[0]
    assert torch.equal(output.codes[:, drawn], logits.argmax(-1)[:, drawn])


def test_prompts_images_and_masks_are_matched(pipe):
    settings = {"negative_prompt": ["the cat", "blurry"], "num_images_per_prompt": 2}
    generators = [seeded(seed) for seed in range(4)]
    together = edit(pipe, VARTextInpaintPipeline, PROMPTS[:2], IMAGES, HALF, generator=generators, **settings)
    for number in range(4):
        of = number // 2
        single = edit(
            pipe,
            VARTextInpaintPipeline,
            PROMPTS[of],
            IMAGES[of],
            HALF,
            seed=number,
            negative_prompt=settings["negative_prompt"][of],
        )
        assert torch.equal(single.codes, together.codes[number : number + 1])
    with pytest.raises(ValueError, match="`image` and `mask_image` and `prompt` must be as many, or one for all"):
        edit(pipe, VARTextInpaintPipeline, PROMPTS, IMAGES, HALF)


def test_one_prompt_serves_all_images(pipe):
    embeddings = embeddings_of(pipe, PROMPTS[0])
    output = edit(pipe, VARTextInpaintPipeline, PROMPTS[0], IMAGES, HALF)
    assert len(output.images) == 2
    again = edit(pipe, VARTextInpaintPipeline, None, IMAGES, HALF, **embeddings)
    assert torch.equal(again.codes, output.codes)


# --- variations ------------------------------------------------------------------------------------------------------


def test_the_coarse_scales_are_kept(pipe):
    expected = codes_of(pipe, IMAGES)
    output = edit(pipe, VARTextImg2ImgPipeline, PROMPTS[:2], IMAGES, num_kept_scales=2)
    assert torch.equal(output.codes[:, :5], expected[:, :5])
    assert not torch.equal(output.codes[:, 5:], expected[:, 5:])
    half = edit(pipe, VARTextImg2ImgPipeline, PROMPTS[:2], IMAGES)
    assert torch.equal(half.codes, output.codes)


def test_both_ends_of_the_strength(pipe):
    expected = codes_of(pipe, IMAGES)
    assert torch.equal(edit(pipe, VARTextImg2ImgPipeline, PROMPTS[0], IMAGES, strength=0.0).codes, expected)
    free = edit(pipe, VARTextImg2ImgPipeline, PROMPTS[:2], IMAGES, strength=1.0)
    generated = edit(pipe, VARTextToImagePipeline, PROMPTS[:2])
    assert torch.equal(free.codes, generated.codes)


def test_an_image_is_needed(pipe):
    for kind in (VARTextInpaintPipeline, VARTextImg2ImgPipeline):
        with pytest.raises(ValueError, match="`image` must be a picture, an array, a tensor .*got NoneType"):
            edit(pipe, kind, PROMPTS[0])


# --- folders ---------------------------------------------------------------------------------------------------------


def test_auto_pipelines_choose_the_class_of_the_task(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = edit(pipe, VARTextInpaintPipeline, PROMPTS[0], IMAGES, HALF)
    for loader, kind in (
        (AutoPipelineForInpainting, VARTextInpaintPipeline),
        (AutoPipelineForImage2Image, VARTextImg2ImgPipeline),
    ):
        assert type(loader.from_pretrained(tmp_path)) is kind
        assert type(loader.from_pipe(pipe)) is kind
    loaded = AutoPipelineForInpainting.from_pretrained(tmp_path)
    assert torch.equal(edit(loaded, VARTextInpaintPipeline, PROMPTS[0], IMAGES, HALF).codes, expected.codes)
    loaded.save_pretrained(tmp_path / "inpaint")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "inpaint")) is VARTextInpaintPipeline
