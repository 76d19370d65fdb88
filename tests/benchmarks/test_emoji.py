# SPDX-License-Identifier: Apache-2.0
"""The measurements of emoji: their parts on pictures whose figures are known, and a run from the data to the grids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

from examples.conftest import load_script
from pipelines.texts import make_text_pipeline


COLOURS = {"red": (220, 20, 10), "green": (10, 200, 10), "blue": (10, 95, 230), "yellow": (255, 215, 0)}
WORDS = ("a", "red", "cat", "on", "the", "mat", "two", "birds", "dark")
NAMES = [f"{first} {second}" for first in WORDS[:5] for second in WORDS[5:]]


@pytest.fixture(scope="module")
def emoji(monkeypatch_module: pytest.MonkeyPatch):
    return load_script("benchmarks/emoji.py")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        benchmarks = Path(__file__).parents[2] / "benchmarks"
        patch.syspath_prepend(str(benchmarks))
        patch.syspath_prepend(str(benchmarks.parent / "examples"))
        yield patch


def disc(colour: tuple[int, int, int], place: int = 32) -> Image.Image:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((place - 20, 12, place + 20, 52), fill=colour)
    return image


def test_the_main_colour_is_that_of_what_is_not_white(emoji) -> None:
    for name, colour in COLOURS.items():
        assert emoji.main_colour(emoji.on_white(disc(colour))) == name
    assert emoji.main_colour(Image.new("RGB", (32, 32), "white")) is None
    assert emoji.main_colour(emoji.on_white(disc((120, 120, 120)))) is None


def test_names_are_those_of_the_nearest_pictures(emoji) -> None:
    real = torch.eye(3)
    features = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [0.1, 0.9, 0.0]])
    assert emoji.shares_of_names(features, ["a", "c", "a"], real, ["a", "b", "c"]) == pytest.approx(2 / 3)
    cosines, where = emoji.nearest(features, real)
    assert where.tolist() == [0, 2, 1]
    assert cosines.tolist() == pytest.approx([0.9, 0.8, 0.9])


def test_a_pipeline_is_measured_from_the_data_on(emoji, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"caption": Value("string"), "name": Value("string"), "is_plain": Value("bool")}
    colours = list(COLOURS.values())
    for part, names in (("train", NAMES[:16]), ("test", NAMES[16:])):
        rows = [
            {"image": disc(colours[number % 4], 20 + number), "caption": name, "name": name, "is_plain": is_plain}
            for number, name in enumerate(names)
            for is_plain in (True, False)
        ]
        features = Features({"image": ImageFeature(), **kinds})
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{part}.parquet")
    data, judge = ["--data", str(tmp_path)], str(tmp_path / "judge.safetensors")
    emoji.main(["judge", *data, "--output", judge, "--epochs", "1"])
    make_text_pipeline().save_pretrained(tmp_path / "pipeline")
    measured = ["measure", str(tmp_path / "pipeline"), *data, "--judge", judge, "--output", str(tmp_path / "grids")]
    emoji.main([*measured, "--number", "20"])
    lines = capsys.readouterr().out.splitlines()
    figures = {line.rsplit(": ", 1)[0]: float(line.rsplit(": ", 1)[1].split(",")[0].split()[0]) for line in lines}
    assert {name.split(",")[0] for name in figures} == {
        "training pictures as they are",
        "named",
        "copies",
        "frechet",
        "coloured",
    }
    assert np.isfinite(list(figures.values())).all()
    for name in ("training", "held_out", "new"):
        with Image.open(tmp_path / "grids" / f"{name}.png") as grid:
            assert grid.width == emoji.COLUMNS * (emoji.SCALE * emoji.SIZE + 8)
