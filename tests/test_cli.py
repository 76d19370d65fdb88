# SPDX-License-Identifier: Apache-2.0
"""The command `hf-var`, run as a user runs it."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from hf_var import VARPipeline, VQVAEModel
from hf_var.cli import main
from hf_var.conversion import export_official_var, export_official_vqvae, load_official_var, load_official_vqvae
from parity import load_case


@pytest.fixture(scope="module")
def official_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    case = load_case("A")
    torch.save(case.vqvae_weights, folder / "vae.pth")
    torch.save(case.var_weights, folder / "var.pth")
    return folder


@pytest.fixture(scope="module")
def converted(official_files):
    output = official_files / "converted"
    files = ["--vqvae", str(official_files / "vae.pth"), "--var", str(official_files / "var.pth")]
    assert main(["convert", *files, "--output", str(output)]) == 0
    return output


def test_convert_writes_a_pipeline_equal_to_the_files(converted):
    case = load_case("A")
    pipe = VARPipeline.from_pretrained(converted)
    for exported, official in (
        (export_official_var(pipe.transformer), case.var_weights),
        (export_official_vqvae(pipe.vqvae), case.vqvae_weights),
    ):
        assert exported.keys() == official.keys()
        assert all(torch.equal(exported[name], official[name]) for name in official)


def test_convert_one_file_writes_a_model(official_files, tmp_path):
    arguments = ["--vqvae", str(official_files / "vae.pth"), "--patch-nums", "1", "2", "3", "4"]
    assert main(["convert", *arguments, "--output", str(tmp_path / "vqvae")]) == 0
    model = VQVAEModel.from_pretrained(tmp_path / "vqvae")
    assert model.config.patch_nums == [1, 2, 3, 4]


def test_convert_takes_label_names(official_files, tmp_path):
    names = [f"animal {index}" for index in range(10)]
    (tmp_path / "names.json").write_text(json.dumps(names))
    files = ["--vqvae", str(official_files / "vae.pth"), "--var", str(official_files / "var.pth")]
    assert (
        main(["convert", *files, "--id2label", str(tmp_path / "names.json"), "--output", str(tmp_path / "out")]) == 0
    )
    pipe = VARPipeline.from_pretrained(tmp_path / "out")
    assert pipe.get_label_ids("animal 7") == [7]


def test_convert_without_a_file(tmp_path, capsys):
    assert main(["convert", "--output", str(tmp_path)]) == 2
    assert "--vqvae" in capsys.readouterr().err


def test_convert_swapped_files(official_files, tmp_path, capsys):
    files = ["--vqvae", str(official_files / "var.pth"), "--var", str(official_files / "vae.pth")]
    assert main(["convert", *files, "--output", str(tmp_path / "out")]) == 2
    assert "missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generate_writes_what_the_pipeline_draws(converted, tmp_path):
    output = tmp_path / "new folder" / "out.png"
    assert main(["generate", "--model", str(converted), "--class-labels", "3", "none", "--output", str(output)]) == 0
    pipe = VARPipeline.from_pretrained(converted)
    expected = pipe([3, None], generator=torch.Generator().manual_seed(0)).images
    picture = Image.open(output)
    assert picture.size == (128, 64)
    assert picture.crop((0, 0, 64, 64)).tobytes() == expected[0].tobytes()
    assert picture.crop((64, 0, 128, 64)).tobytes() == expected[1].tobytes()


def test_generate_grid_and_seed(converted, tmp_path):
    common = ["generate", "--model", str(converted), "--class-labels", "1", "LABEL_2", "3", "--columns", "2"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = [*common, "--resize", "32", "--seed", seed, "--output", str(tmp_path / f"{name}.png")]
        assert main(arguments) == 0
    pictures = {name: Image.open(tmp_path / f"{name}.png") for name in "abc"}
    assert pictures["a"].size == (64, 64)
    assert pictures["a"].tobytes() == pictures["b"].tobytes()
    assert pictures["a"].tobytes() != pictures["c"].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-labels", "99"], "99"),
        (["--class-labels", "LABEL_77"], "LABEL_7"),
        (["--top-p", "1.5"], "top_p"),
        (["--output", "out.xyz"], "out.xyz"),
        (["--columns", "0"], "--columns"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_generate_bad_input(converted, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", str(converted), "--output", "out.png", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_the_embedded_checkpoint_is_the_default(tmp_path):
    output = tmp_path / "digits.png"
    command = [
        sys.executable,
        "-m",
        "hf_var.cli",
        "generate",
        "--class-labels",
        "3",
        "1",
        "4",
        "--output",
        str(output),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert Image.open(output).size == (48, 16)


def test_help_reads_well(capsys):
    for command in ("generate", "convert"):
        with pytest.raises(SystemExit) as exit_status:
            main([command, "--help"])
        assert exit_status.value.code == 0
        assert "example: hf-var" in capsys.readouterr().out


def test_official_loaders_accept_paths(official_files):
    assert load_official_var(official_files / "var.pth").config.num_hidden_layers == 2
    assert load_official_vqvae(str(official_files / "vae.pth"), patch_nums=[1, 2, 3, 4]).config.codebook_size == 64
