# SPDX-License-Identifier: Apache-2.0
"""`layer_hooks` of the pipelines: nothing changes without cause, and each call and image is by itself."""

import pytest
import torch

from hf_var import (
    CacheBudget,
    LayerHook,
    TokenPruning,
    VARImg2ImgPipeline,
    VARInpaintPipeline,
    VARTextImg2ImgPipeline,
    VARTextInpaintPipeline,
)
from pipelines.test_threads import in_threads
from pipelines.texts import PROMPTS, make_text_pipeline
from pipelines.tiny import make_pipeline, make_transformer, seeded


HALVED = [TokenPruning([0.5, 0.5]), CacheBudget(3)]
WHOLE = [TokenPruning([1.0, 1.0]), CacheBudget(21)]
IMAGE = torch.rand(2, 3, 8, 8, generator=seeded(3))
MASK = torch.zeros(8, 8)
MASK[:, :4] = 1


def draw(pipe, labels=(0, 1), **options):
    return pipe(list(labels), **{"generator": seeded(), "output_type": "pt", **options})


def assert_same(found, expected):
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": lambda k, num_scales: 3.0 if k < 2 else 1.0},
        {"smooth": True},
        {"num_candidates": 2, "score_fn": lambda images, labels: images.mean(dim=(1, 2, 3))},
        {"callback_on_step_end": lambda pipe, step, timestep, tensors: {"latents": tensors["latents"] * 1.5}},
    ],
)
def test_full_budgets_change_no_bit(pipe, options):
    expected = draw(pipe, **options)
    assert_same(draw(pipe, layer_hooks=WHOLE, **options), expected)
    assert not torch.equal(draw(pipe, layer_hooks=HALVED, **options).images, expected.images)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_edits(pipe, number):
    vary, inpaint = VARImg2ImgPipeline.from_pipe(pipe), VARInpaintPipeline.from_pipe(pipe)
    calls = [
        lambda **options: vary(IMAGE, class_labels=[0, 1], num_kept_scales=1, **options),
        lambda **options: vary(IMAGE, class_labels=[0, 1], num_kept_scales=2, **options),
        lambda **options: inpaint(IMAGE, MASK, class_labels=[0, 1], **options),
    ]
    expected, whole, halved = (
        calls[number](generator=seeded(), output_type="pt", layer_hooks=hooks) for hooks in (None, WHOLE, HALVED)
    )
    assert_same(whole, expected)
    # Scales that are read at once are read whole, and what is kept of them is not needed any more.
    assert torch.equal(halved.codes, expected.codes) == (number == 1)


@pytest.mark.parametrize("options", [{}, {"guidance_end": 2}, {"smooth": True, "smooth_start": 1}])
def test_texts(options):
    text_pipe = make_text_pipeline()
    pruning, whole = [TokenPruning([0.5, 0.5])], [TokenPruning([1.0, 1.0])]
    calls = [
        lambda **more: text_pipe(PROMPTS, **options, **more),
        lambda **more: VARTextImg2ImgPipeline.from_pipe(text_pipe)(
            prompt=PROMPTS[:2], image=IMAGE, num_kept_scales=1, **options, **more
        ),
        lambda **more: VARTextInpaintPipeline.from_pipe(text_pipe)(
            prompt=PROMPTS[:2], image=IMAGE, mask_image=MASK, **options, **more
        ),
    ]
    for call in calls:
        expected, found, pruned = (
            call(generator=seeded(), output_type="pt", layer_hooks=hooks) for hooks in (None, whole, pruning)
        )
        assert_same(found, expected)
        assert not torch.equal(pruned.images, expected.images)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5, lambda k, num_scales: 3.0 if k < 2 else 1.0])
def test_an_image_does_not_depend_on_its_batch(pipe, guidance_scale):
    options = {"guidance_scale": guidance_scale, "layer_hooks": HALVED}
    together = draw(pipe, (0, 1, None), generator=[seeded(number) for number in range(3)], **options)
    for number, label in enumerate((0, 1, None)):
        alone = draw(pipe, [label], generator=[seeded(number)], **options)
        assert torch.equal(alone.codes[0], together.codes[number])


def test_one_hook_serves_several_threads(pipe):
    def call(number):
        return draw(pipe, [number % 5, None], generator=seeded(number), layer_hooks=HALVED)

    expected = [call(number) for number in range(8)]
    for found, alone in zip(in_threads(call), expected, strict=True):
        assert_same(found, alone)


class Counted(LayerHook):
    """Counts tokens by layer, and refuses models of another depth."""

    def __init__(self, num_layers=None):
        self.num_layers, self.seen = num_layers, []

    def check(self, config):
        if self.num_layers not in (None, config.num_hidden_layers):
            raise ValueError(f"`num_layers` is {config.num_hidden_layers}")

    def run_layer(self, run, hidden_states, call):
        self.seen.append((hidden_states.shape[1], call.layer_idx))
        return run(hidden_states)


def test_the_refiner_has_the_hooks_too(pipe):
    expected = draw(pipe, layer_hooks=HALVED)
    refiner = make_transformer()
    assert not torch.equal(draw(pipe, layer_hooks=HALVED, refiner=refiner, refiner_start=1).codes, draw(pipe).codes)
    assert torch.equal(draw(pipe, layer_hooks=WHOLE, refiner=refiner, refiner_start=2).codes, draw(pipe).codes)
    hook = Counted()
    small = make_transformer(num_hidden_layers=1)
    draw(pipe, layer_hooks=[hook], refiner=small, refiner_start=1)
    # The model reads the first scale, the refiner that one and the second together, and then the third.
    assert hook.seen == [(1, 0), (1, 1), (5, 0), (16, 0)]
    with pytest.raises(ValueError, match="`num_layers` is 1"):
        draw(pipe, layer_hooks=[Counted(2)], refiner=small, refiner_start=1)
    assert torch.equal(draw(pipe, layer_hooks=HALVED).codes, expected.codes)


def test_a_hook_that_does_not_fit_is_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.transformer), "forward", lambda *args, **kwargs: pytest.fail("the model was called"))
    for hooks, message in (
        ([TokenPruning([0.5] * 3)], "`shares` must be those of fewer than 3 scales"),
        ([CacheBudget([1, 2])], "`max_keys` must be one number or 3"),
        ([Counted(5)], "`num_layers` is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, layer_hooks=hooks)


@pytest.mark.parametrize("backend", [{"backend": "eager"}, {"freezing": True, "mode": "default"}])
def test_compiled_pipelines_run_hooks_uncompiled(backend, monkeypatch):
    pipe = make_pipeline()
    expected = draw(pipe, layer_hooks=HALVED)
    pipe.compile(**backend)
    hook = Counted()
    assert_same(draw(pipe, layer_hooks=[*HALVED, hook]), expected)
    assert [length for length, _ in hook.seen] == [1, 1, 2, 2, 8, 8]
