# SPDX-License-Identifier: Apache-2.0
"""Every image file of a folder is read, whatever it is called and wherever it lies, or the folder is refused."""

import json
from pathlib import Path

import pytest

from hf_var.data import (
    LabelCondition,
    ValidationBatches,
    find_label_column,
    image_rows,
    label_names,
    load_source,
    training_labels,
)

from .samples import encoded, make_arguments, numbered_image, numbers_in, write_parquet, write_webdataset


def write(folder: Path, *names: str) -> str:
    """Numbered images with these names. Returns the folder."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(numbered_image(number)))
    return str(folder)


def read(source: str, streaming: bool = False, split: str | None = None) -> list[int]:
    dataset = load_source("train_data", source, split, ["train"], streaming)
    validation = ValidationBatches(dataset, image_rows(make_arguments(), None, dataset, (8, 8), 1), make_arguments())
    return [number for batch in validation for number in numbers_in(batch)]


def labels_of(source: str) -> list[int | None]:
    return load_source("train_data", source, None, ["train"])["label"][:]


@pytest.mark.parametrize("streaming", [False, True])
def test_words_in_names_of_files_are_no_splits(streaming: bool, tmp_path: Path) -> None:
    names = [f"{folder}/{name}.png" for folder in "ab" for name in ("0", "bullet_train_0", "test", "val-1", "2")]
    source = write(tmp_path / "bullet-train", *names)
    assert sorted(read(source, streaming)) == list(range(10))
    assert labels_of(source) == [0] * 5 + [1] * 5


@pytest.mark.parametrize("streaming", [False, True])
def test_links_are_followed(streaming: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "set", "a/0.png", "a/1.png")
    write(tmp_path / "elsewhere", "x/deep/0.png", "x/1.png")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere" / "x")
    (tmp_path / "set" / "c").mkdir()
    (tmp_path / "set" / "c" / "one.png").symlink_to(tmp_path / "elsewhere" / "x" / "1.png")
    assert sorted(read(source, streaming)) == [0, 0, 1, 1, 1]
    assert labels_of(source) == [0, 0, 1, 1, 2]
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="link 'a/up' that leads back"):
        read(source, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_class_is_the_first_folder_at_any_depth(streaming: bool, tmp_path: Path) -> None:
    source = write(tmp_path, "a/0.png", "a/young/red/1.png", "b/old/2.png", "b/3.png")
    dataset = load_source("train_data", source, None, ["train"], streaming)
    assert label_names(dataset, find_label_column(dataset, None)) == {0: "a", 1: "b"}
    rows = image_rows(make_arguments(), None, dataset, (8, 8), 1, LabelCondition("label", 2))
    (batch,) = ValidationBatches(dataset, rows, make_arguments())
    assert sorted(zip(numbers_in(batch), batch["class_labels"].tolist(), strict=True)) == [
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
    ]


def test_one_class_is_a_class_and_no_folder_is_none(tmp_path: Path) -> None:
    source = write(tmp_path / "one", "cats/0.png", "cats/1.png")
    assert training_labels(load_source("train_data", source, None, ["train"]), None, None)[1] == {0: "cats"}
    bare = load_source("train_data", write(tmp_path / "bare", "0.png", "1.png"), None, ["train"])
    assert list(bare.features) == ["image"]


def test_images_beside_class_folders_are_read_without_a_class(tmp_path: Path) -> None:
    source = write(tmp_path, "0.png", "a/1.png", "b/2.png")
    assert sorted(read(source)) == [0, 1, 2]
    assert labels_of(source) == [None, 0, 1]
    with pytest.raises(ValueError, match="`label_column` = 'label'.*1 of 3 rows without one.*`num_labels` 0"):
        training_labels(load_source("train_data", source, None, ["train"]), None, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_unusual_endings_and_files_beside_images(streaming: bool, tmp_path: Path) -> None:
    source = write(tmp_path, "a/0.PNG", "a/1.jfif", "a/2.jpg_large", "a/3", "b/4.png~", ".hidden/5.png", "b/._6.png")
    for name in ("a/0.json", "labels.csv", "notes.txt", "Thumbs.db"):
        (tmp_path / name).write_text("{}")
    assert sorted(read(source, streaming)) == [0, 1, 2, 3, 4]


def test_files_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    source = write(tmp_path, "a/10.png", "a/9.png", "a-b/1.png", "a/1.png")
    assert read(source) == read(source, streaming=True) == [2, 3, 0, 1]


# --------------------------------------------------------------------------------------------------------------------
# Splits


def test_folders_called_like_splits_are_splits(tmp_path: Path) -> None:
    source = write(tmp_path, "training/a/0.png", "training/b/1.png", "val/b/2.png", "test/c/3.png")
    for streaming in (False, True):
        assert [read(source, streaming, split) for split in (None, "validation", "test")] == [[0, 1], [2], [3]]
    assert read(source, split="train[1:]+validation") == [1, 2]
    dataset = load_source("validation_data", source, "validation", ["validation"])
    # The same classes in all splits.
    assert dataset.features["label"].names == ["a", "b", "c"]
    assert dataset["label"][:] == [1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/a/0.png", "extra/1.png"],
            "the split 'train' and beside it 1 images of no split, such as 'extra/1.png'",
        ),
        (["train/a/0.png", "1.png"], "the split 'train' and beside it 1 images of no split, such as '1.png'"),
        (["set/train/0.png", "set/test/1.png"], "a folder 'test' within another one, as in 'set/test/1.png'"),
    ],
)
def test_folders_that_may_be_splits_or_not_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    source = write(tmp_path, *names)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=f"`train_data` = .* has {message}"):
            read(source, streaming)


# --------------------------------------------------------------------------------------------------------------------
# Metadata and other files


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_must_name_every_image(streaming: bool, tmp_path: Path) -> None:
    source = write(tmp_path, "0.png", "bullet_train_1.png", "test_2.png")
    lines = [{"file_name": name, "text": name} for name in ("0.png", "bullet_train_1.png", "test_2.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sorted(read(source, streaming)) == [0, 1, 2]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    with pytest.raises(ValueError, match="has 3 images, of which its metadata leave out 1, such as 'test_2.png'"):
        read(source, streaming)


def test_images_beside_other_data_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "preview.png")
    write_parquet(tmp_path, [encoded(numbered_image(number)) for number in range(3)], shards=1)
    with pytest.raises(ValueError, match=r"has images such as 'preview.png' beside '0.parquet'.*\*.parquet"):
        read(source)
    assert read(str(tmp_path / "*.parquet")) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_tar_is_an_error(streaming: bool, share: float, tmp_path: Path) -> None:
    source = write_webdataset(tmp_path, [encoded(numbered_image(number)) for number in range(20)], shards=1)
    content = (tmp_path / "0.tar").read_bytes()
    end = content.rstrip(b"\0")
    # At the end of a block, where tarfile takes it for the end of the archive, and within one.
    for cut in (int(len(end) * share) // 512 * 512, int(len(end) * share)):
        (tmp_path / "0.tar").write_bytes(content[:cut])
        for place in (source, str(tmp_path)):
            with pytest.raises(ValueError, match=r"`train_data`: the file '.*0.tar' is cut off"):
                load_source("train_data", place, None, ["train"], streaming)
