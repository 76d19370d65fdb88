# SPDX-License-Identifier: Apache-2.0
"""What an image is drawn for: labels of every kind of column, and embeddings."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_var.data import (
    CodesRows,
    TrainingBatches,
    embedding_condition,
    has_label_names,
    image_rows,
    load_source,
    token_condition,
    training_labels,
    validation_labels,
)

from .samples import make_arguments, numbered_contents, numbers_in


def labelled(labels: list, feature=None) -> Dataset:
    rows = {"image": [{"bytes": content, "path": None} for content in numbered_contents(len(labels))], "label": labels}
    dataset = Dataset.from_dict(rows)
    return dataset if feature is None else dataset.cast_column("label", feature)


def batch_of(dataset, condition, size: int = 4) -> dict:
    args = make_arguments(train_batch_size=size)
    return next(iter(TrainingBatches(dataset, image_rows(args, None, dataset, (8, 8), 1, condition), args)))


def labels_by_number(dataset, condition) -> dict[int, int]:
    batch = batch_of(dataset, condition)
    return dict(zip(numbers_in(batch), batch["class_labels"].tolist(), strict=True))


def write_tar(path: Path, kind: str, contents: list[bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(numbered_contents(len(contents))):
            for ending, content in (("png", image), (kind, contents[number])):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


# --------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_texts_are_classes_in_alphabetical_order(kind: str) -> None:
    dataset = labelled(["newt", "cat", "newt", "dog"], Value(kind))
    condition, id2label = training_labels(dataset, None, None)
    assert id2label == {0: "cat", 1: "dog", 2: "newt"}
    assert has_label_names(dataset, condition)
    assert labels_by_number(dataset, condition) == {0: 2, 1: 0, 2: 2, 3: 1}
    with pytest.raises(ValueError, match="`num_labels` is 2, but the data names the labels"):
        training_labels(dataset, None, 2)


def test_validation_has_the_classes_of_the_training() -> None:
    _, id2label = training_labels(labelled(["newt", "cat", "newt", "dog"]), None, None)
    # Without a cat the names alone would be numbered anew.
    fewer = labelled(["newt", "dog", "dog", "newt"])
    for dataset in (fewer, fewer.to_iterable_dataset()):
        assert labels_by_number(dataset, validation_labels(dataset, None, id2label, True)) == {0: 2, 1: 1, 2: 1, 3: 2}
    with pytest.raises(ValueError, match=r"holds \['emu'\], which are not among \['cat', 'dog', 'newt'\]"):
        validation_labels(labelled(["emu", "cat"]), None, id2label, True)
    stream = labelled(["emu"] * 4).to_iterable_dataset()
    with pytest.raises(ValueError, match="must hold one of .*'newt'.*got 'emu'"):
        batch_of(stream, validation_labels(stream, None, id2label, True))
    with pytest.raises(ValueError, match=r"has the labels \['cat', 'dog'\]"):
        validation_labels(labelled([0, 1], ClassLabel(names=["cat", "dog"])), None, id2label, True)


def test_a_stream_of_texts_needs_known_classes() -> None:
    stream = labelled(["b", "a", "b", "a"]).to_iterable_dataset()
    with pytest.raises(ValueError, match="of a stream does not tell how many labels there are.*without `streaming`"):
        training_labels(stream, None, None)
    condition, id2label = training_labels(stream, None, None, known={0: "a", 1: "b"})
    assert id2label == {0: "a", 1: "b"}
    assert labels_by_number(stream, condition) == {0: 1, 1: 0, 2: 1, 3: 0}


# --------------------------------------------------------------------------------------------------------------------
# What is no label


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None, 1], "must hold a label in every row, got 1 of 4 rows without one"),
        (["a", None, None, "b"], "must hold a label in every row, got 2 of 4 rows without one"),
        ([[0], [1], [0], [1]], "must hold integers or texts, got List"),
        ([0.0, 1.0, 0.0, 1.0], "must hold integers or texts, got Value.'float64'"),
        ([0.0, float("nan"), 0.0, 1.0], "must hold integers or texts, got Value.'float64'"),
        ([True, False, True, True], "must hold integers or texts, got Value.'bool'"),
        ([0, 99_000_000, 1, 2], "holds numbers up to 99000000, too many for classes.*Store them as texts"),
        ([0, -1, 1, 2], "must hold labels from 0 to 2, got values from -1 to 2"),
    ],
)
def test_columns_that_hold_no_labels_are_refused_before_any_work(labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"`label_column` = 'label' {message}"):
        training_labels(labelled(labels), None, None)


# --------------------------------------------------------------------------------------------------------------------
# Tar files


def test_labels_within_json(tmp_path: Path) -> None:
    contents = [json.dumps({"label": number % 2, "name": "ab"[number % 2]}).encode() for number in range(4)]
    source = write_tar(tmp_path / "0.tar", "json", contents)
    dataset = load_source("train_data", source, None, ["train"])
    for column, names in (("json.label", {0: "0", 1: "1"}), ("json.name", {0: "a", 1: "b"})):
        condition, id2label = training_labels(dataset, column, None)
        assert id2label == names
        assert labels_by_number(dataset, condition) == {number: number % 2 for number in range(4)}
    with pytest.raises(ValueError, match=r"holds structures. Name one of \['json.label', 'json.name'\]"):
        training_labels(dataset, "json", None)
    with pytest.raises(ValueError, match="`label_column` = 'json.kind' is not among"):
        training_labels(dataset, "json.kind", None)
    stream = load_source("train_data", source, None, ["train"], streaming=True)
    condition, _ = training_labels(stream, "json.label", 2)
    assert labels_by_number(stream, condition) == {number: number % 2 for number in range(4)}


def test_a_column_may_have_a_dot_in_its_name() -> None:
    dataset = labelled([0, 1, 1, 0]).rename_column("label", "json.label")
    condition, _ = training_labels(dataset, "json.label", None)
    assert labels_by_number(dataset, condition) == {0: 0, 1: 1, 2: 1, 3: 0}


@pytest.mark.parametrize("streaming", [False, True])
def test_names_in_cls_are_explained(streaming: bool, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "0.tar", "cls", [b"cat"] * 3)
    with pytest.raises(ValueError, match=r"`train_data` = .* a file .cls that holds no number.*cat.*\.txt"):
        load_source("train_data", source, None, ["train"], streaming)
    dataset = load_source(
        "train_data", write_tar(tmp_path / "1.tar", "txt", [b"cat", b"dog", b"cat"]), None, ["train"]
    )
    assert training_labels(dataset, "txt", None)[1] == {0: "cat", 1: "dog"}


# --------------------------------------------------------------------------------------------------------------------
# Embeddings


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("feature", [List(Value("float32"), length=3), List(Value("float64"))])
def test_embeddings_are_conditions_of_images_and_codes(feature, streaming: bool) -> None:
    embeddings = [[number, 0.5, -1.0] for number in range(4)]
    rows = {"image": labelled([0] * 4)["image"], "codes": [[number] * 5 for number in range(4)], "clip": embeddings}
    dataset = Dataset.from_dict({name: list(values) for name, values in rows.items()}).cast_column("clip", feature)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    condition = embedding_condition(dataset, "clip")
    assert condition.size == 3
    batch = batch_of(dataset, condition)
    assert batch["class_embeds"].tolist() == [[number, 0.5, -1.0] for number in numbers_in(batch)]
    args = make_arguments()
    batch = next(iter(TrainingBatches(dataset, CodesRows(condition), args)))
    assert str(batch["class_embeds"].dtype) == "torch.float32"
    assert batch["class_embeds"][:, 0].tolist() == batch["codes"][:, 0].tolist()


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([[1.0, 2.0], [1.0]], "must hold 2 finite numbers in every row, got .*1"),
        ([[1.0, 2.0], [1.0, float("nan")]], "must hold 2 finite numbers in every row, got .*nan"),
        ([[1.0, 2.0], None], "must hold 2 finite numbers in every row, got None"),
        ([[], [1.0]], "must hold at least one number"),
        ([["a"], ["b"]], "must hold lists of floating point numbers, got List"),
        ([1.0, 2.0], "must hold lists of floating point numbers, got Value"),
    ],
)
def test_what_is_no_embedding_is_refused(embeddings: list, message: str) -> None:
    dataset = Dataset.from_dict({"clip": embeddings, "codes": [[0]] * 2})
    with pytest.raises(ValueError, match=f"`condition_column` = 'clip' {message}"):
        embedding_condition(dataset, "clip")
    with pytest.raises(ValueError, match="`condition_column` = 'clop' is not among"):
        embedding_condition(dataset, "clop")


@pytest.mark.parametrize(
    ("ids", "size", "message"),
    [
        ([[1, 2], [1]], None, "must hold 2 integers from 0 to 8 in every row, got \\[1\\]"),
        ([[1, 2], [3, 4]], 3, "must hold 3 integers from 0 to 8 in every row, got \\[1, 2\\]"),
        ([[1, 2], [3, 9]], None, "must hold 2 integers from 0 to 8 in every row, got \\[3, 9\\]"),
        ([[1, 2], [-1, 4]], None, "must hold 2 integers from 0 to 8 in every row, got \\[-1, 4\\]"),
        ([[1, 2], None], None, "must hold 2 integers from 0 to 8 in every row, got None"),
        ([[], [1]], None, "must hold at least one integer"),
        ([[0.5], [1.0]], None, "must hold lists of integers, got List"),
        (["a", "b"], None, "must hold lists of integers, got Value.*: name its `text_tokenizer`"),
    ],
)
def test_what_are_no_condition_tokens_is_refused(ids: list, size: int | None, message: str) -> None:
    dataset = Dataset.from_dict({"text": ids})
    with pytest.raises(ValueError, match=f"`condition_column` = 'text' {message}"):
        token_condition(dataset, "text", 9, size)


def test_embeddings_of_a_stream_are_checked_as_they_are_read() -> None:
    features = Features({"clip": List(Value("float32"), length=2), "codes": List(Value("int64"))})
    rows = {"clip": [[1.0, 2.0], [1.0, np.inf]], "codes": [[0]] * 2}
    stream = Dataset.from_dict(rows, features=features).to_iterable_dataset()
    condition = embedding_condition(stream, "clip")
    with pytest.raises(ValueError, match="must hold 2 finite numbers in every row, got .*inf"):
        next(iter(TrainingBatches(stream, CodesRows(condition), make_arguments(train_batch_size=2))))
