# SPDX-License-Identifier: Apache-2.0
"""Fields that are held against their annotations."""

import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
import pytest
from transformers import HfArgumentParser, PreTrainedConfig

from hf_var import PixelSNAILConfig, VARConfig
from hf_var.ranges import (
    CheckedFields,
    Decay,
    Interval,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Share,
    check_fields,
    own_annotations,
)


@dataclass
class Example(CheckedFields):
    steps: PositiveInt = 1
    workers: NonNegativeInt = 0
    rate: PositiveFloat | None = None
    weight: NonNegativeFloat = 0.0
    share: Share = 0.5
    decay: Decay = 0.9
    angle: Annotated[float, Interval(minimum=-180, maximum=180)] = 0.0
    precision: Annotated[str, OneOf("no", "bf16")] = "no"
    name: str | None = None
    flip: bool = False
    sizes: list[PositiveInt] = field(default_factory=list)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 1),
        ("workers", 0),
        ("rate", None),
        ("rate", 3),
        ("weight", 0),
        ("share", 1),
        ("decay", 0.0),
        ("angle", -180),
        ("precision", "bf16"),
        ("name", None),
        ("name", ""),
        ("flip", True),
    ],
)
def test_fitting_values_are_taken_as_they_are(name: str, value: Any) -> None:
    assert getattr(Example(**{name: value}), name) is value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", np.int64(3), 3),
        ("workers", np.uint8(0), 0),
        ("rate", np.float32(0.5), 0.5),
        ("share", np.float64(0.5), 0.5),
        ("share", Fraction(1, 2), 0.5),
        ("weight", np.int32(2), 2.0),
        ("sizes", (1, 2), [1, 2]),
        ("sizes", (np.int64(1), np.uint8(2)), [1, 2]),
    ],
)
def test_values_become_those_that_json_stores(name: str, value: Any, expected: Any) -> None:
    taken = getattr(Example(**{name: value}), name)
    assert taken == expected
    assert json.dumps(taken) == json.dumps(expected)
    assert type(taken) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "`steps` must be at least 1, got 0."),
        ("steps", 2.0, "`steps` must be an integer, at least 1, got 2.0."),
        ("steps", "4", "`steps` must be an integer, at least 1, got '4'."),
        ("steps", True, "`steps` must be an integer, at least 1, got True."),
        ("steps", None, "`steps` must be an integer, at least 1, got None."),
        ("workers", -1, "`workers` must be at least 0, got -1."),
        ("rate", 0, "`rate` must be positive, got 0."),
        ("rate", math.nan, "`rate` must be a number, positive, got nan."),
        ("rate", math.inf, "`rate` must be a number, positive, got inf."),
        ("weight", -0.1, "`weight` must be at least 0, got -0.1."),
        ("share", 1.5, "`share` must be a share from 0 to 1, got 1.5."),
        ("decay", 1.0, "`decay` must be at least 0 and below 1, got 1.0."),
        ("angle", 181, "`angle` must be from -180 to 180, got 181."),
        ("precision", "fp8", "`precision` must be one of no, bf16, got 'fp8'."),
        ("precision", False, "`precision` must be one of no, bf16, got False."),
        ("name", 3, "`name` must be a text, got 3."),
        ("flip", "no", "`flip` must be true or false, got 'no'."),
        ("flip", 1, "`flip` must be true or false, got 1."),
        ("sizes", 5, "`sizes` must be a list, got 5."),
        ("sizes", "5", "`sizes` must be a list, got '5'."),
        ("sizes", b"5", "`sizes` must be a list, got b'5'."),
        ("sizes", {5}, "`sizes` must be a list, got {5}."),
        ("sizes", [1, np.float64(2)], "`sizes[1]` must be an integer, at least 1, got np.float64(2.0)."),
        ("angle", np.float32("nan"), "`angle` must be a number, from -180 to 180, got np.float32(nan)."),
        ("sizes", [1, 0], r"`sizes[1]` must be at least 1, got 0."),
    ],
)
def test_other_values_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Example(**{name: value})
    assert str(error.value) == message


def test_subclasses_are_checked_with_their_own_annotations() -> None:
    @dataclass
    class Narrower(Example):
        steps: PositiveInt | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    assert Narrower().steps is None
    with pytest.raises(ValueError, match="`weight` must be at least 0"):
        Narrower(weight=-1)


def test_own_annotations_are_those_of_our_classes() -> None:
    assert list(own_annotations(PixelSNAILConfig))[:4] == [
        "codebook_size",
        "map_size",
        "class_dropout_prob",
        "condition_map_size",
    ]
    assert "dtype" not in own_annotations(VARConfig)
    assert own_annotations(VARConfig)["hidden_size"] is PositiveInt


def test_argument_parsers_see_the_plain_types() -> None:
    (parsed,) = HfArgumentParser([Example]).parse_args_into_dataclasses(  # pyright: ignore[reportArgumentType]
        ["--steps", "3", "--rate", "1e-3", "--precision", "bf16", "--flip", "--sizes", "1", "2"]
    )
    assert parsed == Example(steps=3, rate=1e-3, precision="bf16", flip=True, sizes=[1, 2])


def test_fields_of_configurations_of_transformers_are_their_own_affair():
    class Model(PreTrainedConfig):
        depth: PositiveInt = 2

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            check_fields(self)

    assert Model(depth=3).depth == 3
    with pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        Model(depth=0)
