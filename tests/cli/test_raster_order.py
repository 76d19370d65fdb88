# SPDX-License-Identifier: Apache-2.0
"""The commands with a pipeline of raster-order priors."""

import re

import numpy as np
import pytest
from PIL import Image

from hf_var import DIGITS_CHECKPOINT
from hf_var.cli import main
from pipelines.stacked import image_pipeline, text_pipeline
from pipelines.tiny import seeded
from pipelines.tiny_ar import make_pipeline


@pytest.fixture
def pipe(tmp_path):
    pipe = make_pipeline(levels=2)
    pipe.save_pretrained(tmp_path / "model")
    return pipe


@pytest.fixture
def model(tmp_path, pipe):
    return ["--model", str(tmp_path / "model")]


@pytest.fixture
def drawn(tmp_path, model):
    output = tmp_path / "drawn.png"
    assert main(["generate", *model, "--class-labels", "2", "--output", str(output)]) == 0
    return str(output)


def test_generate_writes_what_the_pipeline_samples(tmp_path, pipe, model):
    output = tmp_path / "out.png"
    arguments = ["--class-labels", "LABEL_1", "2", "--guidance-scale", "2", "--seed", "7", "--output", str(output)]
    assert main(["generate", *model, *arguments]) == 0
    expected = pipe(["LABEL_1", 2], guidance_scale=2.0, generator=seeded(7)).images
    assert np.array_equal(
        np.asarray(Image.open(output).convert("L")), np.hstack([np.asarray(image) for image in expected])
    )


def test_a_gif_shows_every_level(tmp_path, model):
    output = tmp_path / "out.gif"
    assert main(["generate", *model, "--class-labels", "1", "--output", str(output)]) == 0
    assert Image.open(output).n_frames == 2


def test_score_prints_bits_or_classes(drawn, model, capsys):
    assert main(["score", *model, "--images", drawn, "--class-label", "2"]) == 0
    assert re.search(r": [\d.]+ bits per token; by scale: [\d.]+ [\d.]+$", capsys.readouterr().out.strip())
    assert main(["score", *model, "--images", drawn, "--classify", "3"]) == 0
    assert len(re.findall(r"LABEL_\d [01]\.\d+", capsys.readouterr().out)) == 3


def test_reconstruct_shows_what_the_tokenizer_keeps(tmp_path, drawn, pipe, model):
    output = tmp_path / "both.png"
    assert main(["reconstruct", *model, "--images", drawn, "--output", str(output)]) == 0
    both = np.asarray(Image.open(output).convert("L"))
    codes = pipe.encode_images(Image.open(drawn))
    assert np.array_equal(both[8:], np.asarray(pipe.decode_progress(codes)[-1][0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--smooth"], "--smooth is not an option of a ARPipeline"),
        (["generate", "--top-k", "13"], "top_k"),
        (["inpaint", "--image", "DRAWN", "--mask", "DRAWN"], "VARInpaintPipeline"),
        (["vary", "--image", "DRAWN"], "VARImg2ImgPipeline"),
    ],
)
def test_what_only_a_transformer_can(tmp_path, drawn, model, capsys, arguments, message):
    command, *rest = [drawn if word == "DRAWN" else word for word in arguments]
    assert main([command, *model, "--class-labels", "1", *rest, "--output", str(tmp_path / "out.png")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line


# --- prompts and other images ----------------------------------------------------------------------------------------


def pixels_of(images):
    return np.hstack([np.asarray(image) for image in images])


def test_generate_from_prompts(tmp_path):
    pipe = text_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    output = tmp_path / "out.png"
    arguments = ["--model", str(tmp_path / "model"), "--prompt", "a three", "a thin three", "--guidance-scale", "2"]
    assert main(["generate", *arguments, "--seed", "7", "--output", str(output)]) == 0
    expected = pipe(prompt=["a three", "a thin three"], guidance_scale=2.0, generator=seeded(7)).images
    assert np.array_equal(np.asarray(Image.open(output).convert("L")), pixels_of(expected))


def test_generate_from_pictures(tmp_path):
    pipe = image_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    Image.new("RGB", (10, 6), "red").save(tmp_path / "red.png")
    output = tmp_path / "out.png"
    arguments = ["--model", str(tmp_path / "model"), "--condition-image", str(tmp_path / "red.png")]
    arguments += ["--height", "6", "--width", "10", "--output", str(output)]
    assert main(["generate", *arguments]) == 0
    condition = Image.open(tmp_path / "red.png")
    expected = pipe(condition_image=condition, height=6, width=10, generator=seeded()).images
    assert np.array_equal(np.asarray(Image.open(output).convert("L")), pixels_of(expected))


def test_a_model_without_prompts(tmp_path, model, capsys):
    output = ["--output", str(tmp_path / "out.png")]
    assert main(["generate", *model, "--prompt", "a three", *output]) == 2
    assert "`prompt` has the unknown name 'a three'" in capsys.readouterr().err
    assert main(["generate", "--model", DIGITS_CHECKPOINT, "--prompt", "a three", *output]) == 2
    assert "`prompt` has the unknown name 'a three'" in capsys.readouterr().err
