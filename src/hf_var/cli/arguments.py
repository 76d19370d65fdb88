# SPDX-License-Identifier: Apache-2.0
"""The command line of a script as a composition of configurations: `script.py [RECIPE.yaml] --key value ...`."""

import difflib
import inspect
import types
from collections.abc import Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin

from transformers import HfArgumentParser

from ..ranges import own_annotations


MAX_DEPTH = 8


def parse_arguments(configurations: Sequence[type], argv: Sequence[str], **texts: str) -> tuple[Any, ...]:
    """Read `[RECIPE.yaml] --key value ...`, which overrides the recipe, into one object of each dataclass."""
    usage = "%(prog)s [RECIPE.yaml] [--key value ...]"
    parser = _Parser(cast(Any, list(configurations)), allow_abbrev=False, usage=usage, **texts)
    known = {entry.name for configuration in configurations for entry in fields(configuration) if entry.init}
    arguments = list(argv)
    recipe_arguments: list[str] = []
    if arguments and not arguments[0].startswith("-"):
        recipe_arguments = _recipe_arguments(arguments.pop(0), known)
    # argparse keeps the last value of an argument that comes twice.
    arguments = recipe_arguments + arguments
    # Before the configurations are checked: what a wrong word was to set is missing there.
    for word in parser.parse_known_args(arguments)[1]:
        if word.startswith("--"):
            _raise_unknown(word[2:].split("=")[0], "the command line", known)
        raise ValueError(f"The command line has the value {word!r} that belongs to no argument.")
    parsed = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return tuple(parsed)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The arguments that a recipe sets, and those of its `base`, which is a path from the recipe's own folder."""
    recipe: dict[str, Any] = {}
    read: list[Path] = []
    following: Path | None = Path(path)
    while following is not None:
        if not following.is_file():
            raise ValueError(
                f"The recipe {str(following)!r} is not a file. The first argument is a recipe or begins with --."
            )
        if following.resolve() in read:
            raise ValueError(f"The recipe {str(following)!r} is its own `base`.")
        read.append(following.resolve())
        content = _read_yaml(following)
        base = content.pop("base", None)
        # What was read before changes what is read now.
        recipe = content | recipe
        following = None if base is None else following.parent / str(base)
    return recipe


def config_fields_class(*config_classes: type) -> type:
    """
    A dataclass of the fields that `PreTrainedConfig`s declare, or of the parameters that configure a model of diffusers,
    all `None` unless given; see [`given_fields`]. Classes may share fields of the same type.
    """
    arguments: dict[str, tuple[Any, dict[str, Any]]] = {}
    for config_class in config_classes:
        for name, (annotation, default) in _declared_fields(config_class).items():
            kind, text = _command_line_type(annotation), f"{config_class.__name__}; default: {default}"
            _, metadata = arguments.setdefault(name, (kind, {"nargs": "?", "const": True} if kind is bool else {}))
            metadata["help"] = f"{metadata['help']}. {text}" if "help" in metadata else text
    declared = [(name, kind | None, field(default=None, metadata=data)) for name, (kind, data) in arguments.items()]
    return make_dataclass(f"{config_classes[0].__name__}Fields", declared)


def _declared_fields(config_class: type) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each field."""
    if is_dataclass(config_class):
        defaults = {entry.name: entry.default for entry in fields(config_class)}
        return {name: (hint, defaults.get(name)) for name, hint in own_annotations(config_class).items()}
    parameters = inspect.signature(config_class).parameters
    return {name: (parameter.annotation, parameter.default) for name, parameter in parameters.items()}


def given_fields(configuration: Any) -> dict[str, Any]:
    """The fields of a [`config_fields_class`] object that recipe or command line set, as the configuration takes them."""
    given = {name: value for name, value in asdict(configuration).items() if value is not None}
    if "patch_nums" in given:
        given["patch_nums"] = [_parse_patch_num(entry) for entry in given["patch_nums"]]
    if len(given.get("image_size", ())) == 1:
        (given["image_size"],) = given["image_size"]
    return given


def public_arguments(*configurations: Any) -> dict[str, Any]:
    """All arguments that have a value, for a model card."""
    merged: dict[str, Any] = {}
    for configuration in configurations:
        merged |= asdict(cast(Any, configuration)) if is_dataclass(configuration) else configuration
    return {name: value for name, value in merged.items() if value not in (None, [])}


class _Parser(HfArgumentParser):
    """transformers' parser, which raises what it would print before it ends the program."""

    def error(self, message: str) -> Any:
        raise ValueError(f"The command line cannot be read: {message}. --help lists the arguments.")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    # As written: safe_load would read the text `no` as a truth value, and 1e-3 as a text. Aliases are refused, since a
    # few lines of them grow to gigabytes, and depth, since reading takes its square.
    try:
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise ValueError(
                    f"The recipe {str(path)!r} must not use YAML's aliases or more than {MAX_DEPTH} levels."
                )
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {str(path)!r} is not YAML: {error}") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"The recipe {str(path)!r} must be lines `key: value`, got {type(content).__name__}.")
    return {key: None if value in ("", "null", "~") else value for key, value in content.items()}


def _recipe_arguments(path: str, known: set[str]) -> list[str]:
    arguments = []
    for key, value in read_recipe(path).items():
        if key not in known:
            _raise_unknown(str(key), f"the recipe {path!r}", known)
        if isinstance(value, dict):
            raise ValueError(f"`{key}` in the recipe {path!r} must be a value or a list, got {value!r}.")
        if value is not None:
            words = value if isinstance(value, list) else [value]
            arguments += [f"--{key}", *("x".join(word) if isinstance(word, list) else word for word in words)]
    return arguments


def _raise_unknown(key: str, place: str, known: set[str]) -> None:
    near = difflib.get_close_matches(key, sorted(known), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else " --help lists the arguments."
    raise ValueError(f"Unknown argument {key!r} in {place}.{hint}")


def _command_line_type(annotation: Any) -> Any:
    """What one field of a config is on the command line: a scalar type, or a list of integers or of words."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(member for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) in (list, tuple, Sequence):
        element = get_args(annotation)[0]
        element = get_args(element)[0] if get_origin(element) is Annotated else element
        return list[element if element in (int, float, str) else str]
    return annotation


def _parse_patch_num(text: str) -> int | list[int]:
    try:
        sides = [int(side) for side in str(text).split("x")]
    except ValueError as error:
        raise ValueError(f"`patch_nums` must be sizes such as 4 or 2x3 (height x width), got {text!r}.") from error
    return sides[0] if len(sides) == 1 else sides
