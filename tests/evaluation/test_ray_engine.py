# SPDX-License-Identifier: Apache-2.0
"""The engine "ray" of evaluations on a local cluster: images and metrics are those of one process, whatever happens to workers."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_var import DIGITS_CHECKPOINT
from hf_var.evaluation.protocol import EvaluationConfig
from hf_var.evaluation.run import evaluate
from local_ray import actor_processes, local_cluster, wait_for


VALUES = {"model": DIGITS_CHECKPOINT, "num_images": 40, "batch_size": 8, "seed": 3}
RAY = {"engine": "ray", "ray_actors": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_cluster():
        yield


@pytest.fixture(scope="module", autouse=True)
def extractors_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, random = tmp_path_factory.mktemp("reference"), np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return str(folder)


def run(folder: Path, reference: str, **values) -> dict:
    config = {**VALUES, "reference": reference, "feature_extractor": "extractor:RandomFeatures", **values}
    return evaluate(EvaluationConfig(output_dir=str(folder), **config), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def expected(reference: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("accelerate") / "evaluation"
    return folder, run(folder, reference)


def contents_of(folder: Path) -> dict[str, bytes]:
    names = ["images/*.png", "samples.npz", "features/*/*.safetensors"]
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def test_both_engines_leave_the_same_files_and_metrics(tmp_path: Path, cluster, reference: str, expected) -> None:
    report = run(tmp_path / "ray", reference, **RAY)
    assert contents_of(tmp_path / "ray") == contents_of(expected[0])
    assert len(contents_of(expected[0])) == 40 + 1 + 5 + 4
    assert report["metrics"] == expected[1]["metrics"]
    assert report["settings"] == expected[1]["settings"]
    assert report["images"] == expected[1]["images"]


def test_ray_finishes_what_the_other_engine_began(tmp_path: Path, cluster, reference: str) -> None:
    folder = tmp_path / "evaluation"
    run(folder, reference)
    before = contents_of(folder)
    # Nothing of a batch, the features alone, an image alone; an image that was changed stays so.
    samples = next(path for path in (folder / "features").iterdir() if path.name.startswith("samples"))
    for number in range(8, 16):
        (folder / "images" / f"{number:06d}.png").unlink()
    for index in (1, 2):
        (samples / f"{index:06d}-of-000005.safetensors").unlink()
    (folder / "images" / "000035.png").unlink()
    changed = folder / "images" / "000017.png"
    Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8)).save(changed)
    kept = changed.read_bytes()
    run(folder, reference, **RAY)
    assert changed.read_bytes() == kept
    changed.write_bytes(before["images/000017.png"])
    after = contents_of(folder)
    differing = {name for name in after if after[name] != before[name]}
    features = str(samples.relative_to(folder) / "000002-of-000005.safetensors")
    assert after.keys() == before.keys()
    assert differing == {features, "samples.npz"}


def test_a_killed_worker_costs_nothing(tmp_path: Path, cluster, reference: str) -> None:
    values = {"num_images": 600, "batch_size": 4}
    run(tmp_path / "accelerate", reference, **values)
    folder, reports = tmp_path / "ray", []
    thread = threading.Thread(target=lambda: reports.append(run(folder, reference, **values, **RAY)))
    thread.start()
    wait_for(lambda: list((folder / "images").glob("*.png")), thread.is_alive)
    workers = actor_processes("_Sampling")
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)
    assert len(list((folder / "images").glob("*.png"))) < 500
    thread.join()
    assert not workers[0].is_running()
    assert len(reports) == 1
    assert contents_of(folder) == contents_of(tmp_path / "accelerate")


def test_errors_of_an_extractor_are_said_as_they_are(tmp_path: Path, cluster, reference: str) -> None:
    with pytest.raises(ValueError, match=r"^These images are too dark\.$"):
        run(tmp_path, reference, feature_extractor="extractor:Refusing", **RAY)


def test_refused(tmp_path: Path, reference: str) -> None:
    for values, message in (
        ({"ray_actors": 2}, "`ray_actors` = 2 needs `engine` = 'ray', got 'accelerate'"),
        (
            {"model": None, "samples": reference, "num_images": None, "seed": 0, **RAY},
            "`engine` = 'ray' has no meaning",
        ),
        ({"model": f"{DIGITS_CHECKPOINT}/vqvae", "seed": 0, **RAY}, "`(engine|ray_actors)` = .* has no meaning here"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "evaluation", reference, **values)
    config = EvaluationConfig(output_dir=str(tmp_path / "evaluation"), **VALUES, **RAY)
    with pytest.raises(ValueError, match="`engine` = 'ray' must be started as one process.* Got 2 processes"):
        evaluate(config, SimpleNamespace(num_processes=2, is_main_process=True, device=torch.device("cpu")))
    assert not (tmp_path / "evaluation").exists()
