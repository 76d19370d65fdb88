# SPDX-License-Identifier: Apache-2.0
"""Transformers that predict one token after the other."""

import pytest
import torch

from hf_var import VARImg2ImgPipeline, VARInpaintPipeline
from hf_var.scoring import log_likelihood
from pipelines.tiny import make_pipeline, make_transformer, seeded


SCHEDULES = {"one_scale": {"patch_nums": [4]}, "scales": {"patch_nums": [1, 2, 4]}}


@pytest.fixture(params=SCHEDULES)
def pipe(request):
    schedule = SCHEDULES[request.param]
    length = sum(side * side for side in schedule["patch_nums"])
    return make_pipeline(transformer={"block_sizes": [1] * length}, **schedule)


def likely(pipe, labels, codes):
    """The most likely codes after those before them, all in one pass."""
    inputs = pipe.vqvae.teacher_forcing(codes, is_raster=True)
    with torch.no_grad():
        return pipe.transformer(torch.tensor(labels), inputs).logits


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0, lambda k, num_scales: 2.0 if k == 0 else 1.0])
def test_the_most_likely_tokens_are_those_of_teacher_forcing(pipe, guidance_scale):
    codes = pipe([0, 3], top_k=1, guidance_scale=guidance_scale, output_type="latent").codes
    logits, unconditional = (likely(pipe, labels, codes) for labels in ([0, 3], [-1, -1]))
    lengths = pipe.vqvae.config.scale_lengths
    last = len(lengths) - 1
    ramp = [k / last if last > 0 else 1.0 for k in range(last + 1)]
    weights = [
        guidance_scale(k, last + 1) if callable(guidance_scale) else 1 + (guidance_scale - 1) * ramp[k]
        for k in range(last + 1)
    ]
    weight = torch.tensor(weights).repeat_interleave(torch.tensor(lengths))[:, None]
    guided = unconditional + weight * (logits - unconditional)
    assert torch.equal(guided.argmax(dim=-1), codes)


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = pipe([1, 2, None], generator=[seeded(seed) for seed in range(3)], output_type="pt")
    for label, seed in ((1, 0), (2, 1), (None, 2)):
        alone = pipe(label, generator=[seeded(seed)], output_type="pt")
        assert torch.equal(alone.codes[0], together.codes[seed])
        torch.testing.assert_close(alone.images[0], together.images[seed])
    assert len(together.codes.unique()) > 3


def test_codes_are_those_of_the_images(pipe):
    output = pipe([4], generator=seeded(), output_type="latent")
    assert torch.equal(output.images, pipe.vqvae.latents(output.codes))


def test_scores_are_of_the_same_order(pipe):
    codes = pipe([0, 3], generator=seeded(), output_type="latent").codes
    expected = likely(pipe, [0, 3], codes).log_softmax(dim=-1).gather(2, codes[..., None])[..., 0].sum(dim=1)
    scores = log_likelihood(pipe, codes=codes, class_labels=[0, 3])
    torch.testing.assert_close(scores.total.float(), expected, rtol=1e-5, atol=1e-4)


def test_what_needs_whole_scales_is_refused(pipe):
    refiner = make_transformer(
        seed=3, **{name: getattr(pipe.transformer.config, name) for name in ("patch_nums", "block_sizes")}
    )
    for options, name in (
        ({"smooth": True}, "smooth"),
        ({"refiner": refiner, "refiner_start": 0}, "refiner"),
        ({"callback_on_step_end": lambda *_: {}}, "callback_on_step_end"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` needs a transformer that predicts whole scales"):
            pipe(0, **options)
    image = torch.rand(1, 3, 8, 8, generator=seeded())
    with pytest.raises(ValueError, match="needs a transformer that predicts whole scales"):
        VARInpaintPipeline.from_pipe(pipe)(image, torch.ones(8, 8), class_labels=0)
    with pytest.raises(ValueError, match="needs a transformer that predicts whole scales"):
        VARImg2ImgPipeline.from_pipe(pipe)(image, class_labels=0, strength=0.5)
