# SPDX-License-Identifier: Apache-2.0
"""What PixelCNN and PixelSNAIL refuse, and whether they say why."""

import pytest
import torch

from hf_var import PixelCNNConfig, PixelSNAILConfig
from priors.pixels import CNN, SNAIL, pixel_inputs, pixel_prior


def assert_refused(model, message, **changes):
    inputs = {**pixel_inputs(model.config), **changes}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(3, 7, dtype=torch.long),
        torch.zeros(3, 24, dtype=torch.long),
        torch.zeros(3, 0, dtype=torch.long),
        torch.zeros(3, 5, 4, dtype=torch.long),
        torch.zeros(20, dtype=torch.long),
    ],
    ids=["part_of_a_row", "too_many_rows", "none", "map", "no_batch"],
)
def test_codes_that_are_no_rows(codes):
    shape = str(tuple(codes.shape)).replace("(", r"\(").replace(")", r"\)")
    message = rf"`codes` must have the shape \(batch, n\) with 1 to 5 whole rows of 4 codes.*\(5, 4\), got {shape}"
    assert_refused(pixel_prior("cnn"), message, codes=codes)


@pytest.mark.parametrize("kind", ["cnn", "snail"])
def test_codes_out_of_range(kind):
    model = pixel_prior(kind)
    codes = pixel_inputs(model.config)["codes"]
    codes[1, 2] = 11
    assert_refused(model, r"`codes` must be in \[0, 11\), got values from 0 to 11", codes=codes)
    codes[1, 2] = -1
    assert_refused(model, r"`codes` must be in \[0, 11\), got values from -1 to 10", codes=codes)
    assert_refused(model, "`codes` must be integers in a tensor, got torch.float32", codes=codes.float())


def test_condition_codes():
    model = pixel_prior("snail_fine")
    message = r"`condition_codes` must have the shape \(batch, 6\).*\(2, 3\) for map_size=\(4, 6\), got "
    assert_refused(model, message + "None", condition_codes=None)
    assert_refused(model, message + r"\(3, 7\)", condition_codes=torch.zeros(3, 7, dtype=torch.long))
    assert_refused(model, message + r"\(3, 2, 3\)", condition_codes=torch.zeros(3, 2, 3, dtype=torch.long))
    codes = pixel_inputs(model.config)["condition_codes"]
    assert_refused(model, r"`condition_codes` must be in \[0, 7\), got values from 4 to 9", condition_codes=codes + 3)
    for kind in ("snail", "cnn"):
        assert_refused(pixel_prior(kind), "`condition_codes` must be None", condition_codes=codes)


def test_class_labels():
    model = pixel_prior("cnn")
    message = r"`class_labels` must be in \[0, 4\) without an unconditional class, got "
    for labels in ([0, 4, 1], [0, -1, 1], [0, -2, 1]):
        assert_refused(model, message, class_labels=torch.tensor(labels))
    assert_refused(model, r"`class_labels` must have the shape \(batch,\) for 4 classes, got None", class_labels=None)
    assert_refused(model, r"for 4 classes, got \(3, 1\)", class_labels=torch.zeros(3, 1, dtype=torch.long))
    message = r"`class_labels` must be in \[0, 4\), or -1 or 4 for unconditional, got values from "
    for kind in ("cnn_dropped_classes", "snail_classes"):
        for label, found in ((5, "0 to 5"), (-2, "-2 to 1")):
            assert_refused(pixel_prior(kind), message + found, class_labels=torch.tensor([0, label, 1]))
    for kind in ("cnn_unconditional", "snail"):
        assert_refused(pixel_prior(kind), r"must be in \[0, 0\), or -1 or 0", class_labels=torch.tensor([0, 1, 0]))


def test_batches_and_labels():
    model = pixel_prior("snail_fine_classes")
    inputs = pixel_inputs(model.config)
    message = r"same batch size, got \{'codes': 3, 'class_labels': 2, 'condition_codes': 3\}"
    assert_refused(model, message, class_labels=inputs["class_labels"][:2])
    message = r"`labels` must have the shape \(batch, 36\), got \(3, 35\)"
    assert_refused(model, message, labels=inputs["codes"][:, 1:])
    assert_refused(model, r"`labels` must be in \[0, 11\), or -100", labels=inputs["codes"] + 11)


@pytest.mark.parametrize("name", ["codes", "class_labels", "condition_codes", "labels"])
def test_integers_of_other_types_are_the_same_and_all_else_is_refused(name):
    model = pixel_prior("snail_fine_classes")
    inputs = pixel_inputs(model.config)
    inputs["labels"] = inputs["codes"]
    expected = model(**inputs)
    others = model(**inputs | {name: inputs[name].to(torch.int16)})
    assert torch.equal(others.logits, expected.logits)
    assert others.loss == expected.loss
    for wrong in (inputs[name].float(), inputs[name] > 0, inputs[name].tolist(), "3", 1.0):
        assert_refused(model, f"`{name}` must be integers in a tensor, got", **inputs | {name: wrong})


def test_caches_of_another_kind():
    for wrong in (True, {}, torch.zeros(2)):
        assert_refused(pixel_prior("cnn"), "`cache` must be a `RowCache`, got", cache=wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"map_size": 0}, r"`map_size` must be a positive integer or a \(height, width\) pair of them, got 0"),
        ({"map_size": (2, 3, 4)}, r"`map_size` must be .*, got \(2, 3, 4\)"),
        ({"map_size": (2, True)}, r"`map_size` must be .*, got \(2, True\)"),
        ({"codebook_size": 0}, "`codebook_size` must be an integer, at least 1, got 0|at least 1, got 0"),
        ({"hidden_size": -1}, "`hidden_size` must be .*at least 1, got -1"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be .*at least 1, got 0"),
        ({"kernel_size": 4}, "`kernel_size` must be an odd integer of at least 3, got 4"),
        ({"first_kernel_size": 1}, "`first_kernel_size` must be an odd integer of at least 3, got 1"),
        ({"class_dropout_prob": 1.0}, "`class_dropout_prob` must be .*below 1, got 1.0"),
        ({"num_labels": -1}, "`num_labels` must be .*at least 0, got -1"),
        ({"num_labels": 10**30}, "`num_labels` must be from 0 to 1048576, got 1000"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "`num_labels` is 3 but `id2label` names 1 labels"),
    ],
    ids=str,
)
def test_pixelcnn_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        PixelCNNConfig(**{**CNN, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": 2}, "`kernel_size` must be an odd integer of at least 3, got 2"),
        ({"hidden_size": 18}, "`hidden_size` must be a multiple of twice `num_attention_heads`, got 18 and 2"),
        ({"condition_map_size": (2, 4)}, r"must divide `map_size` on both sides, got \(2, 4\) and \(4, 6\)"),
        ({"condition_map_size": 0}, "`condition_map_size` must be a positive integer or a"),
        ({"dropout": 1}, "`dropout` must be .*below 1, got 1"),
        ({"num_output_res_blocks": -1}, "`num_output_res_blocks` must be .*at least 0, got -1"),
        ({"condition_codebook_size": 0}, "`condition_codebook_size` must be .*at least 1, got 0"),
    ],
    ids=str,
)
def test_pixelsnail_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        PixelSNAILConfig(**{**SNAIL, **fields})


def test_widths_without_attention_need_no_heads():
    assert PixelSNAILConfig(**{**SNAIL, "hidden_size": 18, "attention": False}).hidden_size == 18
