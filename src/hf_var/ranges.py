# SPDX-License-Identifier: Apache-2.0
"""
Types of configuration fields that carry their ranges, and the function that checks them.

A field says what it accepts in its annotation, `steps: PositiveInt = 100`, and `check_fields` in the `__post_init__` of
its dataclass checks the value. Argument parsers see the plain type, since `typing.get_type_hints` leaves
annotations out. `checked` does the same for a single argument.
"""

import inspect
import math
import types
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Annotated, Any, Union, cast, get_args, get_origin


@dataclass(frozen=True)
class Interval:
    """Numbers from `minimum` to `maximum`; `above` and `below` are bounds that do not belong to it."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if (self.minimum, self.maximum) == (0, 1):
            return "a share from 0 to 1"
        if self.above == 0 and self.maximum is None and self.below is None:
            return "positive"
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum} to {self.maximum}"
        parts = [
            (self.minimum, "at least"),
            (self.above, "above"),
            (self.maximum, "at most"),
            (self.below, "below"),
        ]
        return " and ".join(f"{words} {bound}" for bound, words in parts if bound is not None)


@dataclass(frozen=True, init=False)
class OneOf:
    """One of a few values."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


PositiveInt = Annotated[int, Interval(minimum=1)]
NonNegativeInt = Annotated[int, Interval(minimum=0)]
PositiveFloat = Annotated[float, Interval(above=0)]
NonNegativeFloat = Annotated[float, Interval(minimum=0)]
# Of a whole.
Share = Annotated[float, Interval(minimum=0, maximum=1)]
# Of a whole, and less than all of it: what a dropout leaves out.
PartialShare = Annotated[float, Interval(minimum=0, below=1)]
# The weight of the past in a moving average; 1 would never move.
Decay = Annotated[float, Interval(minimum=0, below=1)]
# Of an image; Pillow itself refuses larger ones.
MOST_PIXELS = 178_956_970

_KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "a text"),
    dict: (dict, "a dictionary"),
}


def argument(default: Any = MISSING, *, help: str) -> Any:
    """A field of a configuration that is an argument of a command line, with its text in `--help`."""
    return field(default=default, metadata={"help": help})


class CheckedFields:
    """Base of dataclasses whose fields are checked against their annotations when an object is created."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(configuration: Any) -> None:
    """
    Check every field of a dataclass against its annotation: the kind of value and, where it is `Annotated` with an
    [`Interval`] or [`OneOf`], the range. Numbers of other libraries become Python's and sequences become lists, as JSON
    stores them.

    Raises:
        `ValueError`: For the first field that does not fit, with its name, its value and what is accepted.
    """
    # Not `get_type_hints`, which fails with annotations that transformers postpones. Its fields are its own affair.
    hints = ChainMap(*(inspect.get_annotations(base) for base in type(configuration).__mro__))
    for entry in fields(configuration):
        value, hint = getattr(configuration, entry.name), hints[entry.name]
        # A default of `None` is replaced later.
        if isinstance(hint, str) or (value is None and entry.default is None):
            continue
        fitting = checked(entry.name, value, hint)
        if fitting is not value:
            setattr(configuration, entry.name, fitting)


def own_annotations(config_class: type) -> dict[str, Any]:
    """Annotations of the fields that a configuration of ours and its bases of ours declare."""
    package = __name__.partition(".")[0]
    bases = [base for base in config_class.__mro__ if base.__module__.partition(".")[0] == package]
    # Mixins are no dataclasses.
    declaring = [base for base in reversed(bases) if "__dataclass_fields__" in vars(base)]
    return {name: hint for base in declaring for name, hint in inspect.get_annotations(base).items()}


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value`, in Python's own type, if it fits the annotation `hint`; otherwise a `ValueError` that names it `name`."""
    hint, is_optional = _without_none(hint)
    if value is None and is_optional:
        return None
    kind, *ranges = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) in (list, Sequence):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ValueError(f"`{name}` must be a list, got {value!r}.")
        return [checked(f"{name}[{place}]", element, get_args(kind)[0]) for place, element in enumerate(value)]
    return fitting(name, value, kind, *ranges)


def fitting(name: str, value: Any, kind: Any, *ranges: Any) -> Any:
    """`checked` for a single value, without the annotation, which torch cannot compile."""
    if kind in _KINDS:
        expected, words = _KINDS[kind]
        # A truth value counts as an integer in Python only.
        fits = isinstance(value, expected) and (kind is bool or not isinstance(value, bool))
        if not fits or (kind is float and not abs(cast(float, value)) < math.inf):
            raise ValueError(f"`{name}` must be {_description(words, ranges)}, got {value!r}.")
        if kind in (int, float) and type(value) is not int:
            value = cast(type[Any], kind)(value)
    for allowed in ranges:
        if value not in allowed:
            raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    return value


def _description(words: str, ranges: Sequence[Any]) -> str:
    """What a value of the wrong kind should have been: a range tells more than the kind alone."""
    if not ranges:
        return words
    return str(ranges[0]) if isinstance(ranges[0], OneOf) else f"{words}, {ranges[0]}"


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type of an optional field without `None`, and whether it is one."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    members = [member for member in get_args(hint) if member is not types.NoneType]
    return (members[0] if len(members) == 1 else Any), len(members) < len(get_args(hint))
