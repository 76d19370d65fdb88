# SPDX-License-Identifier: Apache-2.0
"""Images and their features: files take precedence, failures end the run, and nothing is done twice."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_var.evaluation.features import FeatureFiles, measure_here, write_features
from hf_var.evaluation.image_files import png_path, read_or_sample, read_png, write_png


SIZE = (4, 6)


class Means(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


class Failing(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory left")


class Numbers:
    """Samples images whose pixels are all their number plus an offset."""

    def __init__(self, offset: int = 0):
        self.offset = offset
        self.sampled: list[int] = []

    def __call__(self, numbers: range) -> torch.Tensor:
        self.sampled += numbers
        values = torch.tensor(list(numbers)) + self.offset
        return values.byte()[:, None, None, None].expand(-1, 3, *SIZE).clone()


def run(folder: Path, sampler: Numbers, batch_size: int = 4, extractor: nn.Module | None = None) -> FeatureFiles:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    files = FeatureFiles(folder / "features", "samples", 23, batch_size, {})
    read = partial(read_or_sample, images, SIZE, sampler)
    engine = partial(measure_here, read, extractor or Means(), torch.device("cpu"))
    write_features(files, engine, Accelerator(cpu=True), images)
    return files


def features(files: FeatureFiles) -> torch.Tensor:
    return files.load()["features"]


def test_every_image_has_its_features_and_its_file(tmp_path: Path) -> None:
    files = run(tmp_path, Numbers())
    assert torch.equal(features(files), torch.arange(23.0)[:, None].expand(-1, 3))
    assert [len(files.range(index)) for index in range(len(files))] == [4, 4, 4, 4, 4, 3]
    for number in range(23):
        assert (read_png(png_path(tmp_path / "images", number), SIZE) == number).all()


def test_nothing_is_sampled_twice(tmp_path: Path) -> None:
    run(tmp_path, Numbers())
    again = Numbers()
    run(tmp_path, again, batch_size=7)
    assert again.sampled == []


def test_a_deleted_image_is_sampled_with_its_batch_and_features_are_kept(tmp_path: Path) -> None:
    files = run(tmp_path, Numbers())
    before = {path: path.stat().st_mtime_ns for path in files.folder.iterdir()}
    png_path(tmp_path / "images", 13).unlink()
    again = Numbers()
    run(tmp_path, again)
    assert again.sampled == [12, 13, 14, 15]
    assert (read_png(png_path(tmp_path / "images", 13), SIZE) == 13).all()
    assert {path: path.stat().st_mtime_ns for path in files.folder.iterdir()} == before


def test_features_are_those_of_the_files_where_sampling_again_differs(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2, 11):
        write_png(png_path(tmp_path / "images", number), np.full((3, *SIZE), number, dtype=np.uint8))
    files = run(tmp_path, Numbers(offset=100))
    expected = torch.arange(100.0, 123.0)
    expected[[1, 2, 11]] -= 100
    assert torch.equal(features(files)[:, 0], expected)
    stored = [read_png(png_path(tmp_path / "images", number), SIZE)[0, 0, 0] for number in range(23)]
    assert stored == expected.tolist()


def test_a_failure_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no memory left"):
        run(tmp_path, Numbers(), extractor=Failing())
    assert not list((tmp_path / "features").rglob("*.safetensors"))


def test_broken_features_are_named(tmp_path: Path) -> None:
    files = run(tmp_path, Numbers())
    files.path(1).write_bytes(files.path(1).read_bytes()[:40])
    with pytest.raises(ValueError, match="000001-of-000006.safetensors' cannot be read .*Delete the file"):
        features(files)
    files.path(1).unlink()
    assert torch.equal(features(run(tmp_path, Numbers()))[:, 0], torch.arange(23.0))


def test_existing_images_need_no_folder(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, "reference", 8, 3, {})
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, *SIZE)
    read = []

    def source(numbers: range) -> torch.Tensor:
        read.append(len(numbers))
        return images[numbers.start : numbers.stop]

    for _ in range(2):
        write_features(files, partial(measure_here, source, Means(), torch.device("cpu")), Accelerator(cpu=True))
        assert torch.equal(features(files)[:, 0], torch.arange(8.0))
        assert read == [3, 3, 2]
