# SPDX-License-Identifier: Apache-2.0
"""The guidance between scales that docs/sampling.md shows: the code is read from the page."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pipelines.tiny import make_pipeline, seeded


PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"
# Not square, and with two scales of one size.
PATCH_NUMS = (1, (1, 2), (2, 3), (2, 3), (4, 4))


@pytest.fixture(scope="module")
def example():
    """The class `ScaleGuidance` of the page."""
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"(from torch.nn import functional\n.*?)\nrows = ", text, re.DOTALL)
    namespace = {}
    exec(compile(code, PAGE.name, "exec"), namespace)
    return namespace["ScaleGuidance"]


@pytest.fixture
def pipe():
    return make_pipeline(patch_nums=PATCH_NUMS)


def draw(pipe, processor, **options):
    return pipe([0, 3], generator=seeded(), output_type="pt", logits_processor=processor, **options)


def test_strength_zero_changes_nothing(pipe, example):
    expected = draw(pipe, None)
    found = draw(pipe, example(pipe.transformer.config.scale_sizes, 0.0))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.images, expected.images)


def test_every_scale_but_the_first_moves_away_from_the_one_before(pipe, example):
    sizes = pipe.transformer.config.scale_sizes
    seen = []

    class Noted(example):
        def __call__(self, input_ids, scores, scale, previous_logits):
            processed = super().__call__(input_ids, scores, scale, previous_logits)
            seen.append((scores, processed, previous_logits))
            return processed

    draw(pipe, Noted(sizes, 0.7))
    assert len(seen) == 5
    assert torch.equal(seen[0][0], seen[0][1])
    for scale, (scores, processed, previous) in enumerate(seen[1:], start=1):
        (rows, columns), (height, width) = sizes[scale - 1], sizes[scale]
        # Image by image, code by code, place by place.
        for image in range(2):
            for code in (0, 17, 31):
                coarse = previous[image, :, code].view(1, 1, rows, columns)
                prior = functional.interpolate(coarse, size=(height, width), mode="bilinear").flatten()
                tokens = slice(image * height * width, (image + 1) * height * width)
                before, after = scores[tokens, code], processed[tokens, code]
                torch.testing.assert_close(after, before + 0.7 * (before - prior))
        assert not torch.allclose(scores, processed)


def test_what_the_scale_before_said_at_the_same_place_is_a_matter_of_temperature(example):
    # Where this scale says nothing of its own, the distribution stays; where it is twice as sure, it becomes surer.
    logits = torch.randn(1, 6, 32, generator=seeded())
    processor = example([(2, 3), (2, 3)], 0.5)
    same = processor(None, logits.flatten(0, 1), scale=1, previous_logits=logits)
    torch.testing.assert_close(same, logits.flatten(0, 1))
    # A constant on all codes of a token is no opinion.
    shifted = processor(None, logits.flatten(0, 1), scale=1, previous_logits=logits + torch.randn(1, 6, 1))
    torch.testing.assert_close(shifted.softmax(dim=-1), same.softmax(dim=-1))
    surer = processor(None, 2 * logits.flatten(0, 1), scale=1, previous_logits=logits)
    torch.testing.assert_close(surer, 2.5 * logits.flatten(0, 1))


def test_it_works_beside_classifier_free_guidance_and_filters(pipe, example):
    processor = example(pipe.transformer.config.scale_sizes, 0.5)
    found = draw(pipe, processor, guidance_scale=3.0, top_k=5)
    assert torch.equal(found.codes, draw(pipe, processor, guidance_scale=3.0, top_k=5).codes)
    plain = draw(pipe, None, guidance_scale=3.0, top_k=5)
    assert torch.equal(found.codes[:, :1], plain.codes[:, :1])
    assert not torch.equal(found.codes, plain.codes)
