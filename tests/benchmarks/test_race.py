# SPDX-License-Identifier: Apache-2.0
"""The race of the models: its arithmetic, and that it runs, through its command line."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Of the fake trainings below.
PER_STEP, FIXED = 0.05, 3.0


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    """The script finds what it is made of beside it, and so do the processes that it starts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def budget() -> ModuleType:
    from racing import budget

    return budget


def test_a_rate_goes_through_both_measurements(budget):
    rate = budget.fit((10, 4.0), (30, 5.0))
    assert rate.seconds_per_step == pytest.approx(0.05)
    assert rate.fixed == pytest.approx(3.5)
    assert rate.fixed + 30 * rate.seconds_per_step == pytest.approx(5.0)


@pytest.mark.parametrize("second", [(30, 3.9), (11, 5.0)], ids=["faster with more steps", "slower than without steps"])
def test_measurements_that_are_noise_give_a_rate_without_a_fixed_part(budget, second):
    assert budget.fit((10, 4.0), second) == budget.Rate(second[1] / second[0], 0.0)


def test_measurements_must_have_different_numbers_of_steps(budget):
    with pytest.raises(ValueError, match="got 10 and 10"):
        budget.fit((10, 4.0), (10, 5.0))


def test_the_steps_within_a_budget_fill_it(budget):
    rate = budget.Rate(PER_STEP, FIXED)
    steps = rate.steps_within(20.0)
    assert rate.fixed + rate.seconds_per_step * steps <= 20.0 < rate.fixed + rate.seconds_per_step * (steps + 1)
    assert rate.steps_within(1.0) == budget.FIRST_STEPS


def test_a_whole_training_corrects_the_seconds_per_step(budget):
    rate = budget.Rate(PER_STEP, FIXED)
    assert rate.after(100, 13.0) == budget.Rate(0.1, FIXED)
    # Nothing can be learned from a training that took less than its fixed part.
    assert rate.after(100, 2.0) == rate


@pytest.mark.parametrize("seconds", [10.0, 100.0, 1000.0])
def test_calibration_finds_the_rate_by_trainings_that_are_short(budget, seconds):
    measured = []

    def measure(steps: int) -> float:
        measured.append(steps)
        return FIXED + PER_STEP * steps

    rate = budget.calibrate(measure, seconds)
    assert rate.seconds_per_step == pytest.approx(PER_STEP)
    assert rate.fixed == pytest.approx(FIXED)
    assert len(measured) <= 3
    target = min(budget.CALIBRATION_SHARE * seconds, budget.MOST_CALIBRATION_SECONDS)
    # The steps of the longest one take the time that a calibration may take, or as many as are measured at least.
    assert max(measured) == pytest.approx(max(10 + target / PER_STEP, 20), rel=0.6)


def test_the_schedule_keeps_its_proportions(budget):
    recipe = {"max_train_steps": "1000", "unquantized_steps": "200", "lr_warmup_steps": "50"}
    assert budget.schedule(recipe, 500) == {"max_train_steps": 500, "unquantized_steps": 100, "lr_warmup_steps": 25}
    assert budget.schedule(recipe, 2000) == {"max_train_steps": 2000, "unquantized_steps": 400, "lr_warmup_steps": 50}
    assert budget.schedule({"max_train_steps": "1000"}, 20) == {"max_train_steps": 20}
    # A tokenizer is quantized at the end, however short its training.
    short = budget.schedule(recipe, budget.FIRST_STEPS)
    assert 0 < short["unquantized_steps"] < short["max_train_steps"]


def test_core_seconds_are_those_of_all_parts():
    from racing.tables import core_seconds

    usage = {
        "first": {"seconds": 40.0},
        "codes": {"seconds": 5.0},
        "top": {"seconds": 20.0},
        "bottom": {"seconds": 36.0},
    }
    found = core_seconds(usage)
    assert found == {"seconds_first": 40.0, "seconds_codes": 5.0, "seconds_second": 56.0, "seconds": 101.0}
    assert core_seconds({"first": {"seconds": 100.0}})["seconds"] == 100.0


def test_a_cell_has_the_median_and_the_range():
    from racing.tables import cell

    results = [{"frechet": value} for value in (0.3, 0.1, 0.2)]
    assert cell(results, "frechet", ".1f") == "0.2 (0.1–0.3)"
    assert cell(results[:1], "frechet", ".0f", 100) == "30"
    assert cell([{"frechet": None}], "frechet", ".1f") == ""


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_every_entrant_can_be_trained_and_made_with_random_weights(data):
    from racing.entrants import DATA_SETS, ENTRANTS, find_entrants
    from racing.growth import random_sampler

    entrants = find_entrants(None, data)
    assert entrants == list(ENTRANTS)
    sizes = {}
    for entrant in entrants:
        sampler = random_sampler(DATA_SETS[data], entrant, 4)
        sizes[entrant.name] = sum(sampler.num_parameters)
        images = sampler.images([3], torch.Generator().manual_seed(0))
        assert images.shape == (1, 1 if data == "digits" else 3, 16, 16)
    # None has an advantage by its size alone.
    largest = max(sizes.values())
    assert all(size > largest / 2.5 for name, size in sizes.items() if name != "kl"), sizes


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_raster_order_has_a_block_for_every_token_of_its_tokenizer(data):
    from racing.entrants import find_entrants
    from racing.growth import recipe_fields

    (raster,) = find_entrants(["raster"], data)
    (side,) = recipe_fields(raster.tokenizer, data)["patch_nums"]
    assert recipe_fields(raster.priors[0], data)["block_sizes"] == [1] * side**2


def test_two_entrants_race_from_the_digits_to_the_tables(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_race", BENCHMARKS / "race.py")
    race = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(race)
    arguments = ["digits", "--output", str(tmp_path), "--entrants", "kl", "pixelcnn", "--steps", "6", "--copies", "2"]
    arguments += ["--num_samples", "50", "--tested", "50", "--sides", "4", "--rounds", "1"]
    race.main(arguments)
    table = capsys.readouterr().out
    with capsys.disabled():
        sys.stdout.write(f"\n{table}")

    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == [
        *("entrant", "---", "real training images", "PixelCNN", "KL autoencoder alone"),
        *("ms of a single image, by map", "---", "PixelCNN", "KL autoencoder alone"),
    ]
    assert len({line.count("|") for line in lines[:5]}) == 1
    usage = json.loads((tmp_path / "seed0/pixelcnn.usage.json").read_text())
    assert usage.keys() == {"first", "codes", "pixelcnn"}
    assert all(part["seconds"] > 0 for part in usage.values())
    found = json.loads((tmp_path / "seed0/pixelcnn.evaluation.json").read_text())
    # Sixteen codes of 128: untrained, about seven bits each.
    assert 50 < found["bits"] < 200
    assert 0 <= found["recognised"] <= 1
    assert min(found[name] for name in ("frechet", "psnr", "milliseconds_batch", "milliseconds_single")) > 0
    without_classes = json.loads((tmp_path / "seed0/kl.evaluation.json").read_text())
    assert without_classes["bits"] is without_classes["recognised"] is None
    # What the training was given: the recipe, its steps, and no validation.
    recipe = yaml.safe_load((tmp_path / "seed0/pixelcnn.yaml").read_text())
    assert recipe["base"].endswith("pixelcnn_digits.yaml")
    assert (recipe["max_train_steps"], recipe["validation_data"]) == (6, None)
    for picture in ("real.png", "seed0/kl.png", "seed0/pixelcnn.png", "samples.png"):
        assert len(Image.open(tmp_path / picture).getcolors(1 << 20)) > 10

    # What is there is not made again, and the tables are the same.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed0/*.evaluation.json")}
    race.main(arguments)
    assert capsys.readouterr().out == table
    race.main([*arguments, "--table"])
    assert capsys.readouterr().out == table
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    with pytest.raises(SystemExit, match="copies = 3, was 2"):
        race.main([*arguments, "--copies", "3"])
