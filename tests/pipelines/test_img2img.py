# SPDX-License-Identifier: Apache-2.0
"""Variations: the first scales are the image's, the rest is drawn. What counts as an image: test_inpaint_input.py."""

import inspect

import numpy
import pytest
import torch

from hf_var import VARImg2ImgPipeline, VARPipeline
from pipelines.tiny import make_pipeline, make_transformer, seeded


PATCH_NUMS = (1, 2, 3, 4)
ENDS = (0, 1, 5, 14, 30)


@pytest.fixture
def pipe() -> VARImg2ImgPipeline:
    made = VARImg2ImgPipeline.from_pipe(make_pipeline(patch_nums=PATCH_NUMS))
    made.set_progress_bar_config(disable=True)
    return made


def images(number: int = 2) -> torch.Tensor:
    return torch.rand(number, 3, 8, 8, generator=seeded(3))


def vary(pipe, image=None, labels=(0, 1), seed=0, **settings):
    settings = {"output_type": "pt", "generator": seeded(seed), **settings}
    return pipe(images() if image is None else image, list(labels), **settings)


def calls_of(model) -> list[tuple[int, ...]]:
    """Fills with batch size and length of every call of the model."""
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(tuple(output.logits.shape[:2])))
    return seen


def test_signature():
    ours, theirs = (
        {name: parameter.default for name, parameter in inspect.signature(kind.__call__).parameters.items()}
        for kind in (VARImg2ImgPipeline, VARPipeline)
    )
    assert list(ours)[:3] == ["self", "image", "class_labels"]
    assert [name for name in ours if name in theirs] == list(theirs)
    assert {name: ours[name] for name in theirs} == theirs
    assert {name: ours[name] for name in ours.keys() - theirs.keys() - {"image"}} == {
        "strength": None,
        "num_kept_scales": None,
    }


@pytest.mark.parametrize("num_kept", range(5))
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_first_scales_are_the_images(pipe, num_kept, guidance_scale, smooth):
    expected = pipe.encode_images(images())
    settings = {"num_kept_scales": num_kept, "guidance_scale": guidance_scale, "smooth": smooth}
    first, second = (vary(pipe, seed=seed, **settings).codes for seed in range(2))
    end = ENDS[num_kept]
    assert torch.equal(first[:, :end], expected[:, :end])
    assert torch.equal(second[:, :end], expected[:, :end])
    if num_kept < 4:
        assert not torch.equal(first[:, end:], second[:, end:])
        assert not torch.equal(first[:, end:], expected[:, end:])


@pytest.mark.parametrize("num_kept", range(4))
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_kept_scales_are_read_in_one_pass(pipe, num_kept, guidance_scale):
    """As if the model had drawn them itself: the logits are those of all scales at once."""
    seen = calls_of(pipe.transformer)
    output = vary(pipe, num_kept_scales=num_kept, guidance_scale=guidance_scale, top_k=1)
    batch = 2 if guidance_scale == 1 else 4
    assert seen[0] == (batch, ENDS[num_kept + 1])
    assert seen[1:] == [(batch, number**2) for number in PATCH_NUMS[num_kept + 1 :]]
    with torch.no_grad():
        inputs = pipe.vqvae.teacher_forcing(output.codes)
        labels = [torch.tensor([0, 1]), torch.tensor([5, 5])]
        conditional, unconditional = (pipe.transformer(label, inputs).logits for label in labels)
    depth = torch.repeat_interleave(torch.arange(4) / 3, torch.tensor([1, 4, 9, 16]))[None, :, None]
    weight = 1 + (guidance_scale - 1) * depth
    logits = weight * conditional + (1 - weight) * unconditional
    end = ENDS[num_kept]
    assert torch.equal(output.codes[:, end:], logits.argmax(-1)[:, end:])


@pytest.mark.parametrize(
    ("strength", "num_kept"), [(0, 4), (0.24, 4), (0.25, 3), (0.5, 2), (0.74, 2), (0.75, 1), (1, 0), (None, 2)]
)
def test_strength_is_the_share_of_scales_that_are_drawn(pipe, strength, num_kept):
    expected = vary(pipe, num_kept_scales=num_kept)
    for value in (strength, None if strength is None else numpy.float64(strength)):
        output = vary(pipe, strength=value)
        assert torch.equal(output.codes, expected.codes)
        assert torch.equal(output.images, expected.images)


def test_strength_zero_is_the_reconstruction_without_the_transformer(pipe, monkeypatch):
    seen = calls_of(pipe.transformer)
    embeds = pipe.get_class_embeds([0, 1])
    monkeypatch.setattr(pipe.transformer, "get_class_embeds", seen.append)
    with torch.no_grad():
        encoded = pipe.vqvae.encode(images() * 2 - 1)
        decoded = pipe.vqvae.decode(encoded.codes).sample / 2 + 0.5
    generator = seeded()
    output = vary(pipe, strength=0, generator=generator)
    assert torch.equal(output.codes, encoded.codes)
    assert torch.equal(output.images, decoded)
    pipe(images(), strength=0, class_embeds=embeds, guidance_scale=4.0)
    assert seen == []
    assert pipe.num_timesteps == 0
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize("smooth", [False, True])
def test_strength_one_is_plain_generation(pipe, smooth):
    plain = VARPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    expected = plain([0, 1], smooth=smooth, generator=seeded(), output_type="pt")
    for settings in ({"strength": 1}, {"strength": 1.0}, {"num_kept_scales": 0}):
        output = vary(pipe, smooth=smooth, **settings)
        assert torch.equal(output.codes, expected.codes)
        assert torch.equal(output.images, expected.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.5, "num_kept_scales": 2}, "Pass one of `strength` and `num_kept_scales`, got 0.5 and 2"),
        ({"strength": 1.1}, r"`strength` must be in \[0, 1\], got 1.1"),
        ({"strength": -0.1}, r"`strength` must be in \[0, 1\], got -0.1"),
        ({"strength": float("nan")}, r"`strength` must be in \[0, 1\], got nan"),
        ({"strength": "1"}, r"`strength` must be in \[0, 1\], got '1'"),
        ({"strength": True}, r"`strength` must be in \[0, 1\], got True"),
        ({"num_kept_scales": 5}, "`num_kept_scales` must be a number of scales from 0 to 4, got 5"),
        ({"num_kept_scales": -1}, "`num_kept_scales` must be a number of scales from 0 to 4, got -1"),
        ({"num_kept_scales": 2.0}, "`num_kept_scales` must be a number of scales from 0 to 4, got 2.0"),
        ({"labels": [0, 1, 2]}, "`image` and `class_labels` must be as many, or one for all, got 2 and 3"),
        ({"generator": [seeded()] * 3}, "`generator` must be one generator or 2, one per image, got 3"),
    ],
)
def test_bad_arguments(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        vary(pipe, **settings)


@pytest.mark.parametrize("patch_nums", [(4,), (1,), (4, 4), ((1, 2), (2, 5))])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_schedules(patch_nums, strength):
    pipe = VARImg2ImgPipeline.from_pipe(make_pipeline(patch_nums=patch_nums))
    pipe.set_progress_bar_config(disable=True)
    height, width = pipe.vqvae.config.image_size
    output = vary(pipe, image=torch.rand(2, 3, height, width, generator=seeded()), strength=strength)
    assert output.images.shape == (2, 3, height, width)
    assert output.codes.shape == (2, pipe.transformer.config.length)


@pytest.mark.parametrize("refiner_start", range(4))
@pytest.mark.parametrize("num_kept", range(4))
def test_a_refiner_takes_over_wherever_drawing_begins(pipe, num_kept, refiner_start):
    settings = {"num_kept_scales": num_kept, "top_k": 1, "refiner_start": refiner_start}
    expected = vary(pipe, num_kept_scales=num_kept, top_k=1)
    same = vary(pipe, refiner=pipe.transformer, **settings)
    assert torch.equal(same.codes, expected.codes)
    other = make_transformer(seed=8, patch_nums=PATCH_NUMS)
    seen = calls_of(other)
    output = vary(pipe, refiner=other, **settings)
    begin = max(num_kept, refiner_start)
    assert [length for _, length in seen] == [ENDS[begin + 1], *(number**2 for number in PATCH_NUMS[begin + 1 :])]
    assert torch.equal(output.codes[:, : ENDS[begin]], expected.codes[:, : ENDS[begin]])
    assert not torch.equal(output.codes, expected.codes)


@pytest.mark.parametrize("last_guided", range(4))
@pytest.mark.parametrize("num_kept", range(4))
def test_guidance_may_end_among_the_kept_scales(pipe, num_kept, last_guided):
    seen = calls_of(pipe.transformer)
    output = vary(
        pipe,
        num_kept_scales=num_kept,
        top_k=1,
        guidance_scale=lambda k, num_scales: 3.0 if k <= last_guided else 1.0,
    )
    assert [batch for batch, _ in seen] == [4 if k <= last_guided else 2 for k in range(num_kept, 4)]
    assert torch.equal(output.codes[:, : ENDS[num_kept]], pipe.encode_images(images())[:, : ENDS[num_kept]])
    if last_guided < num_kept:
        unguided = vary(pipe, num_kept_scales=num_kept, top_k=1, guidance_scale=1.0)
        assert torch.equal(output.codes, unguided.codes)


def test_steps_count_the_scales_that_are_drawn(pipe, capfd):
    calls = []

    def note(pipe, step, timestep, tensors):
        calls.append((step, timestep, tensors["latents"].clone()))
        assert pipe.num_timesteps == 2
        return tensors

    pipe.set_progress_bar_config()
    output = vary(pipe, num_kept_scales=2, callback_on_step_end=note)
    assert [call[:2] for call in calls] == [(0, 2), (1, 3)]
    running = pipe.vqvae.running_latents(output.codes)
    for _, k, latents in calls:
        torch.testing.assert_close(latents, running[k])
    assert "2/2" in capfd.readouterr().err


def test_an_interrupted_variation_has_the_kept_scales(pipe):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = True

    output = vary(pipe, num_kept_scales=2, callback_on_step_end=interrupt)
    assert torch.equal(output.codes, vary(pipe, num_kept_scales=2).codes[:, :14])


def test_images_of_few_pixels(pipe):
    """Super-resolution: what the enlarged image says at the first scales, and detail that is drawn."""
    small = torch.nn.functional.interpolate(images(), size=(4, 4), mode="area")
    output = vary(pipe, image=small, num_kept_scales=2)
    enlarged = torch.nn.functional.interpolate(small, size=(8, 8))
    assert torch.equal(output.codes[:, :5], pipe.encode_images(enlarged)[:, :5])
    assert output.images.shape == (2, 3, 8, 8)


def test_the_best_of_several_variations(pipe):
    def darkness(images, labels):
        return -images.mean(dim=(1, 2, 3))

    best = vary(pipe, num_candidates=6, score_fn=darkness, num_kept_scales=1)
    assert (darkness(best.images, None) >= darkness(vary(pipe, num_kept_scales=1).images, None)).all()
    assert torch.equal(best.codes[:, :1], pipe.encode_images(images())[:, :1])
