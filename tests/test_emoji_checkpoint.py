# SPDX-License-Identifier: Apache-2.0
"""The emoji that ship with the package: small, licensed, and of the colours that are asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_var import EMOJI_CHECKPOINT, VARTextToImagePipeline


COLOURS = {"red": 0, "green": 120, "blue": 214}
SHAPES = ("heart", "book", "apple")


@pytest.fixture(scope="module")
def pipe() -> VARTextToImagePipeline:
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hue_of(image: Image.Image) -> float:
    """The mean hue of the saturated pixels, in degrees."""
    hue, saturation, _ = np.moveaxis(np.asarray(image.convert("HSV"), dtype=np.float64), -1, 0)
    angles = np.exp(2j * np.pi * hue / 256)[saturation > 80]
    return float(np.degrees(np.angle(angles.mean()))) % 360


def test_it_is_small_and_names_its_sources() -> None:
    files = [path for path in Path(EMOJI_CHECKPOINT).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    card = (Path(EMOJI_CHECKPOINT) / "README.md").read_text(encoding="utf-8")
    for words in ("license: cc-by-4.0", "Twemoji | copyright Twitter", "Noto Emoji | Google, Apache License 2.0"):
        assert words in card
    metadata = ModelCard(card).data
    assert (metadata.library_name, metadata.pipeline_tag) == ("hf_var", "text-to-image")
    assert {result.metric_type: result.metric_value for result in metadata.eval_results}["name_accuracy"] == 0.452
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}


def test_pictures_have_the_colours_of_their_texts(pipe: VARTextToImagePipeline) -> None:
    prompts = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS]
    output = pipe(prompts, num_images_per_prompt=4, generator=torch.Generator().manual_seed(0))
    asked = [degrees for _ in SHAPES for degrees in COLOURS.values() for _ in range(4)]
    found = [hue_of(image) for image in output.images]
    is_right = [abs((hue - degrees + 180) % 360 - 180) < 45 for hue, degrees in zip(found, asked, strict=True)]
    assert np.mean(is_right) >= 0.8
    assert output.images[0].size == (32, 32)


def test_other_texts_give_other_pictures_and_the_same_seed_the_same(pipe: VARTextToImagePipeline) -> None:
    def draw(prompt: str) -> torch.Tensor:
        return pipe(prompt, generator=torch.Generator().manual_seed(1)).codes

    assert torch.equal(draw("a red heart"), draw("a red heart"))
    assert not torch.equal(draw("a red heart"), draw("a ghost"))
