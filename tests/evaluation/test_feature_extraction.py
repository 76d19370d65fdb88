# SPDX-License-Identifier: Apache-2.0
"""Drawing, features and files at once: what is a file counts, what fails is told, what is done is not done again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_var.evaluation.feature_extraction import DrawnImages, Outputs, Stopwatch, missing_batches, write_features
from hf_var.evaluation.feature_files import FeatureFiles
from hf_var.evaluation.image_files import png_path, read_png, write_png


SIZE = (4, 6)
CPU = torch.device("cpu")


class Means(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


class Failing(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory left")


class Numbers:
    """Draws images whose pixels are all their number plus an offset."""

    def __init__(self, offset: int = 0):
        self.offset = offset
        self.drawn: list[int] = []

    def latents(self, numbers: range) -> torch.Tensor:
        self.drawn += numbers
        return torch.tensor(list(numbers), dtype=torch.float32)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents + self.offset).byte()[:, None, None, None].expand(-1, 3, *SIZE).clone()


def run(folder: Path, drawer: Numbers, batch_size: int = 4, extractor: nn.Module | None = None) -> FeatureFiles:
    (folder / "images").mkdir(exist_ok=True)
    files = FeatureFiles(folder / "features", "samples", 23, 10, {})
    source = DrawnImages(drawer, folder / "images", SIZE, Stopwatch())
    outputs = Outputs(files, extractor or Means(), CPU, Stopwatch(), folder / "images")
    work = [batch for batches in missing_batches(files, source, batch_size) for batch in batches]
    write_features(work, source, outputs, is_shown=False)
    return files


def features(files: FeatureFiles) -> torch.Tensor:
    return torch.cat([part["features"] for part in files.load("features")])


def test_every_image_has_its_features_and_its_file(tmp_path: Path) -> None:
    files = run(tmp_path, Numbers())
    assert torch.equal(features(files), torch.arange(23.0)[:, None].expand(-1, 3))
    assert [len(part["features"]) for part in files.load("features")] == [10, 10, 3]
    for number in range(23):
        assert (read_png(png_path(tmp_path / "images", number), SIZE) == number).all()


def test_nothing_is_drawn_twice(tmp_path: Path) -> None:
    run(tmp_path, Numbers())
    again = Numbers()
    run(tmp_path, again, batch_size=7)
    assert again.drawn == []


def test_a_deleted_picture_is_drawn_with_its_batch_and_features_are_kept(tmp_path: Path) -> None:
    files = run(tmp_path, Numbers())
    before = {path: path.stat().st_mtime_ns for path in files.folder.iterdir()}
    png_path(tmp_path / "images", 13).unlink()
    again = Numbers()
    run(tmp_path, again)
    assert again.drawn == [10, 11, 12, 13]
    assert (read_png(png_path(tmp_path / "images", 13), SIZE) == 13).all()
    assert {path: path.stat().st_mtime_ns for path in files.folder.iterdir()} == before


def test_features_are_those_of_the_files_where_a_second_drawing_differs(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2, 11):
        write_png(png_path(tmp_path / "images", number), np.full((3, *SIZE), number, dtype=np.uint8))
    files = run(tmp_path, Numbers(offset=100))
    expected = torch.arange(100.0, 123.0)
    expected[[1, 2, 11]] -= 100
    assert torch.equal(features(files)[:, 0], expected)
    stored = [read_png(png_path(tmp_path / "images", number), SIZE)[0, 0, 0] for number in range(23)]
    assert stored == expected.tolist()


def test_a_failure_in_a_thread_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no memory left"):
        run(tmp_path, Numbers(), extractor=Failing())
    assert not list((tmp_path / "features").rglob("*.safetensors"))


def test_broken_features_are_named(tmp_path: Path) -> None:
    files = run(tmp_path, Numbers())
    files.path(1).write_bytes(files.path(1).read_bytes()[:40])
    with pytest.raises(ValueError, match="00001-of-00003.safetensors' cannot be read .*Delete the file"):
        features(files)
    files.path(1).unlink()
    assert torch.equal(features(run(tmp_path, Numbers()))[:, 0], torch.arange(23.0))


def test_images_that_are_there_go_the_same_way(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, "reference", 8, 5, {})
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, *SIZE)

    def source(batches):
        return (images[batch.start : batch.stop] for batch in batches)

    work = missing_batches(files, source, 2)
    assert [[len(numbers) for _, numbers in batches] for batches in work] == [[2, 2, 1], [2, 1]]
    write_features(
        [batch for batches in work for batch in batches], source, Outputs(files, Means(), CPU, Stopwatch()), False
    )
    assert torch.equal(features(files)[:, 0], torch.arange(8.0))
    assert missing_batches(files, source, 2) == []
