# SPDX-License-Identifier: Apache-2.0
"""tokenize_dataset.py through its command line: before a training, in several processes, and killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image

from hf_var import VARPipeline
from hf_var.data import codes_fingerprint

from .conftest import NAMES, REPOSITORY, SHORT_RUN, TINY_VAR, load_script, losses, random_images, run_script


SCRIPT = "examples/tokenize_dataset.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

tokenize_dataset = load_script(SCRIPT)


def codes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("codes-*.parquet"))}


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 images, enough to stop in the middle of them, in two files."""
    folder = tmp_path_factory.mktemp("many")
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    images = random_images(200)
    for part in range(2):
        rows = {"image": images[part::2], "label": [index % 3 for index in range(100)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}.parquet")
    return str(folder / "*.parquet")


def test_codes_of_the_command_line_train_a_transformer(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {images_parquet}\nvqvae: {vqvae_folder}\nresize_ratio: 1\nbatch_size: 12\n")
    codes = tmp_path / "codes"
    # In batches as large as those of the training: rounding decides between codes as good as equal.
    run_script(SCRIPT, str(recipe), "--output_dir", str(codes), "--batch_size", "4", "--rows_per_shard", "8")
    assert len(codes_in(codes)) == 3
    arguments = ["--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN, "--resize_ratio", "1"]
    for name, source in (("folder", str(codes)), ("files", str(codes / "*.parquet")), ("images", images_parquet)):
        load_script("examples/train_var.py").main(
            [*arguments, "--train_data", source, "--output_dir", str(tmp_path / name)]
        )
    assert losses(tmp_path / "folder") == losses(tmp_path / "files") == losses(tmp_path / "images")
    assert VARPipeline.from_pretrained(tmp_path / "folder").transformer.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_write_the_files_of_one(
    tmp_path: Path, vqvae_folder: str, many_images: str, streaming: str
) -> None:
    arguments = ["--data", many_images, "--vqvae", vqvae_folder, "--streaming", streaming, "--num_crops", "2"]
    arguments += ["--rows_per_shard", "30", "--horizontal_flip"]
    tokenize_dataset.main([*arguments, "--output_dir", str(tmp_path / "one")])
    command = [sys.executable, *TORCHRUN, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("800 rows of codes from 200 images") == 1
    assert len(codes_in(tmp_path / "one")) == (2 if streaming == "true" else 7)
    assert codes_in(tmp_path / "two") == codes_in(tmp_path / "one")


def test_a_killed_run_goes_on_without_duplicates_and_holes(
    tmp_path: Path, vqvae_folder: str, many_images: str
) -> None:
    arguments = ["--data", many_images, "--vqvae", vqvae_folder, "--num_crops", "3", "--seed", "1"]
    arguments += ["--rows_per_shard", "5", "--batch_size", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tokenize_dataset.main([*arguments, "--output_dir", str(whole)])
    expected = codes_in(whole)
    assert len(expected) == 40

    command = [sys.executable, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(killed.glob("codes-*.parquet"))) < 4:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = codes_in(killed)
    assert 4 <= len(left) < 40
    assert left == {name: expected[name] for name in left}
    run_script(SCRIPT, *arguments, "--output_dir", str(killed))
    assert codes_in(killed) == expected
    assert not list(killed.glob(".unfinished-*"))


def test_half_precision_is_another_run(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    arguments = ["--data", images_parquet, "--vqvae", vqvae_folder, "--output_dir", str(tmp_path)]
    run_script(SCRIPT, *arguments, "--mixed_precision", "bf16")
    assert codes_fingerprint(str(tmp_path)) is not None
    with pytest.raises(ValueError, match="`mixed_precision` was 'bf16'.*, got 'no'"):
        tokenize_dataset.main(arguments)


def test_unknown_arguments_are_refused(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    arguments = ["--data", images_parquet, "--vqvae", vqvae_folder, "--output_dir", str(tmp_path / "codes")]
    with pytest.raises(ValueError, match="Unknown argument 'num_crop' in the command line.*num_crops"):
        tokenize_dataset.main([*arguments, "--num_crop", "2"])
    assert not (tmp_path / "codes").exists()
