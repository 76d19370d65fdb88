# SPDX-License-Identifier: Apache-2.0
"""`hf-var` answers what a user gave wrongly with one line and the status 2, before anything is computed or written."""

import json
import os
import sys

import pytest
import torch
from PIL import Image

from hf_var import cli
from hf_var.cli import main


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with files that are no pictures, no label names and no models, where the command runs."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (16, 16), 128).save("ok.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "ok.png").read_bytes()[:45])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    for name, content in (
        ("number", "3"),
        ("numbers", "[1, 2]"),
        ("nothing", "[]"),
        ("cut", "["),
        ("keys", '{"a": "b"}'),
    ):
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    torch.save({"weight": torch.zeros(1)}, "weights.pth")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04K\x03.")
    for folder, index in (
        ("bare", None),
        ("garbage", "garbage"),
        ("list", "[]"),
        ("other", json.dumps({"_class_name": "OtherPipeline", "unet": ["diffusers", "UNet2DModel"]})),
    ):
        (tmp_path / folder).mkdir()
        if index is not None:
            (tmp_path / folder / "model_index.json").write_text(index)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


GENERATE = ["generate", "--output", "out.png"]
CONVERT = ["convert", "--var", "weights.pth", "--output", "out"]
CASES = [
    ([], "COMMAND"),
    (["nonsense"], "nonsense"),
    (["generate"], "--output"),
    ([*GENERATE, "--unknown"], "--unknown"),
    ([*GENERATE, "--dtype", "float8"], "--dtype"),
    ([*GENERATE, "--device", "nonsense"], "--device 'nonsense'"),
    ([*GENERATE, "--device", ""], "--device ''"),
    ([*GENERATE, "--device", "cpu:-5"], "--device 'cpu:-5'"),
    ([*GENERATE, "--device", "meta"], "--device 'meta'"),
    ([*GENERATE, "--seed", str(2**70)], "--seed"),
    ([*GENERATE, "--seed", "one"], "--seed"),
    ([*GENERATE, "--temperature", "nan"], "temperature"),
    ([*GENERATE, "--class-labels", ""], "class_labels"),
    ([*GENERATE, "--class-labels"], "--class-labels"),
    ([*GENERATE, "--model", ""], "hf-var generate:"),
    ([*GENERATE, "--model", "no/such"], "no/such"),
    ([*GENERATE, "--model", "bare"], "model_index.json"),
    ([*GENERATE, "--model", "garbage"], "hf-var generate:"),
    ([*GENERATE, "--model", "list"], "model_index.json"),
    ([*GENERATE, "--model", "other"], "hf-var generate:"),
    ([*GENERATE, "--model", "ok.png"], "ok.png"),
    (["generate", "--output", "out.xyz"], "--output"),
    (["generate", "--output", "out.psd"], "--output"),
    (["generate", "--output", "out"], "--output"),
    (["generate", "--output", ""], "--output"),
    (["generate", "--output", "bare"], "--output"),
    (["generate", "--output", "ok.png/out.png"], "--output"),
    (["generate", "--output", "/proc/no/out.png"], "/proc/no"),
    (["vary", "--image", "text.png", "--output", "out.png"], "text.png"),
    (["vary", "--image", "cut.png", "--output", "out.png"], "cut.png"),
    (["vary", "--image", "empty.png", "--output", "out.png"], "empty.png"),
    (["vary", "--image", "", "--output", "out.png"], "cannot be read as a picture"),
    (["vary", "--image", "bare", "--output", "out.png"], "bare"),
    (["inpaint", "--image", "ok.png", "--mask", "text.png", "--output", "out.png"], "text.png"),
    (["score", "--images", "ok.png", "none.png"], "none.png"),
    (["score", "--images", "ok.png", "--batch-size", "0"], "batch_size"),
    (["reconstruct", "--images", "cut.png", "--output", "out.png"], "cut.png"),
    ([*CONVERT, "--id2label", "number.json"], "--id2label 'number.json'"),
    ([*CONVERT, "--id2label", "numbers.json"], "--id2label 'numbers.json'"),
    ([*CONVERT, "--id2label", "nothing.json"], "--id2label 'nothing.json'"),
    ([*CONVERT, "--id2label", "cut.json"], "--id2label 'cut.json'"),
    ([*CONVERT, "--id2label", "keys.json"], "--id2label 'keys.json'"),
    ([*CONVERT, "--id2label", "latin.json"], "--id2label 'latin.json'"),
    ([*CONVERT, "--id2label", "deep.json"], "--id2label 'deep.json'"),
    ([*CONVERT, "--id2label", "none.json"], "none.json"),
    ([*CONVERT, "--id2label", "bare"], "bare"),
    (CONVERT, "checkpoint"),
    (["convert", "--var", "", "--output", "out"], "checkpoint"),
    (["convert", "--vqvae", "pickle.pth", "--output", "out"], "pickle.pth"),
    (["convert", "--var", "weights.pth", "--output", "ok.png"], "--output"),
    (["tokenize", "none.yaml"], "none.yaml"),
    (["tokenize", "--rows-per-shard", "many"], "rows_per_shard"),
    (["evaluate", "--output", "out"], "`model` and `samples`"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_one_line_and_status_2(files, capsys, arguments, message):
    before = sorted(files.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("hf-var ")
    assert message in lines[-1]
    assert "Traceback" not in captured.err
    assert sum(line.startswith(("hf-var ", "usage")) for line in lines) == 1
    assert captured.out == ""
    assert sorted(files.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(files, capsys):
    assert main([*GENERATE, "--device", "cuda"]) == 2
    assert "--device 'cuda' cannot be used on this machine" in capsys.readouterr().err


def test_bugs_show_where_they_are(files, monkeypatch):
    """Only what a user can cause is turned into a line."""

    def fail(options):
        raise KeyError("a bug")

    monkeypatch.setattr(cli.drawing, "_run", lambda *args: fail(args))
    with pytest.raises(KeyError):
        main(GENERATE)


def test_ctrl_c_is_quiet(files, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.drawing, "_run", interrupt)
    assert main(GENERATE) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet(files, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["score", "--images", "ok.png"]) == 141
        monkeypatch.undo()
    errors = capsys.readouterr().err
    assert "hf-var" not in errors
    assert "Traceback" not in errors
