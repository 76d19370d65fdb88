# SPDX-License-Identifier: Apache-2.0
"""Tiny data, and the scripts as modules."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


REPOSITORY = Path(__file__).parents[2]
NAMES = ["cat", "dog", "newt"]
# Of the pixels of class maps.
NUM_CLASSES = 5

TINY_VQVAE = [
    "--in_channels",
    "1",
    "--base_channels",
    "8",
    "--channel_multipliers",
    "1",
    "2",
    "--num_res_blocks",
    "1",
    "--norm_num_groups",
    "4",
    "--latent_channels",
    "4",
    "--codebook_size",
    "16",
    "--patch_nums",
    "1",
    "2",
    "4",
]
TINY_VAR = ["--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
SHORT_RUN = ["--max_train_steps", "2", "--train_batch_size", "4", "--logging_steps", "1", "--lr_warmup_steps", "0"]
SHORT_RUN += ["--report_to", "none"]


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_log(output_dir: Path | str) -> list[dict]:
    """The lines of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output_dir) / "train_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines]


def losses(output_dir: Path | str) -> list[float]:
    return [line["loss"] for line in read_log(output_dir) if "loss" in line]


def script_environment(**variables: str) -> dict[str, str]:
    """The environment in which scripts find what the tests bring along."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths} | variables


def run_script(script: str, *arguments: str) -> None:
    command = [sys.executable, str(REPOSITORY / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=script_environment())
    assert result.returncode == 0, result.stderr


def start(script: str, arguments: list[str], output_dir: Path) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / script), *arguments, "--output_dir", str(output_dir)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=script_environment())


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "The run ended too early."
        assert time.monotonic() < end
        time.sleep(0.0005)


def last_step(output_dir: Path) -> int:
    log = output_dir / "train_log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def random_images(number: int, mode: str = "L") -> list[PILImage.Image]:
    shape = (number, 8, 8) if mode == "L" else (number, 8, 8, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return [PILImage.fromarray(image) for image in pixels]


def class_maps(number: int = 24) -> np.ndarray:
    """Maps of 8x8 ids, in two areas side by side."""
    generator = np.random.default_rng(0)
    maps = generator.integers(0, NUM_CLASSES, (number, 1, 2)).repeat(8, axis=1).repeat(4, axis=2)
    return maps.astype(np.uint8)


def palette_picture(ids: np.ndarray) -> PILImage.Image:
    """Ids as indices of a palette, whose colours are no ids."""
    picture = PILImage.fromarray(ids)
    picture.putpalette([7, 77, 177] * 256)
    return picture


@pytest.fixture(scope="session")
def maps_parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 class maps as pictures with a palette."""
    path = tmp_path_factory.mktemp("maps") / "train.parquet"
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    rows = {"image": [palette_picture(ids) for ids in class_maps()], "label": [index % 3 for index in range(24)]}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="session")
def images_parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 gray images of 8x8 pixels with three classes."""
    path = tmp_path_factory.mktemp("parquet") / "train.parquet"
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    rows = {"image": random_images(24), "label": [index % 3 for index in range(24)]}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 colour images in three class folders."""
    folder = tmp_path_factory.mktemp("folder")
    for index, image in enumerate(random_images(12, "RGB")):
        class_folder = folder / NAMES[index % 3]
        class_folder.mkdir(exist_ok=True)
        image.save(class_folder / f"{index}.png")
    return str(folder)


@pytest.fixture(scope="session")
def vqvae_folder(tmp_path_factory: pytest.TempPathFactory, images_parquet: str) -> str:
    """A tokenizer that train_vqvae.py made."""
    output_dir = str(tmp_path_factory.mktemp("vqvae"))
    run = ["--train_data", images_parquet, "--output_dir", output_dir]
    load_script("examples/train_vqvae.py").main([*run, *TINY_VQVAE, *SHORT_RUN, "--kmeans_images", "24"])
    return output_dir
