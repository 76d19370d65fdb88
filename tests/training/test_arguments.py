# SPDX-License-Identifier: Apache-2.0
"""Recipes and command lines."""

from dataclasses import fields
from pathlib import Path

import pytest

from hf_var import VARConfig, VQVAEConfig
from hf_var.training.arguments import TrainingArguments, given_config_fields, parse_arguments, with_config_fields


REQUIRED = ["--train_data", "images", "--output_dir", "output"]
Arguments = with_config_fields(TrainingArguments, VARConfig)


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_overrides_recipe_overrides_default(tmp_path: Path) -> None:
    # YAML reads 1e-3 as a word, and every value here stands for one kind of argument.
    recipe = write_recipe(
        tmp_path,
        "train_data: images\noutput_dir: output\nlearning_rate: 1e-3\nseed: 5\npatch_nums: [1, [2, 3], 4]\n"
        "push_to_hub: true\nqk_norm: false\nvalidation_data:\nmlp_ratio: 2\n",
    )
    args = parse_arguments(Arguments, [recipe, "--seed", "7", "--mlp_ratio", "3", "--shared_adaln"])
    assert (args.learning_rate, args.seed, args.push_to_hub, args.validation_data) == (1e-3, 7, True, None)
    assert args.max_train_steps == TrainingArguments(train_data="", output_dir="").max_train_steps
    assert given_config_fields(args, VARConfig) == {
        "patch_nums": [1, [2, 3], 4],
        "mlp_ratio": 3.0,
        "qk_norm": False,
        "shared_adaln": True,
    }


def test_a_list_on_the_command_line_replaces_that_of_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "patch_nums: [1, 2, 3, 4]\n")
    args = parse_arguments(Arguments, [recipe, *REQUIRED, "--patch_nums", "1", "2x3"])
    assert given_config_fields(args, VARConfig) == {"patch_nums": [1, [2, 3]]}


@pytest.mark.parametrize("config_class", [VQVAEConfig, VARConfig])
def test_every_field_of_the_config_is_an_argument(config_class: type) -> None:
    own = set(vars(config_class)["__annotations__"])
    arguments = {field.name for field in fields(with_config_fields(TrainingArguments, config_class))}
    assert own <= arguments
    args = parse_arguments(with_config_fields(TrainingArguments, config_class), REQUIRED)
    assert given_config_fields(args, config_class) == {}


@pytest.mark.parametrize(
    ("recipe", "command_line", "message"),
    [
        ("learning_rat: 1", REQUIRED, "'learning_rat' in the recipe.*learning_rate"),
        ("", [*REQUIRED, "--hidden_sizes", "3"], "'hidden_sizes' in the command line.*hidden_size"),
        ("", [*REQUIRED, "--learning", "3"], "'learning' in the command line"),
        ("", [*REQUIRED, "--seed", "3", "4"], "'4' that belongs to no argument"),
        ("- 3", REQUIRED, "key: value"),
        ("ema_decay: 1.0", REQUIRED, "ema_decay.*got 1.0"),
        ("max_train_steps: 0", REQUIRED, "max_train_steps.*got 0"),
        ("mixed_precision: fp8", REQUIRED, "mixed_precision.*'fp8'"),
    ],
)
def test_bad_arguments_are_named(recipe: str, command_line: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(Arguments, [write_recipe(tmp_path, recipe), *command_line])


def test_missing_recipe_and_bad_size_are_named() -> None:
    with pytest.raises(ValueError, match="'recipe.yml' is not a file"):
        parse_arguments(Arguments, ["recipe.yml", *REQUIRED])
    args = parse_arguments(Arguments, [*REQUIRED, "--patch_nums", "1", "2by3"])
    with pytest.raises(ValueError, match="2by3"):
        given_config_fields(args, VARConfig)
