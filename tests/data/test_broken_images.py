# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read are left out and counted, and too many of them end the run."""

import gc
import itertools
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_var.data import TrainingBatches, ValidationBatches, image_rows, load_source

from .samples import (
    Arguments,
    broken_bytes,
    image_rows_of,
    make_arguments,
    numbered_contents,
    numbers_in,
    write_folder,
    write_parquet,
    write_webdataset,
)


# 26 good images and 4 broken ones among them, the first one included.
BROKEN = (0, 9, 10, 25)
GOOD = [number for number in range(30) if number not in BROKEN]


def contents_with_broken_ones() -> list[bytes]:
    contents = numbered_contents(30)
    for place, content in zip(BROKEN, broken_bytes(), strict=True):
        contents[place] = content
    return contents


def write_source(kind: str, folder: Path, contents: list[bytes]) -> str:
    if kind == "folder":
        return write_folder(folder, contents)
    writer = {"parquet": write_parquet, "tar": write_webdataset}[kind]
    return writer(folder, contents, shards=2)


def load(source: str, args: Arguments):
    dataset = load_source("train_data", source, None, ["train"], args.streaming)
    return dataset, image_rows(args, args, dataset, (8, 8), 1)


@pytest.mark.parametrize("kind", ["parquet", "tar", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_left_out_and_counted(kind: str, streaming: bool, tmp_path: Path) -> None:
    args = make_arguments(streaming=streaming, train_batch_size=1, max_broken_share=0.5, shuffle_buffer_size=8)
    dataset, read_row = load(write_source(kind, tmp_path, contents_with_broken_ones()), args)
    batches = TrainingBatches(dataset, read_row, args)
    numbers = [number for batch in itertools.islice(batches, 60) for number in numbers_in(batch)]
    assert set(numbers) == set(GOOD)
    if streaming:
        assert sorted(numbers[:26]) == GOOD
        # Two epochs and 8 images of a third one.
        assert batches.images_seen - batches.broken_images == 60
        assert 8 <= batches.broken_images <= 12
    else:
        assert set(GOOD) <= set(numbers[:30])
        assert batches.images_seen - batches.broken_images == 60
        assert 8 <= batches.broken_images <= 16

    validation = ValidationBatches(dataset, read_row_without_augmentation(dataset), args)
    found = [number for batch in validation for number in numbers_in(batch)]
    # Files of a folder come class by class, those of the tar files shard by shard.
    assert (found if kind == "parquet" else sorted(found)) == GOOD
    assert (validation.images_seen, validation.broken_images) == (30, 4)


def read_row_without_augmentation(dataset):
    return image_rows(make_arguments(), None, dataset, (8, 8), 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_counts_are_exact_after_resume(streaming: bool, workers: int, tmp_path: Path) -> None:
    args = make_arguments(
        streaming=streaming,
        dataloader_num_workers=workers,
        max_broken_share=0.5,
        shuffle_buffer_size=8,
        horizontal_flip=True,
    )
    dataset, read_row = load(write_source("parquet", tmp_path, contents_with_broken_ones()), args)
    whole = TrainingBatches(dataset, read_row, args)
    killed = TrainingBatches(dataset, read_row, args)
    expected = [(batch, whole.images_seen, whole.broken_images) for batch in itertools.islice(whole, 8)]
    for _ in itertools.islice(killed, 3):
        pass
    resumed = TrainingBatches(dataset, read_row, args)
    resumed.load_state_dict(killed.state_dict())
    assert (resumed.images_seen, resumed.broken_images) == expected[2][1:]
    assert expected[2][2] < expected[7][2]
    for (batch, seen, broken), found in zip(expected[3:], resumed, strict=False):
        assert torch.equal(batch["pixel_values"], found["pixel_values"])
        assert (resumed.images_seen, resumed.broken_images) == (seen, broken)


def test_the_first_broken_image_is_named_and_further_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' loggers do not pass on to the root, where pytest listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    source = write_source("folder", tmp_path, contents_with_broken_ones())
    args = make_arguments(max_broken_share=0.5)
    for _ in itertools.islice(TrainingBatches(*load(source, args), args), 20):
        pass
    (message,) = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert any(f"{place:04d}.png: " in message for place in BROKEN)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_end_the_run(streaming: bool, workers: int, tmp_path: Path) -> None:
    source = write_source("parquet", tmp_path, contents_with_broken_ones())
    values = {"streaming": streaming, "dataloader_num_workers": workers, "shuffle_buffer_size": 8}
    args = make_arguments(max_broken_share=0.05, **values)
    batches = TrainingBatches(*load(source, args), args)
    with pytest.raises(ValueError, match=r"of 1\d\d images cannot be read, more than `max_broken_share` = 0.05"):
        for _ in itertools.islice(batches, 1000):
            pass
    # As soon as there were enough of them to tell.
    assert batches.images_seen <= 110
    args = make_arguments(max_broken_share=0.4, **values)
    assert len(list(itertools.islice(TrainingBatches(*load(source, args), args), 100))) == 100


# torch waits five seconds for a worker that failed: one case is enough.
@pytest.mark.parametrize(
    ("streaming", "share", "workers"),
    [(False, 0.01, 0), (False, 1.0, 0), (True, 0.01, 0), (True, 1.0, 0), (True, 0.01, 1)],
)
def test_nothing_but_broken_images_is_an_error_and_no_endless_loop(
    streaming: bool, share: float, workers: int
) -> None:
    dataset = image_rows_of(broken_bytes() * 3)
    args = make_arguments(streaming=streaming, max_broken_share=share, dataloader_num_workers=workers)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    read_row = image_rows(args, args, dataset, (8, 8), 1)
    with pytest.raises(ValueError, match="cannot be read|can be read"):
        next(iter(TrainingBatches(dataset, read_row, args)))
    with pytest.raises(ValueError, match="cannot be read|can be read"):
        TrainingBatches(dataset, read_row, args).first_items(4)
    # The loader that failed is part of a cycle, and should not be found by the next test's workers.
    gc.collect()


def test_rows_without_an_image_are_broken() -> None:
    dataset = image_rows_of([*numbered_contents(3), None])
    args = make_arguments(max_broken_share=1.0)
    validation = ValidationBatches(dataset, image_rows(args, None, dataset, (8, 8), 1), args)
    assert [numbers_in(batch) for batch in validation] == [[0, 1, 2]]
    assert validation.broken_images == 1


def test_replacements_depend_on_seed_and_position_alone() -> None:
    dataset = image_rows_of(contents_with_broken_ones())
    args = make_arguments(max_broken_share=0.5, horizontal_flip=True)
    read_row = image_rows(args, args, dataset, (8, 8), 1)
    whole = torch.cat(
        [batch["pixel_values"] for batch in itertools.islice(TrainingBatches(dataset, read_row, args), 16)]
    )
    args = make_arguments(max_broken_share=0.5, horizontal_flip=True, train_batch_size=8, dataloader_num_workers=2)
    other = torch.cat(
        [batch["pixel_values"] for batch in itertools.islice(TrainingBatches(dataset, read_row, args), 8)]
    )
    assert torch.equal(whole, other)


def test_images_are_turned_as_their_exif_data_say(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter to the right
    image.save(tmp_path / "0.png", exif=exif)
    dataset, _ = load(str(tmp_path), make_arguments())
    batch = next(iter(ValidationBatches(dataset, read_row_without_augmentation(dataset), make_arguments())))
    assert torch.equal(batch["pixel_values"][0, 0, 0], torch.tensor([-1.0] * 4 + [1.0] * 4))
