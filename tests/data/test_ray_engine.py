# SPDX-License-Identifier: Apache-2.0
"""The engine "ray" of tokenizations on a local cluster: the files are those of the other engine, whatever happens to workers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from datasets import Dataset

from hf_var.data.tokenization import TokenizationConfig, tokenize_dataset
from local_ray import PATHS, actor_processes, local_cluster, wait_for
from pipelines.texts import make_text_encoder, make_tokenizer

from .samples import broken_bytes
from .tokenizing import contents_of, make_vqvae, noise_contents, rows_of, tokenize, write_named


SETTINGS = ".tokenization.json"


@pytest.fixture(scope="module")
def cluster():
    with local_cluster():
        yield


@pytest.fixture(scope="module")
def vqvae_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("vqvae"))
    make_vqvae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("encoder"))
    for part in (make_text_encoder(1), make_tokenizer(1)):
        part.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------------------
# The same files


@pytest.mark.parametrize("streaming", [False, True])
def test_both_engines_leave_the_same_folder(tmp_path: Path, cluster, vqvae_folder: str, streaming: bool) -> None:
    source = str(tmp_path / "*.parquet")
    for shard in range(4):
        contents = [*broken_bytes()[:shard], *noise_contents(200)[45 * shard : 45 * shard + 45]]
        write_named(tmp_path / f"{shard}.parquet", contents)
    # Several tasks for a unit, whose last part is smaller.
    values = {"rows_per_shard": 75, "batch_size": 8, "num_crops": 2, "horizontal_flip": True}
    values |= {"streaming": streaming, "max_broken_share": 0.1}
    # The card has the name of the folder.
    folders = [tmp_path / engine / "codes" for engine in ("accelerate", "ray")]
    counts = [
        tokenize(source, vqvae_folder, folder, **values, **engine)
        for folder, engine in zip(folders, ({}, {"engine": "ray", "ray_actors": 2}), strict=True)
    ]
    assert counts[0] == counts[1]
    assert (counts[1].rows, counts[1].broken_images) == (4 * 180, 6)
    assert len(contents_of(folders[1])) == (4 if streaming else 3)
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert rows_of(folders[0])[:] == rows_of(folders[1])[:]
    assert rows_of(folders[0]).features == rows_of(folders[1]).features


def test_captions_are_embedded_beside_the_codes(
    tmp_path: Path, cluster, vqvae_folder: str, encoder_folder: str
) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(12))
    captions = [f"a bird and {number} birds" for number in range(12)]
    rows = Dataset.from_parquet(source).remove_columns("label").add_column("caption", captions)
    rows.to_parquet(tmp_path / "captions.parquet")
    values = {"caption_column": "caption", "text_encoder": encoder_folder, "rows_per_shard": 5, "batch_size": 2}
    for engine in ("accelerate", "ray"):
        tokenize(str(tmp_path / "captions.parquet"), vqvae_folder, tmp_path / engine, engine=engine, **values)
    found = contents_of(tmp_path / "ray")
    assert len(found) == 3
    assert found == contents_of(tmp_path / "accelerate")
    assert rows_of(tmp_path / "ray").column_names == ["codes", "caption_embeds"]


# --------------------------------------------------------------------------------------------------------------------
# Interruptions


def test_a_killed_worker_costs_nothing(tmp_path: Path, cluster, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(1500), batch_size=100)
    values = {"rows_per_shard": 50, "batch_size": 8, "num_crops": 4}
    tokenize(source, vqvae_folder, tmp_path / "accelerate", **values)
    folder = tmp_path / "ray"
    counts = []
    run = threading.Thread(
        target=lambda: counts.append(
            tokenize(source, vqvae_folder, folder, engine="ray", ray_actors=2, **values),
        )
    )
    run.start()
    wait_for(lambda: list(folder.glob("codes-*")), run.is_alive)
    encoding = actor_processes("_Encoding")
    assert encoding
    os.kill(encoding[0].pid, signal.SIGKILL)
    unwritten = 30 - len(list(folder.glob("codes-*")))
    assert unwritten > 5
    run.join()
    assert not encoding[0].is_running()
    assert [count.rows for count in counts] == [6000]
    assert contents_of(folder) == contents_of(tmp_path / "accelerate")


def test_ray_finishes_what_the_other_engine_began(tmp_path: Path, cluster, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(40))
    values = {"rows_per_shard": 10, "batch_size": 4, "num_crops": 2}
    folder = tmp_path / "codes"
    count = tokenize(source, vqvae_folder, folder, **values)
    expected = contents_of(folder)
    gone = [sorted(expected)[number] for number in (1, 3)]
    for name in gone:
        (folder / name).unlink()
        (folder / f".unfinished-{name}").write_bytes(b"half a file")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("codes-*")}
    assert tokenize(source, vqvae_folder, folder, engine="ray", ray_actors=2, **values) == count
    assert contents_of(folder) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted(path.name for path in folder.iterdir()) == [SETTINGS, "README.md", *sorted(expected)]
    # With nothing to do no worker is started.
    before = time.monotonic()
    assert tokenize(source, vqvae_folder, folder, engine="ray", **values) == count
    assert time.monotonic() - before < 3


def test_the_other_engine_finishes_an_interrupted_run_of_ray(tmp_path: Path, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(1500), batch_size=100)
    values = {"rows_per_shard": 50, "batch_size": 8, "num_crops": 4}
    folder = tmp_path / "ray"
    named = {"data": source, "vqvae": vqvae_folder, "output_dir": str(folder), "engine": "ray", **values}
    words = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "hf_var.cli", "tokenize", *words]
    variables = {"PYTHONPATH": PATHS, "RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    # The command, on a cluster of its own, which ends with it.
    run = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    workers: list[psutil.Process] = []
    try:
        wait_for(lambda: list(folder.glob("codes-*")), lambda: run.poll() is None)
        workers = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, errors.decode()
    _, left = psutil.wait_procs(workers, timeout=30)
    assert not left
    begun = {path: path.stat().st_mtime_ns for path in folder.glob("codes-*")}
    assert 0 < len(begun) < 30

    assert tokenize(source, vqvae_folder, folder, **values).rows == 6000
    tokenize(source, vqvae_folder, tmp_path / "accelerate", **values)
    assert contents_of(folder) == contents_of(tmp_path / "accelerate")
    assert {path: path.stat().st_mtime_ns for path in begun} == begun


# --------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_label_that_is_none_is_named(tmp_path: Path, cluster, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "named.parquet", noise_contents(30))
    rows = Dataset.from_parquet(source).remove_columns("label").add_column("label", [0] * 20 + [7] + [1] * 9)
    rows.to_parquet(tmp_path / "images.parquet")
    # The labels of a stream are checked when they are read.
    values = {"num_labels": 3, "streaming": True, "batch_size": 4, "engine": "ray"}
    with pytest.raises(ValueError, match=r"^`label_column` = 'label' must hold labels from 0 to 2, got 7\.$"):
        tokenize(str(tmp_path / "images.parquet"), vqvae_folder, tmp_path / "codes", **values)
    assert not list((tmp_path / "codes").glob("codes-*"))


def test_ray_is_started_in_one_process(tmp_path: Path, vqvae_folder: str) -> None:
    config = TokenizationConfig(data="", vqvae=vqvae_folder, output_dir=str(tmp_path / "codes"), engine="ray")
    with pytest.raises(ValueError, match="`engine` = 'ray' must be started as one process.* Got 2 processes"):
        tokenize_dataset(config, SimpleNamespace(num_processes=2))
    assert not (tmp_path / "codes").exists()
