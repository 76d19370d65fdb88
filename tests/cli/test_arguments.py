# SPDX-License-Identifier: Apache-2.0
"""Recipes and command lines."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
from diffusers import AutoencoderKL

from hf_var import HierarchicalVQVAEConfig, VARConfig, VQVAEConfig
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, public_arguments, read_recipe
from hf_var.ranges import CheckedFields, Decay, OneOf, PositiveInt


@dataclass
class Data(CheckedFields):
    train_data: str
    validation_data: str | None = None
    push_to_hub: bool = False


@dataclass
class Optimization(CheckedFields):
    learning_rate: float = 3e-4
    max_train_steps: PositiveInt = 10
    ema_decay: Decay = 0.9
    mixed_precision: Annotated[str, OneOf("no", "fp16", "bf16")] = "bf16"
    seed: int = 0


Fields = config_fields_class(VARConfig)
REQUIRED = ["--train_data", "images"]


def write_recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def parse(*argv: str):
    return parse_arguments([Data, Optimization, Fields], argv)


def test_command_line_overrides_recipe_overrides_default(tmp_path: Path) -> None:
    # YAML itself reads 1e-3 as a text and `no` as a truth value.
    recipe = write_recipe(
        tmp_path,
        "train_data: images\nlearning_rate: 1e-3\nseed: 5\npatch_nums: [1, [2, 3], 4]\nmixed_precision: no\n"
        "push_to_hub: true\nqk_norm: false\nvalidation_data:\nmlp_ratio: 2\n",
    )
    data, optimization, model = parse(recipe, "--seed", "7", "--mlp_ratio", "3", "--shared_adaln")
    assert data == Data("images", push_to_hub=True)
    assert optimization == Optimization(learning_rate=1e-3, seed=7, mixed_precision="no")
    assert given_fields(model) == {
        "patch_nums": [1, [2, 3], 4],
        "mlp_ratio": 3.0,
        "qk_norm": False,
        "shared_adaln": True,
    }


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "null_text", "1e-3", "012", "2026-11-28", "0x10"])
def test_a_text_stays_as_it_is_written(word: str, tmp_path: Path) -> None:
    data, *_ = parse(write_recipe(tmp_path, f"train_data: {word}"))
    assert data.train_data == word


@pytest.mark.parametrize("nothing", ["", "null", "~"])
def test_nothing_in_a_recipe_is_the_default(nothing: str, tmp_path: Path) -> None:
    data, *_ = parse(write_recipe(tmp_path, f"validation_data: {nothing}\ntrain_data: images"))
    assert data.validation_data is None


def test_a_list_on_the_command_line_replaces_that_of_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "patch_nums: [1, 2, 3, 4]\n")
    *_, model = parse(recipe, *REQUIRED, "--patch_nums", "1", "2x3")
    assert given_fields(model) == {"patch_nums": [1, [2, 3]]}


@pytest.mark.parametrize("config_class", [VQVAEConfig, VARConfig])
def test_every_field_of_the_config_is_an_argument(config_class: type) -> None:
    arguments = config_fields_class(config_class)
    assert set(vars(config_class)["__annotations__"]) <= {entry.name for entry in fields(arguments)}
    *_, model = parse_arguments([Data, arguments], REQUIRED)
    assert given_fields(model) == {}


def test_the_parameters_of_a_constructor_are_arguments() -> None:
    arguments = config_fields_class(AutoencoderKL)
    assert {entry.name for entry in fields(arguments)} == set(inspect.signature(AutoencoderKL).parameters)
    command_line = [*REQUIRED, "--block_out_channels", "8", "16", "--act_fn", "relu", "--force_upcast", "no"]
    command_line += ["--scaling_factor", "2", "--down_block_types", "a", "b", "--latents_mean", "0.5"]
    *_, model = parse_arguments([Data, arguments], command_line)
    assert given_fields(model) == {
        "block_out_channels": [8, 16],
        "act_fn": "relu",
        "force_upcast": False,
        "scaling_factor": 2.0,
        "down_block_types": ["a", "b"],
        "latents_mean": [0.5],
    }


@pytest.mark.parametrize(
    ("recipe", "command_line", "message"),
    [
        ("learning_rat: 1", REQUIRED, "'learning_rat' in the recipe.*learning_rate"),
        ("", [*REQUIRED, "--hidden_sizes", "3"], "'hidden_sizes' in the command line.*hidden_size"),
        ("", [*REQUIRED, "--learning", "3"], "'learning' in the command line"),
        ("", [*REQUIRED, "--seed", "3", "4"], "'4' that belongs to no argument"),
        ("", [*REQUIRED, "--seed", "x"], "cannot be read: argument --seed: invalid int value: 'x'"),
        ("", [], "cannot be read: the following arguments are required: --train_data"),
        ("- 3", REQUIRED, "key: value"),
        ("seed: {a: 1}", REQUIRED, "`seed` in the recipe .* must be a value or a list"),
        ("seed: [1", REQUIRED, "is not YAML"),
        ("ema_decay: 1.0", REQUIRED, "`ema_decay` must be at least 0 and below 1, got 1.0"),
        ("max_train_steps: 0", REQUIRED, "`max_train_steps` must be at least 1, got 0"),
        ("mixed_precision: fp8", REQUIRED, "`mixed_precision` must be one of no, fp16, bf16, got 'fp8'"),
        ("a: &a [1, 1]\nseed: *a", REQUIRED, "must not use YAML's aliases"),
        ("seed: " + "[" * 100_000, REQUIRED, "must not use YAML's aliases or more than 8 levels"),
    ],
)
def test_bad_arguments_are_named(recipe: str, command_line: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse(write_recipe(tmp_path, recipe), *command_line)


def test_a_recipe_changes_its_base(tmp_path: Path) -> None:
    write_recipe(tmp_path, "seed: 1\nlearning_rate: 1", "first.yaml")
    write_recipe(tmp_path, "base: first.yaml\nseed: 2\nmlp_ratio: 2", "second.yaml")
    third = write_recipe(tmp_path, "base: second.yaml\nmlp_ratio: 3", "third.yaml")
    assert read_recipe(third) == {"seed": "2", "learning_rate": "1", "mlp_ratio": "3"}


def test_a_recipe_is_no_base_of_itself(tmp_path: Path) -> None:
    write_recipe(tmp_path, "base: second.yaml", "first.yaml")
    second = write_recipe(tmp_path, "base: first.yaml", "second.yaml")
    with pytest.raises(ValueError, match="is its own `base`"):
        read_recipe(second)


def test_missing_recipe_and_bad_size_are_named() -> None:
    with pytest.raises(ValueError, match="'recipe.yml' is not a file"):
        parse("recipe.yml", *REQUIRED)
    *_, model = parse(*REQUIRED, "--patch_nums", "1", "2by3")
    with pytest.raises(ValueError, match="2by3"):
        given_fields(model)


def test_fields_of_several_configurations_are_arguments_of_one_class() -> None:
    merged = config_fields_class(VQVAEConfig, HierarchicalVQVAEConfig)
    (given,) = parse_arguments(
        [merged], ["--strides", "8", "2", "--image_size", "48", "32", "--patch_nums", "1", "2x3"]
    )
    assert given_fields(given) == {"strides": [8, 2], "image_size": [48, 32], "patch_nums": [1, [2, 3]]}
    (given,) = parse_arguments(
        [merged], ["--image_size", "48", "--normalize_codebook", "--codebook_loss_weight", "0.5"]
    )
    assert given_fields(given) == {"image_size": 48, "normalize_codebook": True, "codebook_loss_weight": 0.5}
    help_of = {entry.name: entry.metadata["help"] for entry in fields(merged)}
    assert help_of["base_channels"] == "VQVAEConfig; default: 160. HierarchicalVQVAEConfig; default: 128"
    assert help_of["strides"] == "HierarchicalVQVAEConfig; default: (4, 2)"


def test_public_arguments_are_those_with_a_value() -> None:
    data, optimization, model = parse(*REQUIRED, "--mlp_ratio", "2")
    merged = public_arguments(data, optimization, given_fields(model), {"sizes": []})
    assert merged["train_data"] == "images"
    assert merged["mlp_ratio"] == 2.0
    assert "validation_data" not in merged
    assert "sizes" not in merged
