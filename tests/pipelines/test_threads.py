# SPDX-License-Identifier: Apache-2.0
"""One pipeline in several threads, or inside of its own callbacks: each call has its own settings."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from hf_var import VARImg2ImgPipeline
from pipelines.tiny import make_pipeline, seeded


NUM_THREADS = 8
SCALES = [1.0 + 2 * number for number in range(NUM_THREADS)]


def draw(pipe, number, **settings):
    return pipe(
        [number % 5, None], guidance_scale=SCALES[number], generator=seeded(number), output_type="pt", **settings
    )


def in_threads(function):
    """What `function` returns for each number, all of them begun at the same time."""
    barrier = Barrier(NUM_THREADS)

    def run(number):
        barrier.wait(timeout=60)
        return function(number)

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(run, range(NUM_THREADS)))


def test_guidance_of_each_thread_is_its_own(pipe):
    expected = [draw(pipe, number) for number in range(NUM_THREADS)]
    assert len({tuple(output.codes.flatten().tolist()) for output in expected}) == NUM_THREADS
    for _ in range(5):
        for output, alone in zip(in_threads(lambda number: draw(pipe, number)), expected, strict=True):
            assert torch.equal(output.codes, alone.codes)
            assert torch.equal(output.images, alone.images)


def test_callbacks_see_and_change_the_call_of_their_thread(pipe):
    at_work = Barrier(NUM_THREADS)

    def settings(number):
        seen = []

        def look(pipe, step, k, tensors):
            # All calls are at this scale at once.
            if step == 0:
                at_work.wait(timeout=60)
            seen.append((pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt))
            pipe._guidance_scale = SCALES[number] + step
            pipe._interrupt = number % 2 == 1 and step == 1

        codes = draw(pipe, number, callback_on_step_end=look).codes
        return seen, codes.shape[1]

    for number, (seen, length) in enumerate(in_threads(settings)):
        scale = SCALES[number]
        assert length == (5 if number % 2 else 21)
        assert seen == [(scale, 3, False), (scale, 3, False), (scale + 1, 3, False)][: 2 if number % 2 else 3]


def test_pipelines_that_share_their_models_have_calls_of_their_own(pipe):
    vary = VARImg2ImgPipeline.from_pipe(pipe)
    vary.set_progress_bar_config(disable=True)
    seen = []

    def draw_within(pipe, step, k, tensors):
        if step == 0:
            image = torch.rand(3, 8, 8, generator=seeded(3))
            vary(image, 1, num_kept_scales=2, guidance_scale=7.0)
            seen.append((vary.num_timesteps, vary.guidance_scale))
        seen.append((pipe.num_timesteps, pipe.guidance_scale))

    draw(pipe, 1, callback_on_step_end=draw_within)
    assert seen == [(1, 7.0), (3, 3.0), (3, 3.0), (3, 3.0)]


def test_another_thread_may_interrupt_the_only_call(pipe):
    def stop(pipe, step, k, tensors):
        if step == 0:
            with ThreadPoolExecutor(1) as other:
                other.submit(setattr, pipe, "_interrupt", True).result()

    assert draw(pipe, 0, callback_on_step_end=stop).codes.shape == (2, 1)
    assert draw(pipe, 0).codes.shape == (2, 21)


@pytest.mark.parametrize("name", ["guidance_scale", "num_timesteps", "interrupt"])
def test_what_callbacks_see_cannot_be_set_by_its_public_name(name):
    with pytest.raises(AttributeError):
        setattr(make_pipeline(), name, 2)
