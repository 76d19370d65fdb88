# SPDX-License-Identifier: Apache-2.0
"""Callbacks after each scale: what they see, what they change, and what is left when they fail."""

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from pipelines.tiny import seeded


LABELS = [0, 1, None, 3]


def draw(pipe, **settings):
    return pipe(LABELS, generator=seeded(), output_type="latent", **settings)


class ScaleLatents(PipelineCallback):
    """Multiplies the latents after the first scale."""

    tensor_inputs = ["latents"]

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == 0:
            callback_kwargs["latents"] = callback_kwargs["latents"] * self.factor
        return callback_kwargs


def test_callback_sees_the_latents_of_every_scale(pipe):
    calls = []

    def note(pipe, step, timestep, tensors):
        assert tensors.keys() == {"latents"}
        assert pipe.num_timesteps == 3
        assert pipe.guidance_scale == 4.0
        assert not pipe.interrupt
        calls.append((step, int(timestep), tensors["latents"].clone()))
        return tensors

    output = draw(pipe, callback_on_step_end=note, guidance_scale=4.0)
    assert [call[:2] for call in calls] == [(0, 0), (1, 1), (2, 2)]
    running = pipe.vqvae.running_latents(output.codes)
    for (_, _, latents), expected in zip(calls, running, strict=True):
        torch.testing.assert_close(latents, expected)
    assert torch.equal(calls[-1][2], output.images)


@pytest.mark.parametrize("returned", [None, {}, {"latents": None}], ids=["nothing", "empty", "same"])
@pytest.mark.parametrize("smooth", [False, True])
def test_callback_that_changes_nothing(pipe, returned, smooth):
    def look(pipe, step, timestep, tensors):
        return tensors if returned and "latents" in returned else returned

    expected = draw(pipe, smooth=smooth)
    output = draw(pipe, smooth=smooth, callback_on_step_end=look)
    assert torch.equal(output.images, expected.images)
    assert torch.equal(output.codes, expected.codes)


@pytest.mark.parametrize("in_place", [False, True])
def test_changed_latents_are_what_the_next_scale_reads(pipe, in_place):
    """Other codes at the second scale are as if these had been drawn: the third scale must answer to them."""
    other_codes = torch.randint(0, 32, (4, 4), generator=seeded(7))
    seen = {}

    def replace(pipe, step, timestep, tensors):
        if step == 0:
            seen["first"] = tensors["latents"].clone()
        if step == 1:
            latents, seen["inputs"] = pipe.vqvae.next_scale(seen["first"], other_codes, 1)
            if not in_place:
                return {"latents": latents}
            tensors["latents"].copy_(latents)
        return None

    plain = draw(pipe, top_k=1, guidance_scale=1.0)
    changed = draw(pipe, top_k=1, guidance_scale=1.0, callback_on_step_end=replace)
    assert torch.equal(changed.codes[:, :5], plain.codes[:, :5])
    assert not torch.equal(changed.codes[:, 5:], plain.codes[:, 5:])

    with torch.no_grad():
        begin = pipe.vqvae.teacher_forcing(plain.codes)[:, :4]
        scale_inputs = torch.cat([begin, seen["inputs"]], dim=1)
        logits = pipe.transformer(torch.tensor(pipe.get_label_ids(LABELS)), scale_inputs).logits
    assert torch.equal(changed.codes[:, 5:], logits[:, 5:].argmax(-1))


@pytest.mark.parametrize("in_place", [False, True])
def test_zeroed_latents_after_the_last_scale_are_the_output(pipe, in_place):
    def zero(pipe, step, timestep, tensors):
        if step < pipe.num_timesteps - 1:
            return tensors
        return {"latents": tensors["latents"].zero_() if in_place else torch.zeros_like(tensors["latents"])}

    assert draw(pipe).images.abs().max() > 0.5
    output = draw(pipe, callback_on_step_end=zero)
    assert output.images.abs().max() == 0
    images = pipe(LABELS, callback_on_step_end=zero, output_type="pt").images
    assert torch.equal(images[0], images[1])  # zero latents have one picture


def test_callback_may_ask_for_no_tensors(pipe):
    seen = []
    draw(
        pipe,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}] * 3


def test_callback_classes_choose_their_tensors(pipe):
    plain = draw(pipe, top_k=1)
    once = draw(pipe, top_k=1, callback_on_step_end=ScaleLatents(-3.0))
    twice = draw(
        pipe, top_k=1, callback_on_step_end=MultiPipelineCallbacks([ScaleLatents(-3.0), ScaleLatents(-1 / 3)])
    )
    assert not torch.allclose(once.images, plain.images, atol=0.1)
    torch.testing.assert_close(twice.images, plain.images, rtol=0, atol=1e-4)
    # Whatever the argument says.
    again = draw(
        pipe, top_k=1, callback_on_step_end=ScaleLatents(-3.0), callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert torch.equal(again.images, once.images)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_interrupt_leaves_the_remaining_scales_out(pipe, last):
    steps = []

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == last

    expected = draw(pipe).codes
    output = draw(pipe, callback_on_step_end=interrupt)
    assert steps == list(range(last + 1))
    end = (1, 5, 21)[last]
    assert torch.equal(output.codes, expected[:, :end])
    # What there is so far is a picture already.
    with torch.no_grad():
        decoded = pipe.vqvae.decode(output.codes, num_scales=last + 1).sample
    images = pipe(LABELS, generator=seeded(), callback_on_step_end=interrupt, output_type="pt").images
    torch.testing.assert_close(images, decoded / 2 + 0.5)
    assert torch.equal(draw(pipe).codes, expected)  # the next call is not interrupted


@pytest.mark.parametrize("failing_step", [0, 1, 2])
def test_exception_leaves_the_pipeline_as_it_was(pipe, failing_step):
    class Stop(Exception):
        pass

    def fail(pipe, step, timestep, tensors):
        pipe._guidance_scale = 9.0
        tensors["latents"].zero_()
        if step == failing_step:
            raise Stop

    expected = draw(pipe)
    with pytest.raises(Stop):
        draw(pipe, callback_on_step_end=fail)
    output = draw(pipe)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)


def test_latents_of_another_dtype_are_taken(pipe):
    output = draw(
        pipe,
        top_k=1,
        callback_on_step_end=lambda pipe, step, timestep, tensors: {"latents": tensors["latents"].half()},
    )
    torch.testing.assert_close(output.images.float(), draw(pipe, top_k=1).images, rtol=0, atol=0.05)


def test_progress_reaches_the_end_with_a_callback(pipe, capfd):
    pipe.set_progress_bar_config()
    draw(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: None)
    assert "3/3" in capfd.readouterr().err
