# SPDX-License-Identifier: Apache-2.0
"""Pipelines whose tokenizer codes class maps: ids go in, ids or probabilities come out."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import VARImg2ImgPipeline, VARInpaintPipeline
from hf_var.pipelines.images import image_pixels
from hf_var.scoring import log_likelihood
from pipelines.tiny import make_pipeline, make_vqvae, seeded


NUM_CLASSES = 6
FIELDS = {"in_channels": NUM_CLASSES, "sample_type": "class_map"}


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(vqvae=FIELDS)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, NUM_CLASSES, (2, 8, 8))


def palette_picture(ids):
    picture = Image.fromarray(ids.astype(np.uint8)).convert("P")
    picture.putdata(ids.flatten().tolist())
    picture.putpalette([9, 90, 200] * 256)
    return picture


def test_every_form_of_ids_gives_the_same_codes(pipe, ids):
    expected = pipe.vqvae.encode(torch.from_numpy(ids)).codes
    gray = [Image.fromarray(single.astype(np.uint8)) for single in ids]
    forms = [ids, torch.from_numpy(ids), ids.astype(np.uint8), gray, [palette_picture(single) for single in ids]]
    forms += [list(ids), [torch.from_numpy(single)[None] for single in ids]]
    for form in forms:
        assert torch.equal(pipe.encode_images(form), expected)
    assert torch.equal(pipe.encode_images(ids[1]), expected[1:])


def test_ids_are_resized_by_nearest_neighbours(ids):
    config = make_vqvae(**FIELDS).config
    large = ids.repeat(3, axis=1).repeat(2, axis=2)
    assert np.array_equal(image_pixels(large, config).numpy(), ids)
    small = image_pixels(ids[:, ::2, ::2], config)
    assert np.array_equal(small.numpy(), ids[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2))
    assert image_pixels(Image.fromarray(large[0].astype(np.uint8)), config).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8), NUM_CLASSES), "`image`: .*class ids must be from 0 to 5, got 6"),
        (np.zeros((8, 8)), "`image`: .*class ids must be integers, got float64"),
        (Image.new("RGB", (8, 8)), "`image`: .*no colours or transparency, got a picture of the mode RGB"),
        (np.zeros((2, 8, 8, 1), dtype=int), r"`image`: .*shape \(height, width\), got \(2, 8, 8, 1\)"),
        ("map.png", "`image` must be class ids as a picture, an array, a tensor or a list of these, got str"),
        ([], "`image` must be at least one class map, got none"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_class_map(pipe, image, message):
    with pytest.raises(ValueError, match=message):
        pipe.encode_images(image)


@torch.no_grad()
def test_samples_are_ids_or_probabilities(pipe):
    arguments = {"class_labels": [0, 1], "guidance_scale": 1.0}
    outputs = {kind: pipe(**arguments, generator=seeded(), output_type=kind) for kind in ("pil", "np", "pt")}
    logits = pipe.vqvae.decode(outputs["pt"].codes).sample
    assert torch.equal(outputs["pt"].images, logits.sigmoid())
    assert outputs["np"].images.shape == (2, 8, 8, NUM_CLASSES)
    np.testing.assert_array_equal(outputs["np"].images, logits.sigmoid().movedim(1, -1).numpy())
    for picture, single in zip(outputs["pil"].images, logits, strict=True):
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), single.argmax(dim=0).numpy())
    # What comes out can go in again.
    assert pipe.encode_images(outputs["pil"].images).shape == (2, 21)
    progress = pipe.decode_progress(outputs["pt"].codes)
    assert np.array_equal(np.asarray(progress[-1][0]), np.asarray(outputs["pil"].images[0]))


def test_ids_above_255_have_16_bits():
    pipe = make_pipeline(vqvae={**FIELDS, "in_channels": 300})
    with torch.no_grad():
        pipe.vqvae.decoder.conv_out.bias[299] = 100
    (picture,) = pipe(0, generator=seeded()).images
    assert picture.mode == "I;16"
    assert (np.asarray(picture) == 299).all()


def test_edits_and_scores_read_ids(pipe, ids):
    vary = VARImg2ImgPipeline.from_pipe(pipe)
    vary.set_progress_bar_config(disable=True)
    output = vary(ids[:1], class_labels=0, num_kept_scales=2, generator=seeded())
    assert torch.equal(output.codes[:, :5], pipe.encode_images(ids[:1])[:, :5])
    assert output.images[0].mode == "L"
    inpaint = VARInpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    mask = torch.ones(8, 8)
    assert inpaint(ids[:1], mask, class_labels=0, generator=seeded()).images[0].mode == "L"
    with pytest.raises(ValueError, match="`paste_original` needs images, but the tokenizer codes class maps"):
        inpaint(ids[:1], mask, class_labels=0, paste_original=True)
    scores = log_likelihood(pipe, images=ids, class_labels=[0, 1])
    by_codes = log_likelihood(pipe, codes=pipe.encode_images(ids), class_labels=[0, 1])
    assert torch.equal(scores.total, by_codes.total)
