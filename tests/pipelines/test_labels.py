# SPDX-License-Identifier: Apache-2.0
"""Class labels as users write them."""

import numpy
import pytest
import torch

from pipelines.tiny import make_pipeline


UNCONDITIONAL = 5


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (3, [3]),
        (0, [0]),
        ([3, 1], [3, 1]),
        ((3, 1), [3, 1]),
        ([[3], [1]], [3, 1]),
        ([[3, 1], [[0]]], [3, 1, 0]),
        (range(3), [0, 1, 2]),
        (numpy.int64(3), [3]),
        ([numpy.int32(3), numpy.uint8(1)], [3, 1]),
        (numpy.array([3, 1]), [3, 1]),
        (numpy.array([[3], [1]]), [3, 1]),
        (numpy.array(["goldfish", "tench"]), [1, 0]),
        (torch.tensor(3), [3]),
        (torch.tensor([[3], [1]]), [3, 1]),
        ([torch.tensor(3), torch.tensor([1, 0], dtype=torch.int32)], [3, 1, 0]),
        ("goldfish", [1]),
        ("tench, Tinca tinca", [0]),
        ("tench", [0]),
        ("Tinca tinca", [0]),
        (["Arctic owl", 1, None], [3, 1, UNCONDITIONAL]),
        (None, [UNCONDITIONAL]),
        ([None, None], [UNCONDITIONAL, UNCONDITIONAL]),
        (-1, [UNCONDITIONAL]),
        ([-1, UNCONDITIONAL, torch.tensor(-1)], [UNCONDITIONAL] * 3),
    ],
    ids=repr,
)
def test_labels_become_ids(pipe, labels, ids):
    assert pipe.get_label_ids(labels) == ids
    assert all(type(label) is int for label in pipe.get_label_ids(labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (6, r"`class_labels` must be in \[0, 5\).*`None` for unconditional.*got 6"),
        ([0, -2], r"`class_labels` must be in \[0, 5\).*got -2"),
        (torch.tensor([9]), r"`class_labels` must be in \[0, 5\).*got 9"),
        ([], r"`class_labels` must hold at least one label"),
        ([[], []], r"`class_labels` must hold at least one label"),
        (torch.tensor([], dtype=torch.long), r"`class_labels` must hold at least one label"),
        (1.0, r"`class_labels` must be ids, names or `None`, got 1.0 of type float"),
        ([1, 2.0], r"`class_labels` must be ids, names or `None`, got 2.0 of type float"),
        (numpy.array([1.0]), r"`class_labels` must be ids, names or `None`, got 1.0 of type float"),
        (torch.tensor([1.0]), r"`class_labels` must be integers, got a tensor of torch.float32"),
        (torch.tensor([True]), r"`class_labels` must be integers, got a tensor of torch.bool"),
        (True, r"`class_labels` must be ids, names or `None`, got True of type bool"),
        ({1, 2}, r"`class_labels` must be ids, names or `None`, got \{1, 2\} of type set"),
        (b"tench", r"`class_labels` must be ids, names or `None`, got b'tench' of type bytes"),
        ("Goldfish", r"`class_labels` has the unknown name 'Goldfish'; did you mean 'goldfish'"),
        ("tensh", r"`class_labels` has the unknown name 'tensh'; did you mean 'tench'"),
        ("arctic oul", r"unknown name 'arctic oul'; did you mean 'Arctic owl'"),
        ("zeppelin", r"`class_labels` has the unknown name 'zeppelin'; the names are in `pipe.id2label`"),
        ("", r"`class_labels` has the unknown name ''"),
        ("crane", r"`class_labels` has the name 'crane', which the labels \[2, 4\] share: pass one of these ids"),
    ],
    ids=repr,
)
def test_bad_labels_are_named(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe.get_label_ids(labels)
    with pytest.raises(ValueError, match=message):
        pipe(labels)


def test_default_names_and_an_unconditional_model():
    pipe = make_pipeline(transformer={"num_labels": 2})
    assert pipe.get_label_ids(["LABEL_1", 0, None]) == [1, 0, 2]
    unconditional = make_pipeline(transformer={"num_labels": 0})
    assert unconditional.get_label_ids([None, -1, 0]) == [0, 0, 0]
    assert len(unconditional(None).images) == 1
    with pytest.raises(ValueError, match="got 1"):
        unconditional(1)


NUMBERS = {0: "3", 1: "10", 2: "2", 3: "x", 4: "-1, minus one"}


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        # A text that is no name is an id, as on a command line.
        (["0", "1", "4", "5"], [0, 1, 4, 5]),
        # It may be both where both are the same label.
        ("2", [2]),
        ("10", [1]),
        ("x", [3]),
        (["name:3", "id:3", "name:10", "id:-1", "name:-1", "id:2"], [0, 3, 1, 5, 4, 2]),
    ],
    ids=repr,
)
def test_texts_that_are_numbers(labels, ids):
    pipe = make_pipeline(transformer={"id2label": NUMBERS, "num_labels": 5})
    assert pipe.get_label_ids(labels) == ids


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("3", "'3', which is both the name of label 0 and the id of another: write 'name:3' or 'id:3'"),
        ("-1", "'-1', which is both the name of label 4 and the id of another: write 'name:-1' or 'id:-1'"),
        ("7", r"`class_labels` must be in \[0, 5\).*got 7"),
        ("id:7", r"`class_labels` must be in \[0, 5\).*got 7"),
        ("name:7", "unknown name 'name:7'"),
        ("id:x", "unknown name 'id:x'"),
    ],
)
def test_ambiguous_numbers_are_refused(label, message):
    pipe = make_pipeline(transformer={"id2label": NUMBERS, "num_labels": 5})
    with pytest.raises(ValueError, match=message):
        pipe.get_label_ids(label)
