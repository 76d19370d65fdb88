# SPDX-License-Identifier: Apache-2.0
"""Images of a running call: previews of its scales, and at last the call's own."""

import threading

import numpy as np
import pytest
import torch

from hf_var import VARImg2ImgPipeline
from hf_var.pipelines.previews import preview_steps
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline, seeded


@pytest.mark.parametrize(("make", "inputs"), [(make_pipeline, [[0, 3]]), (make_text_pipeline, [["a", "b c"]])])
@pytest.mark.parametrize("output_type", ["pt", "np", "pil", "latent"])
def test_previews_are_the_progress_of_the_call(make, inputs, output_type):
    pipe = make()
    settings = {"output_type": output_type, "guidance_scale": 3.0}
    expected = pipe(*inputs, generator=seeded(), **settings)
    *previews, images = pipe.stream(*inputs, generator=seeded(), **settings)
    as_arrays = [np.stack([np.asarray(image) for image in batch]) for batch in (images, expected.images)]
    assert np.array_equal(*as_arrays)
    assert len(previews) == len(pipe.vqvae.config.patch_nums) - 1
    if output_type != "latent":
        progress = pipe.decode_progress(expected.codes, output_type=output_type)
        for preview, coarse in zip(previews, progress, strict=False):
            for image, other in zip(preview, coarse, strict=True):
                np.testing.assert_allclose(np.asarray(image), np.asarray(other), atol=1e-5)


@pytest.mark.parametrize(("partial_images", "number"), [(0, 0), (1, 1), (2, 2), (3, 2), (None, 2)])
def test_the_number_of_previews(pipe, partial_images, number):
    options = {"prompt": "goldfish", "output_type": "pt", "return_dict": False}
    *previews, images = pipe.stream(generator=seeded(), partial_images=partial_images, **options)
    assert len(previews) == number
    assert torch.equal(images, pipe(1, generator=seeded(), output_type="pt").images)


def test_previews_are_at_equal_distances():
    assert preview_steps(10, 3) == {2, 5, 8}
    assert preview_steps(10, 1) == {5}
    assert preview_steps(0, None) == preview_steps(1, 3) == set()
    for steps in range(1, 17):
        for number in range(20):
            chosen = preview_steps(steps, number)
            assert len(chosen) == min(number, steps - 1)
            assert all(0 < step < steps for step in chosen)


def test_edits_and_candidates_have_previews(pipe):
    vary = VARImg2ImgPipeline.from_pipe(pipe)
    image = torch.rand(1, 3, 8, 8, generator=seeded())
    settings = {"class_labels": 1, "num_kept_scales": 1, "output_type": "pt"}
    settings |= {"num_candidates": 3, "score_fn": lambda images, labels: images.mean((1, 2, 3))}
    *previews, images = vary.stream(image, generator=seeded(), **settings)
    assert len(previews) == 1
    assert torch.equal(images, vary(image, generator=seeded(), **settings).images)
    assert len(list(vary.stream(image, num_kept_scales=3))) == 1


def test_a_loop_that_is_left_ends_the_call(pipe):
    steps, goes_on, next_scale = [], threading.Event(), pipe.vqvae.next_scale

    def slow_scale(latents, codes, k):
        steps.append(k)
        assert k == 0 or goes_on.wait(60)
        return next_scale(latents, codes, k)

    pipe.vqvae.next_scale = slow_scale
    stream = pipe.stream(1)
    next(stream)
    threading.Timer(1, goes_on.set).start()
    stream.close()
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 99}, "`class_labels` must be in"),
        ({"partial_images": -1}, "`partial_images` must be"),
        ({"partial_images": 1.5}, "`partial_images` must be"),
        ({"callback_on_step_end": print}, "`callback_on_step_end` must not be passed to `stream`"),
        (
            {"callback_on_step_end_tensor_inputs": ["images"]},
            "`callback_on_step_end_tensor_inputs` must not be passed",
        ),
    ],
    ids=repr,
)
def test_errors_reach_the_loop(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        next(pipe.stream(**options))
    assert len(pipe(0).images) == 1
