# SPDX-License-Identifier: Apache-2.0
"""Loading a source, and finding its columns and labels."""

from pathlib import Path

import pytest
from datasets import Array3D, ClassLabel, Dataset, Features, Image, IterableDataset, List, Value

from hf_var.data import (
    CodesRows,
    LabelCondition,
    TrainingBatches,
    ValidationBatches,
    check_codes_column,
    check_labels,
    find_image_column,
    find_label_column,
    image_rows,
    is_codes_dataset,
    label_names,
    load_source,
)

from .samples import (
    image_rows_of,
    make_arguments,
    numbered_contents,
    numbers_in,
    write_folder,
    write_parquet,
    write_webdataset,
)


def load(source: str, streaming: bool, split: str | None = None) -> Dataset | IterableDataset:
    return load_source("train_data", source, split, ["train"], streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "tar", "folder"])
def test_every_source_has_its_columns_and_images(kind: str, streaming: bool, tmp_path: Path) -> None:
    contents = numbered_contents(7)
    if kind == "folder":
        source = write_folder(tmp_path, contents)
    else:
        source = {"parquet": write_parquet, "tar": write_webdataset}[kind](tmp_path, contents, shards=1)
    dataset = load(source, streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert find_image_column(dataset, None) == ("png" if kind == "tar" else "image")
    label_column = find_label_column(dataset, None)
    assert label_column == ("cls" if kind == "tar" else "label")
    if kind == "folder":
        assert label_names(dataset, label_column) == {0: "a", 1: "b", 2: "c"}
    read_row = image_rows(make_arguments(), None, dataset, (8, 8), 1, LabelCondition(label_column))
    batches = list(ValidationBatches(dataset, read_row, make_arguments()))
    numbers = [number for batch in batches for number in numbers_in(batch)]
    labels = [label for batch in batches for label in batch["class_labels"].tolist()]
    assert sorted(numbers) == list(range(7))
    assert labels == [number % 3 for number in numbers]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_source_is_an_error_at_the_start(streaming: bool, tmp_path: Path) -> None:
    image_rows_of([]).to_parquet(tmp_path / "empty.parquet")
    write_webdataset(tmp_path, [], shards=1)
    for name in ("empty.parquet", "*.tar"):
        with pytest.raises(ValueError, match="`train_data` = .* is empty"):
            load(str(tmp_path / name), streaming)
    with pytest.raises(ValueError, match="matches no file"):
        load(str(tmp_path / "nothing*.parquet"), streaming)
    with pytest.raises(ValueError, match="is not a folder"):
        load(str(tmp_path / "nowhere"), streaming)


def test_splits_are_chosen_and_checked(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(numbered_contents(1)[0])
    for streaming in (False, True):
        assert load(str(tmp_path), streaming).split == "train"
        assert load(str(tmp_path), streaming, "test").split == "test"
        with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\], not 'validation'"):
            load(str(tmp_path), streaming, "validation")
    assert len(load(str(tmp_path), False, "train[:1]")) == 1
    with pytest.raises(ValueError, match="not 'train"):
        load(str(tmp_path), True, "train[:1]")


# --------------------------------------------------------------------------------------------------------------------
# Columns


def test_columns_are_found_or_named() -> None:
    features = Features({"picture": Value("string"), "kind": ClassLabel(names=["a", "b"]), "size": Value("int64")})
    dataset = Dataset.from_dict({"picture": ["x"], "kind": [1], "size": [4]}, features=features)
    assert find_label_column(dataset, None) == "kind"
    assert label_names(dataset, "kind") == {0: "a", 1: "b"}
    assert label_names(dataset, "size") == {label: str(label) for label in range(5)}
    with pytest.raises(ValueError, match=r"\['picture', 'kind', 'size'\].*image_column"):
        find_image_column(dataset, None)
    with pytest.raises(ValueError, match="label_column.*num_labels"):
        find_label_column(dataset.remove_columns("kind"), None)
    with pytest.raises(ValueError, match=r"`image_column` = 'photo' is not among.*\['picture'"):
        find_image_column(dataset, "photo")
    arrays = Features({"array": Array3D((5, 8, 8), "uint8"), "label": Value("int64")})
    assert find_image_column(Dataset.from_dict({"array": [], "label": []}, features=arrays), None) == "array"
    two = Features({"first": Image(), "second": Image()})
    with pytest.raises(ValueError, match=r"found \['first', 'second'\]"):
        find_image_column(Dataset.from_dict({"first": [], "second": []}, features=two), None)


def test_a_stream_may_not_know_its_columns() -> None:
    stream = Dataset.from_dict({"kind": [0, 1], "label": [1, 0]}).to_iterable_dataset().map(lambda row: row)
    assert stream.features is None
    assert find_label_column(stream, None) == "label"
    with pytest.raises(ValueError, match="num_labels"):
        label_names(stream, "label")


@pytest.mark.parametrize("streaming", [False, True])
def test_encoded_images_in_a_plain_column_are_images_when_named(streaming: bool) -> None:
    dataset = Dataset.from_dict({"file": numbered_contents(3), "text": ["", "", ""]})
    if streaming:
        dataset = dataset.to_iterable_dataset()
    read_row = image_rows(make_arguments(image_column="file"), None, dataset, (8, 8), 1)
    (batch,) = ValidationBatches(dataset, read_row, make_arguments())
    assert numbers_in(batch) == [0, 1, 2]


def test_labels_are_checked_at_once_or_row_by_row() -> None:
    dataset = image_rows_of(numbered_contents(4))
    check_labels(dataset, "label", 3)
    with pytest.raises(ValueError, match="labels from 0 to 1, got values from 0 to 2"):
        check_labels(dataset, "label", 2)
    stream = dataset.to_iterable_dataset()
    check_labels(stream, "label", 2)
    read_row = image_rows(make_arguments(), make_arguments(), stream, (8, 8), 1, LabelCondition("label", 2))
    with pytest.raises(ValueError, match="labels from 0 to 1, got 2"):
        next(iter(TrainingBatches(stream, read_row, make_arguments())))
    unlabelled = Dataset.from_dict({"codes": [[0]], "label": [None]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="must hold integers, got None"):
        next(iter(TrainingBatches(unlabelled, CodesRows(LabelCondition("label")), make_arguments())))


# --------------------------------------------------------------------------------------------------------------------
# Codes


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 1]], "3 integers.*length 2"),
        ([[0, 1, 9]], "codes from 0 to 8"),
        ([[0.5] * 3], "3 integers.*float64"),
        ([[True] * 3], "3 integers.*bool"),
        ([[0, 1, 2], [0]], r"3 integers.*lists of lengths \[1, 3\]"),
        ([[0, 1, 2], None], r"3 integers.*lists of lengths \[0, 3\]"),
    ],
)
def test_codes_of_another_tokenizer_are_refused(codes: list, message: str, streaming: bool) -> None:
    dataset = Dataset.from_dict({"codes": codes})
    with pytest.raises(ValueError, match=message):
        check_codes_column(dataset.to_iterable_dataset() if streaming else dataset, length=3, codebook_size=9)


@pytest.mark.parametrize("streaming", [False, True])
def test_codes_are_read_with_their_labels(streaming: bool) -> None:
    features = Features({"codes": List(Value("uint16"), length=3), "label": Value("int64")})
    rows = {"codes": [[index, 2 * index, 40_000] for index in range(8)], "label": list(range(8))}
    dataset = Dataset.from_dict(rows, features=features)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    assert is_codes_dataset(dataset)
    batch = next(
        iter(TrainingBatches(dataset, CodesRows(LabelCondition("label", 8)), make_arguments(train_batch_size=8)))
    )
    assert sorted(batch["class_labels"].tolist()) == list(range(8))
    assert batch["codes"].tolist() == [[label, 2 * label, 40_000] for label in batch["class_labels"].tolist()]


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32"])
def test_codes_of_any_integers_are_read(kind: str) -> None:
    dataset = Dataset.from_dict({"codes": [[0, 100, 7]] * 4}, features=Features({"codes": List(Value(kind))}))
    for rows in (dataset, dataset.to_iterable_dataset()):
        check_codes_column(rows, length=3, codebook_size=101)
        batch = next(iter(TrainingBatches(rows, CodesRows(), make_arguments())))
        assert batch["codes"].tolist() == [[0, 100, 7]] * 4
