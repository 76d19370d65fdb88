# SPDX-License-Identifier: Apache-2.0
"""The command line with a pipeline whose tokenizer codes class maps: files of ids in, files of ids out."""

import numpy as np
import pytest
from PIL import Image

from hf_var.cli import main
from pipelines.tiny import make_pipeline, seeded


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(vqvae={"in_channels": 6, "sample_type": "class_map"})


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("maps") / "model")
    pipe.save_pretrained(folder)
    return ["--model", folder]


@pytest.fixture
def drawn(tmp_path, model):
    output = tmp_path / "drawn.png"
    assert main(["generate", *model, "--class-labels", "2", "1", "--seed", "3", "--output", str(output)]) == 0
    return str(output)


def test_files_hold_ids_that_can_be_read_again(tmp_path, pipe, model, drawn):
    expected = np.hstack([np.asarray(image) for image in pipe([2, 1], generator=seeded(3)).images])
    picture = Image.open(drawn)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), expected)
    output = tmp_path / "varied.png"
    arguments = ["--image", drawn, "--class-labels", "2", "--output", str(output), "--resize", "24"]
    assert main(["vary", *model, *arguments]) == 0
    varied = np.asarray(Image.open(output))
    # Enlarged without anything in between.
    assert np.array_equal(varied, varied[1::3, 1::3].repeat(3, axis=0).repeat(3, axis=1))
    assert varied.max() < 6


def test_reconstructions_and_scores(tmp_path, pipe, model, capsys):
    ids = np.random.default_rng(0).integers(0, 6, (16, 16), dtype=np.uint8)
    picture = Image.fromarray(ids)
    picture.putpalette([9, 99, 199] * 256)
    picture.save(tmp_path / "map.png")
    output = tmp_path / "both.png"
    assert main(["reconstruct", *model, "--images", str(tmp_path / "map.png"), "--output", str(output)]) == 0
    both = np.asarray(Image.open(output))
    codes = pipe.encode_images(ids)
    assert np.array_equal(both[:8], ids[1::2, 1::2])
    assert np.array_equal(both[8:], np.asarray(pipe.decode_progress(codes)[-1][0]))
    assert main(["score", *model, "--images", str(tmp_path / "map.png"), "--class-label", "2"]) == 0
    assert "bits per token" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "colours.png")
    assert main(["score", *model, "--images", str(tmp_path / "colours.png"), "--class-label", "2"]) == 2
    assert "class ids have no colours or transparency" in capsys.readouterr().err


def test_evaluation_measures_images_only(tmp_path, capsys):
    # As many channels as a colour image.
    make_pipeline(vqvae={"in_channels": 3, "sample_type": "class_map"}).save_pretrained(tmp_path / "model")
    Image.new("RGB", (8, 8)).save(tmp_path / "colours.png")
    arguments = ["--reference", str(tmp_path), "--num-images", "9", "--output-dir", str(tmp_path / "out")]
    for folder in ("model", "model/vqvae"):
        assert main(["evaluate", "--model", str(tmp_path / folder), *arguments]) == 2
        assert "images of 1 or 3 channels, got 3 of class maps" in capsys.readouterr().err
