# SPDX-License-Identifier: Apache-2.0
"""What a run refuses to resume, what it applies, and what happens to its folder."""

import logging
import os
import pickle
import resource
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import (
    SHORT_RUN,
    TINY_VAR,
    TINY_VQVAE,
    last_step,
    load_script,
    losses,
    read_log,
    start,
    wait_for,
)


train_vqvae = load_script("examples/train_vqvae.py")
train_var = load_script("examples/train_var.py")
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def vqvae_run(tmp_path_factory: pytest.TempPathFactory, images_parquet: str) -> tuple[list[str], Path]:
    """Arguments of a run, and its folder after two of four steps."""
    folder = tmp_path_factory.mktemp("vqvae_run")
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SHORT_RUN, "--checkpointing_steps", "2"]
    arguments += ["--kmeans_images", "24", "--codebook_update", "ema", "--max_train_steps", "4"]
    train_vqvae.main([*arguments, "--output_dir", str(folder)])
    shutil.rmtree(folder / "checkpoints/step-00000004")
    return arguments, folder


@pytest.fixture(scope="module")
def var_run(tmp_path_factory: pytest.TempPathFactory, images_folder: str, colour_vqvae: str) -> tuple[list[str], Path]:
    """The same of a transformer."""
    folder = tmp_path_factory.mktemp("var_run")
    arguments = [
        "--vqvae",
        colour_vqvae,
        *TINY_VAR,
        *SHORT_RUN,
        "--checkpointing_steps",
        "2",
        "--max_train_steps",
        "4",
    ]
    train_var.main([*arguments, "--train_data", images_folder, "--output_dir", str(folder)])
    shutil.rmtree(folder / "checkpoints/step-00000004")
    return arguments, folder


@pytest.fixture(scope="module")
def colour_vqvae(tmp_path_factory: pytest.TempPathFactory, images_folder: str) -> str:
    folder = str(tmp_path_factory.mktemp("colour"))
    arguments = ["--train_data", images_folder, "--output_dir", folder, *TINY_VQVAE, *SHORT_RUN]
    train_vqvae.main([*arguments, "--in_channels", "3", "--kmeans_images", "12"])
    return folder


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--base_channels", "16"],
            "`base_channels` must be 8 as when the checkpoint .*step-00000002' was made, got 16",
        ),
        (["--ema_decay", "0"], "`ema_decay > 0` must be True .*, got False"),
        (["--codebook_update", "gradient"], "`codebook_update` must be 'ema' .*, got 'gradient'"),
        (["--seed", "1"], "`seed` must be 0 .*, got 1"),
        (["--adversarial_weight", "1", "--discriminator_layers", "1"], "`discriminator_layers` must be 3 .*, got 1"),
    ],
    ids=lambda entry: entry[0] if isinstance(entry, list) else "",
)
def test_what_decides_a_run_cannot_change(
    options: list[str], message: str, tmp_path: Path, vqvae_run: tuple[list[str], Path]
) -> None:
    arguments, folder = vqvae_run
    folder = copied(folder, tmp_path / "run")
    before = (folder / "train_log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        train_vqvae.main([*arguments, *RESUME, "--output_dir", str(folder), *options])
    assert (folder / "train_log.jsonl").read_bytes() == before


def test_other_tokenizer_and_other_labels_are_refused(
    tmp_path: Path, var_run: tuple[list[str], Path], colour_vqvae: str, images_folder: str
) -> None:
    arguments, folder = var_run
    folder = copied(folder, tmp_path / "run")
    arguments = [*arguments, *RESUME, "--output_dir", str(folder)]
    # Other classes, of the same number.
    images = copied(Path(images_folder), tmp_path / "images")
    (images / "dog").rename(images / "yak")
    with pytest.raises(ValueError, match=r"`labels\.1` must be 'dog' .*, got 'newt'"):
        train_var.main([*arguments, "--train_data", str(images)])
    # The tokenizer that lies in the same folder was trained again.
    vqvae = copied(Path(colour_vqvae), tmp_path / "vqvae")
    retrain = [
        "--pretrained_vqvae",
        colour_vqvae,
        "--train_data",
        images_folder,
        *SHORT_RUN,
        "--output_dir",
        str(vqvae),
    ]
    train_vqvae.main(retrain)
    with pytest.raises(ValueError, match=r"`vqvae \(its fingerprint\)` must be"):
        train_var.main([*arguments, "--train_data", images_folder, "--vqvae", str(vqvae)])
    train_var.main([*arguments, "--train_data", images_folder])
    assert len(losses(folder)) == 4


def test_a_changed_learning_rate_is_applied_and_logged(
    tmp_path: Path, vqvae_run: tuple[list[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    arguments, folder = vqvae_run
    arguments = [*arguments, *RESUME, "--lr_scheduler", "constant"]
    folder = copied(folder, tmp_path / "run")
    logging.getLogger("hf_var").propagate = True
    # Twice, as after a kill.
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            train_vqvae.main(
                [*arguments, "--output_dir", str(folder), "--learning_rate", "0.5", "--max_train_steps", "3"]
            )
    assert "`learning_rate` 0.5, was 0.0003" in caplog.text
    (changes,) = [line["changed_arguments"] for line in read_log(folder) if "changed_arguments" in line]
    assert changes["max_train_steps"] == [4, 3]
    assert read_log(folder)[-1].get("learning_rate", 0.5) == 0.5
    assert [line["learning_rate"] for line in read_log(folder) if line["step"] == 3 and "loss" in line] == [0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random_state_0.safetensors", "random_state_0.safetensors' is (missing|truncated or damaged)"),
        (
            "tensors/shard-00001-model-00001-of-00001.safetensors",
            "A file of .*tensors' is (missing|truncated or damaged)",
        ),
        ("states.json", "step-00000002' is damaged: states.json cannot be read"),
        ("run.json", "step-00000002' is damaged: run.json cannot be read"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_refused(
    name: str, message: str, damage: str, tmp_path: Path, vqvae_run: tuple[list[str], Path]
) -> None:
    arguments, folder = vqvae_run
    folder = copied(folder, tmp_path / "run")
    path = folder / "checkpoints/step-00000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=message):
        train_vqvae.main([*arguments, *RESUME, "--output_dir", str(folder)])


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_no_code(tmp_path: Path, vqvae_run: tuple[list[str], Path]) -> None:
    arguments, folder = vqvae_run
    folder = copied(folder, tmp_path / "run")
    checkpoint, executed = folder / "checkpoints/step-00000002", tmp_path / "executed"
    payload = pickle.dumps(Payload(executed))
    for name in (
        "custom_checkpoint_0.pkl",
        "random_states_0.pkl",
        "optimizer.bin",
        "scheduler.bin",
        "pytorch_model.bin",
    ):
        (checkpoint / name).write_bytes(payload)
    train_vqvae.main([*arguments, *RESUME, "--output_dir", str(folder)])
    # Nor in place of a file that is read.
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        shutil.rmtree(folder / "checkpoints/step-00000004", ignore_errors=True)
        whole = path.read_bytes()
        path.write_bytes(payload)
        if path.suffix == ".safetensors" or path.name in ("run.json", "states.json"):
            with pytest.raises(ValueError, match="damaged"):
                train_vqvae.main([*arguments, *RESUME, "--output_dir", str(folder)])
        path.write_bytes(whole)
    assert not executed.exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SHORT_RUN, "--max_train_steps", "3000"]
    # Its workers live a little longer than a process that is killed.
    arguments += ["--checkpointing_steps", "5", *RESUME, "--dataloader_num_workers", "1"]
    first = start("examples/train_vqvae.py", arguments, tmp_path)
    wait_for(lambda: last_step(tmp_path) >= 6, first)
    with pytest.raises(ValueError, match=f"`output_dir` = .* is in use by another run: .*{first.pid}"):
        train_vqvae.main([*arguments, "--output_dir", str(tmp_path)])
    assert first.poll() is None
    first.kill()
    assert first.wait() == -signal.SIGKILL
    # The lock ends with its holder.
    step = last_step(tmp_path)
    train_vqvae.main([*arguments, "--output_dir", str(tmp_path), "--max_train_steps", str(step + 2)])
    steps = [line["step"] for line in read_log(tmp_path) if "loss" in line]
    assert steps == list(range(1, step + 3))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk: no file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_explained_and_costs_nothing(tmp_path: Path, vqvae_run: tuple[list[str], Path]) -> None:
    arguments, folder = vqvae_run
    arguments = [*arguments, *RESUME, "--checkpointing_steps", "1"]
    folder, expected = (copied(folder, tmp_path / name) for name in ("run", "expected"))
    train_vqvae.main([*arguments, "--output_dir", str(expected)])
    with (
        largest_file(100_000),
        pytest.raises(OSError, match=r"^[^\n]*cannot be written.*step-00000002 are complete[^\n]*$"),
    ):
        train_vqvae.main([*arguments, "--output_dir", str(folder)])
    train_vqvae.main([*arguments, "--output_dir", str(folder)])
    assert read_log(folder) == read_log(expected)
    weights = [load_file(path / "model.safetensors") for path in (folder, expected)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SHORT_RUN, "--checkpointing_steps", "1"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file.* cannot be written: .*No checkpoint was written before"):
        train_vqvae.main([*arguments, "--output_dir", str(tmp_path / "file" / "run")])
    # As if somebody had put something else there meanwhile.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("")
    with pytest.raises(OSError, match="run/checkpoints.* cannot be written"):
        train_vqvae.main([*arguments, "--output_dir", str(tmp_path / "run")])


def test_weights_have_the_mode_of_other_files(
    tmp_path: Path, var_run: tuple[list[str], Path], images_folder: str
) -> None:
    arguments, _ = var_run
    before = os.umask(0o027)
    try:
        train_var.main([*arguments, "--train_data", images_folder, "--output_dir", str(tmp_path / "run")])
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
