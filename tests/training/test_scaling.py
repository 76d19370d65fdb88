# SPDX-License-Identifier: Apache-2.0
"""Power laws, from logs whose laws are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import VARConfig, VARTransformer
from hf_var.training.pictures import scaling_plot
from hf_var.training.scaling import (
    FIGURES,
    fit_power_law,
    fit_scaling_laws,
    pareto_front,
    read_scaling_run,
    scaling_json,
    scaling_table,
    training_flops,
)


SIZES = (2_000_000, 5_000_000, 20_000_000, 60_000_000)
# Prefactor and exponent. The losses' are those of the paper.
PARAMETER_LAWS = {
    "loss": (2.5, -0.2),
    "last_scale_loss": (2.0, -0.23),
    "error_rate": (600.0, -0.1),
    "last_scale_error_rate": (4.9e4, -0.016),
}
COMPUTE_LAWS = {
    "loss": (1.5e-5, -0.16),
    "last_scale_loss": (2.2e-5, -0.13),
    "error_rate": (10.0, -0.1),
    "last_scale_error_rate": (2.0, -0.08),
}


def power(law: tuple[float, float], x: float) -> float:
    prefactor, exponent = law
    return (prefactor * x) ** exponent


def write_log(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def head(size: int = SIZES[0], **values) -> dict:
    return {"step": 0, "num_parameters": size, "flops_per_step": 1e3 * size**2, **values}


def validation(step: int, figures: dict[str, float]) -> dict:
    """A line of the log, of a model with two scales."""
    return {
        "step": step,
        "validation_loss": figures["loss"],
        "validation_loss_0": 1.0,
        "validation_loss_1": figures["last_scale_loss"],
        "validation_bits_per_token": figures["loss"] / math.log(2),
        "validation_accuracy": 1 - figures["error_rate"],
        "validation_accuracy_0": 0.5,
        "validation_accuracy_1": 1 - figures["last_scale_error_rate"],
    }


def write_run(folder: Path, size: int = SIZES[0], **values) -> Path:
    """A run whose last validation is on `PARAMETER_LAWS`, after a worse one."""
    final = {figure: power(law, size / 1e9) for figure, law in PARAMETER_LAWS.items()}
    worse = {figure: 1.001 * value for figure, value in final.items()}
    lines = [head(size, **values), {"step": 1, "loss": 3.0}, validation(1, worse), validation(2, final)]
    return write_log(folder, lines)


@pytest.fixture
def runs(tmp_path) -> list:
    return [read_scaling_run(write_run(tmp_path / f"run-{size}", size)) for size in SIZES]


def test_laws_of_the_parameters_are_recovered(runs) -> None:
    laws = {entry.figure: entry for entry in fit_scaling_laws(runs[::-1]) if entry.axis == "parameters"}
    assert laws.keys() == FIGURES.keys()
    for figure, expected in PARAMETER_LAWS.items():
        law = laws[figure].law
        assert (law.prefactor, law.exponent) == pytest.approx(expected, rel=1e-9)
        assert law.correlation == pytest.approx(-1, abs=1e-12)
        assert law.num_points == len(SIZES)
        assert [x for x, _ in laws[figure].points] == [size / 1e9 for size in SIZES]
        assert law(123.0) == pytest.approx(power(expected, 123.0))


def test_laws_of_the_compute_are_those_of_the_lower_envelope(tmp_path) -> None:
    runs, on_law = [], set()
    for size in SIZES:
        lines = [head(size)]
        # A validation before training costs nothing, which has no logarithm.
        lines.append(
            validation(0, {"loss": 9.0, "last_scale_loss": 9.0, "error_rate": 0.9, "last_scale_error_rate": 0.9})
        )
        for step in (10, 30, 100, 300):
            compute = step * 1e3 * size**2 / 1e15
            is_above = step in (30, 300)
            figures = {figure: power(law, compute) * (1.5 if is_above else 1) for figure, law in COMPUTE_LAWS.items()}
            lines.append(validation(step, figures))
            if not is_above:
                on_law.add(compute)
        runs.append(read_scaling_run(write_log(tmp_path / str(size), lines)))
    laws = {entry.figure: entry for entry in fit_scaling_laws(runs) if entry.axis == "compute"}
    for figure, expected in COMPUTE_LAWS.items():
        assert [x for x, _ in laws[figure].points] == pytest.approx(sorted(on_law))
        assert (laws[figure].law.prefactor, laws[figure].law.exponent) == pytest.approx(expected, rel=1e-8)


def test_a_fit_is_the_least_squares_line_of_the_logarithms() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(0.01, 100, 20)
    y = (3 * x) ** -0.3 * np.exp(0.1 * generator.standard_normal(20))
    law = fit_power_law(list(zip(x.tolist(), y.tolist(), strict=True)))
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    assert law.exponent == pytest.approx(slope)
    assert law.prefactor == pytest.approx(np.exp(intercept / slope))
    assert law.correlation == pytest.approx(np.corrcoef(np.log(x), np.log(y))[0, 1])
    assert -0.99 < law.correlation < -0.9


@pytest.mark.parametrize("points", [[(1, 2), (2, 2), (3, 2)], [(1, 2), (1, 3)], [(1, 2)], [(1, 2), (2, 1), (4, 2)]])
def test_points_without_a_trend_are_refused(points) -> None:
    with pytest.raises(ValueError, match="`points` must have different x, and y that rise or fall"):
        fit_power_law(points)


def test_a_prefactor_too_large_for_a_number_is_no_error() -> None:
    law = fit_power_law([(1.0, 100.0), (2.0, 100.0 * 2**0.001)])
    assert law.prefactor == math.inf
    assert law(4.0) == pytest.approx(100.0 * 4**0.001)


def test_pareto_front() -> None:
    points = [(3, 1.0), (1, 5.0), (2, 6.0), (2, 4.0), (3, 2.0), (4, 1.0), (5, 0.5)]
    assert pareto_front(points) == [(1, 5.0), (2, 4.0), (3, 1.0), (5, 0.5)]
    assert pareto_front([]) == []


def test_log_may_be_named_itself_and_have_one_scale(tmp_path) -> None:
    line = {
        "validation_loss": 2.0,
        "validation_loss_0": 2.0,
        "validation_accuracy": 0.25,
        "validation_accuracy_0": 0.25,
    }
    folder = write_log(tmp_path / "run", [head(), {"step": 5, **line}])
    run = read_scaling_run(folder / "train_log.jsonl")
    assert run == read_scaling_run(str(folder))
    assert (run.name, run.steps) == ("run", [5])
    assert run.figures == {
        "loss": [2.0],
        "last_scale_loss": [2.0],
        "error_rate": [0.75],
        "last_scale_error_rate": [0.75],
    }
    assert run.curve("loss") == [(5 * 1e3 * SIZES[0] ** 2 / 1e15, 2.0)]


def test_the_tenth_scale_comes_after_the_ninth(tmp_path) -> None:
    line = {"step": 1, "validation_loss": 2.0, "validation_accuracy": 0.25}
    line |= {f"validation_loss_{scale}": 1.0 + scale for scale in range(11)}
    line |= {f"validation_accuracy_{scale}": 0.01 * scale for scale in range(11)}
    run = read_scaling_run(write_log(tmp_path, [head(), line]))
    assert run.figures["last_scale_loss"] == [11.0]
    assert run.figures["last_scale_error_rate"] == [0.9]


GOOD = validation(1, dict.fromkeys(FIGURES, 0.5))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "first line .* `num_parameters`, got None"),
        ([GOOD], "first line .* `num_parameters`, got None"),
        ([head(0), GOOD], "first line .* `num_parameters`, got 0"),
        ([{"step": 0, "num_parameters": 5}, GOOD], "first line .* `flops_per_step`, got None"),
        ([head(), GOOD, {"step": 2, "flops_per_step": 7.0}], "`flops_per_step` changes"),
        ([head(), {"step": 1, "loss": 2.0}], "no `validation_loss`"),
        ([head(), {**GOOD, "step": 0}], "no `validation_loss`"),
        ([head(), {**GOOD, "validation_loss": math.nan}], "`validation_loss` .* at step 1 .* got nan"),
        ([head(), {"step": 1, "validation_loss": 2.0, "validation_accuracy": 0.1}], "`validation_loss_0` .* got None"),
        ([head(), {**GOOD, "validation_accuracy_1": 1.0}], "`validation_accuracy_1` .* got 1.0"),
        ([head(), {**GOOD, "validation_accuracy": None}], "`validation_accuracy` .* got None"),
        ([head(), GOOD, {"loss": 1.0}], "Line 3 of .* no whole line"),
        ([head(), GOOD, [1]], "Line 3 of .* no whole line"),
    ],
)
def test_logs_without_what_it_takes_are_refused(tmp_path, lines, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_scaling_run(write_log(tmp_path, lines))


@pytest.mark.parametrize(
    ("ending", "message"), [('{"step": 7, "lo', "Line 5 of .* no JSON"), ('{"step": 7}', "Line 5 of .* no whole line")]
)
def test_a_line_that_was_cut_off_is_refused(tmp_path, ending, message) -> None:
    log = write_run(tmp_path / "run") / "train_log.jsonl"
    log.write_text(log.read_text() + ending)
    with pytest.raises(ValueError, match=message):
        read_scaling_run(log)


def test_a_folder_without_a_log_is_refused(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"`runs` must be folders with a train_log.jsonl"):
            read_scaling_run(path)


def test_runs_that_cannot_be_compared_are_refused(tmp_path, runs) -> None:
    for name, value in (("tokenizer", "other"), ("length", 5), ("validation_data", "birds")):
        other = read_scaling_run(write_run(tmp_path / "other", **{name: value}))
        with pytest.raises(ValueError, match=f"same {name} to be compared, got .*'other': {value!r}"):
            fit_scaling_laws([*runs, other])
    line = {key: value for key, value in GOOD.items() if not key.endswith("_1")}
    other = read_scaling_run(write_log(tmp_path / "other", [head(), line]))
    with pytest.raises(ValueError, match="same number of scales to be compared, got .*'other': 1"):
        fit_scaling_laws([*runs, other])


def test_three_sizes_are_needed_and_runs_of_one_size_are_no_three(tmp_path, runs) -> None:
    again = read_scaling_run(write_run(tmp_path / "again"))
    for given in ([], runs[:2], [*runs[:2], again]):
        with pytest.raises(ValueError, match="at least 3 different sizes"):
            fit_scaling_laws(given)
    laws = fit_scaling_laws([*runs[:3], again])
    assert laws[0].law.num_points == 4
    assert laws[0].law.exponent == pytest.approx(PARAMETER_LAWS["loss"][1])


def test_larger_models_that_are_worse_leave_no_envelope(tmp_path) -> None:
    worse = [
        read_scaling_run(
            write_log(tmp_path / str(size), [head(size), validation(1, dict.fromkeys(FIGURES, size / 1e9))])
        )
        for size in SIZES
    ]
    with pytest.raises(ValueError, match="leave 1 points on the lower envelope of the loss, all tokens"):
        fit_scaling_laws(worse)
    same = [
        read_scaling_run(write_log(tmp_path / str(size), [head(size), validation(1, dict.fromkeys(FIGURES, 0.5))]))
        for size in SIZES
    ]
    with pytest.raises(ValueError, match="loss, all tokens of `runs` has no power law in parameters"):
        fit_scaling_laws(same)


def test_table_and_json_say_the_same(runs) -> None:
    laws = fit_scaling_laws(runs)
    lines = scaling_table(laws).splitlines()
    assert lines[0].split() == ["figure", "against", "law", "correlation", "points"]
    assert "(2.5 N)^-0.2000" in lines[1]
    assert lines[1].split()[-2:] == ["-1.0000", "4"]
    assert len(lines) == 2 + len(laws) == 10
    figures = json.loads(json.dumps(scaling_json(runs, laws), allow_nan=False))
    assert [run["num_parameters"] for run in figures["runs"]] == list(SIZES)
    assert figures["runs"][0]["loss"] == runs[0].figures["loss"]
    found = {(law["axis"], law["figure"]): law for law in figures["laws"]}
    assert len(found) == 8
    law = found["parameters", "last_scale_loss"]
    assert (law["prefactor"], law["exponent"]) == pytest.approx(PARAMETER_LAWS["last_scale_loss"])
    assert law["points"] == [[size / 1e9, pytest.approx(power((2.0, -0.23), size / 1e9))] for size in SIZES]


def test_plot_shows_points_curves_and_laws(runs, tmp_path) -> None:
    laws = fit_scaling_laws(runs)
    figure = scaling_plot(runs, laws)
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    size_panel, compute_panel = figure.axes[:2]
    points = [line for line in size_panel.lines if line.get_linestyle() == "None"]
    expected = [entry.points for entry in laws if entry.axis == "parameters" and "loss" in entry.figure]
    assert [list(map(tuple, line.get_xydata())) for line in points] == expected
    # Two runs' curves, the points and the line, each for all tokens and for the last scale.
    assert len(size_panel.lines) == 4
    assert len(compute_panel.lines) == 2 * (len(runs) + 2)
    assert list(map(tuple, compute_panel.lines[0].get_xydata())) == runs[0].curve("loss")
    assert "all tokens: (2.5 N)$^{-0.200}$, r = -1.000" in size_panel.get_legend_handles_labels()[1]
    figure.savefig(tmp_path / "scaling.png")
    assert np.asarray(Image.open(tmp_path / "scaling.png")).std() > 10


def flops_by_hand(config: VARConfig) -> int:
    """Three times the matrix products of a forward pass: two FLOPs for each multiplication and addition."""
    width, length, layers = config.hidden_size, config.length, config.num_hidden_layers
    inputs = (length - config.block_lengths[0]) * config.latent_channels * width
    attention = 4 * length * width**2 + 2 * length**2 * width
    mlp = 2 * length * width * round(config.mlp_ratio * width)
    # The class modulates all layers at once or each by itself, and the head.
    modulations = 6 * width**2 * (1 if config.shared_adaln else layers) + 2 * width**2
    head_products = length * width * config.codebook_size
    return 3 * 2 * (inputs + layers * (attention + mlp) + modulations + head_products)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_hidden_layers": 36, "hidden_size": 2304, "num_attention_heads": 36, "shared_adaln": True},
        {"num_labels": 0, "patch_nums": (1,), "hidden_size": 64, "num_attention_heads": 2, "mlp_ratio": 2.5},
        {
            "patch_nums": ((2, 3),),
            "block_sizes": [1] * 6,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "qk_norm": False,
        },
    ],
)
def test_flops_are_those_of_the_formula(fields) -> None:
    config = VARConfig(**fields)
    before = torch.get_rng_state()
    assert training_flops(config) == flops_by_hand(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_device() == torch.device("cpu")


def test_counting_flops_leaves_the_configuration_alone() -> None:
    sizes = {
        "num_labels": 3,
        "patch_nums": (1, 2),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = VARTransformer._from_config(VARConfig(**sizes), attn_implementation="sdpa")
    training_flops(model.config)
    assert model.config._attn_implementation == "sdpa"
