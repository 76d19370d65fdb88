# SPDX-License-Identifier: Apache-2.0
"""Arguments of a wrong Python type are refused by name before a model runs; what a user's functions return is checked."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from hf_var import CacheBudget, VARImg2ImgPipeline, VARInpaintPipeline, VARPipeline
from hf_var.pipelines.image_grids import progress_strip, save_progress_gif
from hf_var.scoring import classify, log_likelihood
from pipelines.tiny import make_pipeline, seeded


NAN = float("nan")
CODES = torch.zeros(1, 21, dtype=torch.long)


@pytest.fixture
def resting(pipe):
    """A pipeline whose models must not run."""

    def refuse(*args):
        raise AssertionError("A model ran before the arguments were checked.")

    for model in (pipe.transformer, pipe.vqvae.encoder, pipe.vqvae.decoder):
        model.register_forward_pre_hook(refuse)
    return pipe


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smooth", "no"),
        ("smooth", 1),
        ("return_dict", "no"),
        ("return_dict", None),
        ("callback_on_step_end", "callback"),
        ("callback_on_step_end", [print]),
        ("callback_on_step_end_tensor_inputs", "latents"),
        ("callback_on_step_end_tensor_inputs", 3),
        ("callback_on_step_end_tensor_inputs", [3]),
        ("output_type", 3),
        ("output_type", np.array(["pil", "np"])),
        ("num_images_per_label", np.float64(1)),
        ("num_candidates", 2.0),
        ("score_fn", 3),
        ("logits_processor", [print]),
        ("logits_processor", LogitsProcessorList([3])),
        ("guidance_scale", "3"),
        pytest.param("guidance_scale", 10**400, id="guidance_scale-enormous"),
        ("class_embeds", torch.zeros(1, 32, dtype=torch.long)),
        ("class_embeds", torch.full((1, 32), NAN)),
        ("class_embeds", torch.zeros(0, 32)),
        ("class_embeds", [[0.0] * 32]),
        ("refiner", 3),
        ("layer_hooks", 3),
        ("layer_hooks", "pruning"),
        ("layer_hooks", [print]),
        ("layer_hooks", CacheBudget(3)),
        ("layer_hooks", [CacheBudget]),
    ],
)
def test_options_of_a_call(resting, name, value):
    extra = {"refiner_start": 1} if name == "refiner" else {}
    with pytest.raises(ValueError, match=rf"`{name}(\[0\])?` "):
        resting(None if name == "class_embeds" else [0, 1], **{name: value}, **extra)


PICTURE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("codes", lambda pipe: pipe.decode_progress([["a"]])),
        ("codes", lambda pipe: pipe.decode_progress([[1]])),
        ("codes", lambda pipe: pipe.decode_progress(CODES.bool())),
        ("codes", lambda pipe: pipe.decode_progress(CODES + 32)),
        ("codes", lambda pipe: pipe.decode_progress(None)),
        ("output_type", lambda pipe: pipe.decode_progress(CODES, output_type=3)),
        ("codes", lambda pipe: pipe.interpolate([[1]], CODES)),
        ("other_codes", lambda pipe: pipe.interpolate(CODES, "x")),
        ("other_codes", lambda pipe: pipe.interpolate(CODES, CODES[:0])),
        ("weights", lambda pipe: pipe.interpolate(CODES, CODES, weights=0.5)),
        ("weights", lambda pipe: pipe.interpolate(CODES, CODES, weights=[])),
        ("weights", lambda pipe: pipe.interpolate(CODES, CODES, weights="01")),
        ("num_scales", lambda pipe: pipe.mix_scales(CODES, CODES, num_scales=2.0)),
        ("num_scales", lambda pipe: pipe.mix_scales(CODES, CODES, num_scales=True)),
        ("codes", lambda pipe: pipe.mix_scales(CODES.float(), CODES, 1)),
        ("class_labels", lambda pipe: pipe.get_class_embeds("x")),
        ("image", lambda pipe: pipe.encode_images("x.png")),
        ("image", lambda pipe: pipe.encode_images(torch.full((3, 8, 8), NAN))),
        ("image", lambda pipe: pipe.encode_images(Image.new("RGB", (0, 4)))),
        ("image", lambda pipe: pipe.encode_images(np.zeros((8, 8, 3), dtype=object))),
        ("image", lambda pipe: pipe.encode_images(np.zeros((8, 8, 3), dtype=np.longdouble))),
        ("freezing", lambda pipe: pipe.compile(freezing="no")),
        ("pipeline", lambda pipe: VARPipeline.from_pipe(3)),
        ("strength", lambda pipe: VARImg2ImgPipeline.from_pipe(pipe)(PICTURE, strength="0.5")),
        ("mask_image", lambda pipe: VARInpaintPipeline.from_pipe(pipe)(PICTURE, torch.full((8, 8), NAN))),
        ("paste_original", lambda pipe: VARInpaintPipeline.from_pipe(pipe)(PICTURE, PICTURE, paste_original="no")),
        ("codes", lambda pipe: log_likelihood(pipe, codes="x")),
        ("codes", lambda pipe: classify(pipe, codes=[[1.0]])),
        ("prior", lambda pipe: classify(pipe, codes=CODES, prior="uniform")),
        ("prior", lambda pipe: classify(pipe, codes=CODES, prior=[1j] * 5)),
        ("progress", lambda pipe: progress_strip(3)),
        ("progress", lambda pipe: progress_strip([[3]])),
        ("path", lambda pipe: save_progress_gif([[PICTURE]], 3)),
    ],
)
def test_arguments_of_methods_and_functions(resting, name, call):
    with pytest.raises(ValueError, match=f"`{name}` "):
        call(resting)


def test_codes_may_be_lists_or_arrays(pipe):
    codes = torch.arange(21)[None]
    expected = pipe.mix_scales(codes, CODES, 1, output_type="pt")
    for kind in (codes.tolist(), codes.numpy().astype(np.uint8), codes.to(torch.int32)):
        assert torch.equal(pipe.mix_scales(kind, CODES, 1, output_type="pt"), expected)
    assert torch.equal(log_likelihood(pipe, codes=codes.tolist()).codes, codes)


@pytest.mark.parametrize("returned", [3, torch.zeros(1), {"latents": None}, {"latents": torch.zeros(1, 4, 1, 1)}])
def test_what_a_callback_returns(pipe, returned):
    with pytest.raises(ValueError, match="`callback_on_step_end` must return `None` or a dictionary"):
        pipe(0, callback_on_step_end=lambda *args: returned)


@pytest.mark.parametrize("returned", [None, "x", [1.0], [1j, 1j], [[1.0], [2.0]]])
def test_what_a_score_returns(pipe, returned):
    with pytest.raises(ValueError, match="`score_fn` must return 2 finite numbers"):
        pipe([0, 1], num_candidates=2, score_fn=lambda *args: returned)


def test_what_a_processor_returns(pipe):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return None

    with pytest.raises(
        ValueError, match=r"`logits_processor` must return scores of the shape \(2, 32\), got NoneType"
    ):
        pipe(0, logits_processor=Broken(), guidance_scale=1.0, num_images_per_label=2)


def test_numbers_of_numpy_count(pipe):
    expected = pipe([0, 0], generator=seeded(), output_type="pt").images
    drawn = pipe(0, num_images_per_label=np.int64(2), generator=seeded(), output_type="pt").images
    assert torch.equal(drawn, expected)
    assert torch.equal(
        classify(pipe, drawn, batch_size=np.int64(1)).posterior, classify(pipe, drawn, batch_size=1).posterior
    )
    assert make_pipeline().get_label_ids(np.int64(1)) == [1]
