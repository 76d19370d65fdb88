# SPDX-License-Identifier: Apache-2.0
"""`hf-var schedule`: what it prints is what recipes take and what the library counts."""

import json

import pytest
import yaml

from hf_var import VARConfig
from hf_var.cli import main
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments
from hf_var.priors.costs import var_costs
from hf_var.schedules import propose_schedules


def test_its_line_is_a_recipe(tmp_path, capsys):
    assert main(["schedule", "--size", "192", "288", "--model", "d1"]) == 0
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("patch_nums: ")]
    assert len(lines) == 1
    expected = propose_schedules((192, 288), 16)[0].patch_nums
    assert yaml.safe_load(lines[0]) == {"patch_nums": expected}
    (tmp_path / "recipe.yaml").write_text(lines[0])
    (fields,) = parse_arguments([config_fields_class(VARConfig)], [str(tmp_path / "recipe.yaml")])
    assert given_fields(fields)["patch_nums"] == expected
    assert "a grid of 12x18" in output
    assert "Why: sides 1, 2, 3 and 4, then factors of 1.30" in output
    assert "7      7x11       77      169" in output
    assert "aspect ratio" in output


def test_costs_of_the_released_model(capsys):
    assert main(["schedule", "--size", "256"]) == 0
    output = capsys.readouterr().out
    assert "VAR was released with these sides for a grid of 16x16" in output
    assert "16 layers, 1024 wide: 310.3 M parameters, 1,241 MB in fp32 and 621 MB in bf16" in output
    # 2 x 16 layers x 680 tokens x 1024 wide x 2 and 4 bytes.
    assert "proposed         10       680      44.56      89.13     279.76" in output
    assert "aspect ratio" not in output


def test_json_holds_the_numbers(capsys):
    arguments = [
        "--image_size",
        "64",
        "--downsampling",
        "8",
        "--hidden_size",
        "128",
        "--layers",
        "3",
        "--tokens",
        "120",
    ]
    assert main(["schedule", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "shared_adaln": False}
    assert found["transformer"] == sizes
    expected = propose_schedules(64, 8, 120)
    assert [entry["patch_nums"] for entry in found["schedules"]] == [entry.patch_nums for entry in expected]
    assert found["schedules"][0]["num_tokens"] == sum(found["schedules"][0]["scale_lengths"]) == 94
    assert found["schedules"][0]["costs"] == vars(var_costs(VARConfig(patch_nums=expected[0].patch_nums, **sizes)))


def test_the_deepest_released_model_shares_its_modulations(capsys):
    assert main(["schedule", "--size", "64", "--model", "d36", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["transformer"]["shared_adaln"] is True
    # 2.3 B parameters, most of which do not depend on the tokens.
    assert 2.2e9 < found["schedules"][0]["costs"]["num_parameters"] < 2.4e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--size"),
        (["--size", "abc"], "'abc'"),
        (["--size", "0"], "got 0"),
        (["--size", "-16"], "got -16"),
        (["--size", "200", "288"], "192x288 or 208x288"),
        (["--size", "1", "2", "3"], "--size must be one number or a height and a width"),
        (["--size", "256", "--downsampling", "12"], "power of 2"),
        (["--size", "100000"], "178956970 pixels"),
        (["--size", "256", "--tokens", "300"], "at least 341"),
        (["--size", "256", "--model", "big"], "--model must be d and a number of layers"),
        (["--size", "256", "--model", "d0"], "--model"),
        (["--size", "256", "--model", "d129"], "from 1 to 128, got 129"),
        (["--size", "256", "--hidden-size", "100"], "multiple of 64"),
        (["--size", "256", "--hidden-size", "0"], "--hidden-size"),
        (["--size", "256", "--layers", "0"], "--layers"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["schedule", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-var schedule: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
