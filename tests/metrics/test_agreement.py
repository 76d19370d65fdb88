# SPDX-License-Identifier: Apache-2.0
"""Agreement of pictures and texts, against the cosines of the model itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from hf_var.metrics.agreement import TextAgreement
from pipelines.texts import make_clip


# Words that the tokenizer of the fixtures knows.
WORDS = ("a", "red", "cat", "on", "the", "mat", "two", "birds", "dark")
TEXTS = [f"{first} {second}" for first in WORDS for second in WORDS]


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    return make_clip()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(TEXTS), 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def cosines(clip, pictures: list[Image.Image], texts: list[str]) -> torch.Tensor:
    model, processor = clip
    rows = []
    for picture in pictures:
        inputs = processor(images=picture, text=texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        rows.append(output.logits_per_image[0] / model.logit_scale.exp())
    return torch.stack(rows).detach()


def test_it_is_that_of_single_pictures_and_texts(clip, pictures) -> None:
    expected = cosines(clip, pictures, TEXTS)
    # Each picture gets the text that is nearest, but for the first ten.
    nearest = [TEXTS[index] for index in expected.argmax(dim=1)]
    assert len(set(nearest)) > 2
    texts = ["dark dark dark"] * 10 + nearest[10:]
    found = TextAgreement(*clip)(pictures, texts)
    # Only the texts of the pictures compete, and the nearest of all is among them.
    different = list(dict.fromkeys(texts))
    own = torch.tensor([different.index(text) for text in texts])
    expected = cosines(clip, pictures, different)
    accuracy = (expected.argmax(dim=1) == own).float().mean().item()
    assert 0.7 < accuracy < 1
    assert found["retrieval_accuracy"] == pytest.approx(accuracy)
    score = 100 * expected[torch.arange(len(own)), own].clamp(min=0).mean().item()
    assert found["clip_score"] == pytest.approx(score, rel=1e-4)


def test_folders_are_loaded_as_a_whole(clip, pictures, tmp_path: Path) -> None:
    model, processor = clip
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    expected = TextAgreement(model, processor)(pictures, TEXTS)
    assert TextAgreement(str(tmp_path / "clip"))(pictures, TEXTS) == pytest.approx(expected)
    model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="lacks weights of a CLIPModel, such as"):
        TextAgreement(str(tmp_path / "text"))


def test_what_cannot_be_compared_is_refused(clip, pictures) -> None:
    agreement = TextAgreement(*clip)
    with pytest.raises(ValueError, match="`texts` must be as many as `images`, 81, got 1"):
        agreement(pictures, ["a cat"])
    with pytest.raises(ValueError, match="`texts` must have two different ones at least, got .'a cat'."):
        agreement(pictures[:2], ["a cat", "a cat"])
    with pytest.raises(ValueError, match="`processor` must be passed with a model"):
        TextAgreement(clip[0])
