# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance in the pipeline: what it computes, and when it is left out."""

import numpy
import pytest
import torch

from hf_var import VARPipeline
from pipelines.tiny import make_pipeline, seeded


class SeenBatches:
    """Notes the batch size of every call of a module."""

    def __init__(self, module: torch.nn.Module):
        self.sizes = []
        module.register_forward_hook(lambda module, args, output: self.sizes.append(output.logits.shape[0]))


@torch.no_grad()
def draw_greedily(pipe: VARPipeline, labels: list[int], weights: list[float]) -> torch.Tensor:
    """The most likely codes by the definition: both classes apart, no cache, everything anew at each scale."""
    latents, inputs, codes = None, [], []
    for k, (weight, length) in enumerate(zip(weights, pipe.transformer.config.scale_lengths, strict=True)):
        scale_inputs = torch.cat(inputs, dim=1) if inputs else None
        conditional, unconditional = (
            pipe.transformer(torch.tensor(ids), scale_inputs).logits[:, -length:]
            for ids in (labels, [-1] * len(labels))
        )
        codes.append((weight * conditional + (1 - weight) * unconditional).argmax(-1))
        latents, next_inputs = pipe.vqvae.next_scale(latents, codes[-1], k)
        inputs.append(next_inputs)
    return torch.cat(codes, dim=1)


@pytest.mark.parametrize(
    ("patch_nums", "ramp"),
    [((1, 2, 4), [0, 0.5, 1]), ((1, 2, 3, 4), [0, 1 / 3, 2 / 3, 1]), ((4, 4), [0, 1]), ((4,), [1])],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5, 7.0, 0.0])
def test_guidance_is_the_ramp_by_its_definition(patch_nums, ramp, guidance_scale):
    pipe = make_pipeline(patch_nums=patch_nums)
    labels = [0, 1, 2, 3]
    weights = [1 + (guidance_scale - 1) * depth for depth in ramp]
    codes = pipe(labels, guidance_scale=guidance_scale, top_k=1, output_type="latent").codes
    assert torch.equal(codes, draw_greedily(pipe, labels, weights))


def test_guidance_changes_the_codes_of_these_components(pipe):
    # Otherwise the other tests here would compare equal things.
    codes = [pipe([0, 1, 2, 3], guidance_scale=scale, top_k=1, output_type="latent").codes for scale in (1, 2.5, 7)]
    differing = [(one != other).float().mean().item() for one, other in zip(codes[:-1], codes[1:], strict=True)]
    assert min(differing) > 0.05


def test_guidance_doubles_the_batch_and_its_absence_does_not(pipe):
    batches = SeenBatches(pipe.transformer)
    pipe([0, 1, 2], guidance_scale=2.5)
    assert batches.sizes == [6, 6, 6]
    batches.sizes.clear()
    pipe([0, 1, 2], guidance_scale=1.0)
    pipe([0, 1, 2], guidance_scale=1)
    assert batches.sizes == [3, 3, 3] * 2


@pytest.mark.parametrize("labels", [None, [None, -1], [5, 5]])
def test_guidance_is_left_out_if_all_labels_are_unconditional(pipe, labels):
    batches = SeenBatches(pipe.transformer)
    guided = pipe(labels, guidance_scale=7.0, generator=seeded(), output_type="pt")
    plain = pipe(labels, guidance_scale=1.0, generator=seeded(), output_type="pt")
    assert set(batches.sizes) == {len(guided.codes)}
    assert torch.equal(guided.codes, plain.codes)
    assert torch.equal(guided.images, plain.images)


def test_unconditional_labels_among_others_are_not_guided(pipe):
    batches = SeenBatches(pipe.transformer)
    mixed = pipe([0, None, 1, -1], top_k=1, output_type="pt")
    assert batches.sizes == [8, 8, 8]
    alone = pipe(None, top_k=1, output_type="pt")
    named = pipe([0, 1], top_k=1, output_type="pt")
    for row, (expected, expected_row) in enumerate([(named, 0), (alone, 0), (named, 1), (alone, 0)]):
        assert torch.equal(mixed.codes[row], expected.codes[expected_row])
        torch.testing.assert_close(mixed.images[row], expected.images[expected_row], rtol=0, atol=1e-4)


def test_callback_switches_guidance_off(pipe):
    def stop(pipe, step, timestep, tensors):
        # The first scale's weight is 1 whatever the guidance scale.
        pipe._guidance_scale = 1.0

    labels = [0, 1, 2, 3]
    stopped = pipe(labels, guidance_scale=7.0, top_k=1, callback_on_step_end=stop, output_type="pt")
    assert pipe.guidance_scale == 1.0
    plain = pipe(labels, guidance_scale=1.0, top_k=1, output_type="pt")
    assert torch.equal(stopped.codes, plain.codes)
    torch.testing.assert_close(stopped.images, plain.images, rtol=0, atol=1e-4)
    # The next call is not affected.
    guided = pipe(labels, guidance_scale=7.0, top_k=1, output_type="pt")
    assert pipe.guidance_scale == 7.0
    assert not torch.equal(guided.codes, plain.codes)


def test_callback_raises_guidance_between_the_scales(pipe):
    def set_scale(pipe, step, timestep, tensors):
        pipe._guidance_scale = 9.0 if step == 1 else 3.0

    labels = [0, 1, 2, 3]
    codes = pipe(labels, guidance_scale=2.0, top_k=1, callback_on_step_end=set_scale, output_type="latent").codes
    assert torch.equal(codes, draw_greedily(pipe, labels, weights=[1, 2, 9]))


@pytest.mark.parametrize("guidance_scale", [3, numpy.float32(3.0), numpy.int64(3)], ids=repr)
def test_guidance_scale_may_be_any_number(pipe, guidance_scale):
    expected = pipe([0, 1], guidance_scale=3.0, generator=seeded(), output_type="pt")
    output = pipe([0, 1], guidance_scale=guidance_scale, generator=seeded(), output_type="pt")
    assert torch.equal(output.codes, expected.codes)
    assert output.images.dtype == torch.float32
