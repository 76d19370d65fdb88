# SPDX-License-Identifier: Apache-2.0
"""Power laws, from logs whose laws are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import load_script, run_script


SCRIPT = "examples/fit_scaling_laws.py"
script = load_script(SCRIPT)
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
    return [script.read_scaling_run(write_run(tmp_path / f"run-{size}", size)) for size in SIZES]


def test_laws_of_the_parameters_are_recovered(runs) -> None:
    laws = {entry.figure: entry for entry in script.fit_scaling_laws(runs[::-1]) if entry.axis == "parameters"}
    assert laws.keys() == script.FIGURES.keys()
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
        runs.append(script.read_scaling_run(write_log(tmp_path / str(size), lines)))
    laws = {entry.figure: entry for entry in script.fit_scaling_laws(runs) if entry.axis == "compute"}
    for figure, expected in COMPUTE_LAWS.items():
        assert [x for x, _ in laws[figure].points] == pytest.approx(sorted(on_law))
        assert (laws[figure].law.prefactor, laws[figure].law.exponent) == pytest.approx(expected, rel=1e-8)


def test_a_fit_is_the_least_squares_line_of_the_logarithms() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(0.01, 100, 20)
    y = (3 * x) ** -0.3 * np.exp(0.1 * generator.standard_normal(20))
    law = script.fit_power_law(list(zip(x.tolist(), y.tolist(), strict=True)))
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    assert law.exponent == pytest.approx(slope)
    assert law.prefactor == pytest.approx(np.exp(intercept / slope))
    assert law.correlation == pytest.approx(np.corrcoef(np.log(x), np.log(y))[0, 1])
    assert -0.99 < law.correlation < -0.9


@pytest.mark.parametrize("points", [[(1, 2), (2, 2), (3, 2)], [(1, 2), (1, 3)], [(1, 2)], [(1, 2), (2, 1), (4, 2)]])
def test_points_without_a_trend_are_refused(points) -> None:
    with pytest.raises(ValueError, match="`points` must have different x, and y that rise or fall"):
        script.fit_power_law(points)


def test_a_prefactor_too_large_for_a_number_is_no_error() -> None:
    law = script.fit_power_law([(1.0, 100.0), (2.0, 100.0 * 2**0.001)])
    assert law.prefactor == math.inf
    assert law(4.0) == pytest.approx(100.0 * 4**0.001)


def test_pareto_front() -> None:
    points = [(3, 1.0), (1, 5.0), (2, 6.0), (2, 4.0), (3, 2.0), (4, 1.0), (5, 0.5)]
    assert script.pareto_front(points) == [(1, 5.0), (2, 4.0), (3, 1.0), (5, 0.5)]
    assert script.pareto_front([]) == []


def test_log_may_be_named_itself_and_have_one_scale(tmp_path) -> None:
    line = {
        "validation_loss": 2.0,
        "validation_loss_0": 2.0,
        "validation_accuracy": 0.25,
        "validation_accuracy_0": 0.25,
    }
    folder = write_log(tmp_path / "run", [head(), {"step": 5, **line}])
    run = script.read_scaling_run(folder / "train_log.jsonl")
    assert run == script.read_scaling_run(str(folder))
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
    run = script.read_scaling_run(write_log(tmp_path, [head(), line]))
    assert run.figures["last_scale_loss"] == [11.0]
    assert run.figures["last_scale_error_rate"] == [0.9]


GOOD = validation(1, dict.fromkeys(script.FIGURES, 0.5))


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
        script.read_scaling_run(write_log(tmp_path, lines))


@pytest.mark.parametrize(
    ("ending", "message"), [('{"step": 7, "lo', "Line 5 of .* no JSON"), ('{"step": 7}', "Line 5 of .* no whole line")]
)
def test_a_line_that_was_cut_off_is_refused(tmp_path, ending, message) -> None:
    log = write_run(tmp_path / "run") / "train_log.jsonl"
    log.write_text(log.read_text() + ending)
    with pytest.raises(ValueError, match=message):
        script.read_scaling_run(log)


def test_a_folder_without_a_log_is_refused(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"`runs` must be folders with a train_log.jsonl"):
            script.read_scaling_run(path)


def test_runs_that_cannot_be_compared_are_refused(tmp_path, runs) -> None:
    for name, value in (("tokenizer", "other"), ("length", 5), ("validation_data", "birds")):
        other = script.read_scaling_run(write_run(tmp_path / "other", **{name: value}))
        with pytest.raises(ValueError, match=f"same {name} to be compared, got .*'other': {value!r}"):
            script.fit_scaling_laws([*runs, other])
    line = {key: value for key, value in GOOD.items() if not key.endswith("_1")}
    other = script.read_scaling_run(write_log(tmp_path / "other", [head(), line]))
    with pytest.raises(ValueError, match="same number of scales to be compared, got .*'other': 1"):
        script.fit_scaling_laws([*runs, other])


def test_three_sizes_are_needed_and_runs_of_one_size_are_no_three(tmp_path, runs) -> None:
    again = script.read_scaling_run(write_run(tmp_path / "again"))
    for given in ([], runs[:2], [*runs[:2], again]):
        with pytest.raises(ValueError, match="at least 3 different sizes"):
            script.fit_scaling_laws(given)
    laws = script.fit_scaling_laws([*runs[:3], again])
    assert laws[0].law.num_points == 4
    assert laws[0].law.exponent == pytest.approx(PARAMETER_LAWS["loss"][1])


def test_larger_models_that_are_worse_leave_no_envelope(tmp_path) -> None:
    worse = [
        script.read_scaling_run(
            write_log(tmp_path / str(size), [head(size), validation(1, dict.fromkeys(script.FIGURES, size / 1e9))])
        )
        for size in SIZES
    ]
    with pytest.raises(ValueError, match="leave 1 points on the lower envelope of the loss, all tokens"):
        script.fit_scaling_laws(worse)
    same = [
        script.read_scaling_run(
            write_log(tmp_path / str(size), [head(size), validation(1, dict.fromkeys(script.FIGURES, 0.5))])
        )
        for size in SIZES
    ]
    with pytest.raises(ValueError, match="loss, all tokens of `runs` has no power law in parameters"):
        script.fit_scaling_laws(same)


def test_table_and_json_say_the_same(runs) -> None:
    laws = script.fit_scaling_laws(runs)
    lines = script.scaling_table(laws).splitlines()
    assert lines[0].split() == ["figure", "against", "law", "correlation", "points"]
    assert "(2.5 N)^-0.2000" in lines[1]
    assert lines[1].split()[-2:] == ["-1.0000", "4"]
    assert len(lines) == 2 + len(laws) == 10
    figures = json.loads(json.dumps(script.scaling_json(runs, laws), allow_nan=False))
    assert [run["num_parameters"] for run in figures["runs"]] == list(SIZES)
    assert figures["runs"][0]["loss"] == runs[0].figures["loss"]
    found = {(law["axis"], law["figure"]): law for law in figures["laws"]}
    assert len(found) == 8
    law = found["parameters", "last_scale_loss"]
    assert (law["prefactor"], law["exponent"]) == pytest.approx(PARAMETER_LAWS["last_scale_loss"])
    assert law["points"] == [[size / 1e9, pytest.approx(power((2.0, -0.23), size / 1e9))] for size in SIZES]


def test_plot_shows_points_curves_and_laws(runs, tmp_path) -> None:
    laws = script.fit_scaling_laws(runs)
    figure = script.scaling_plot(runs, laws)
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


# --------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def trained(tmp_path):
    """Logs of trainings whose validation loss is `(2 N)^-0.25`, N in billions, and `(1e-3 C)^-0.1`, C in PFLOP."""
    folders = []
    for size in (2_000_000, 8_000_000, 50_000_000):
        # Compute for which both laws hold at the end, of which half is spent at the first validation.
        compute = 1e3 * (2 * size / 1e9) ** 2.5
        lines = [{"step": 0, "num_parameters": size, "flops_per_step": compute / 2 * 1e15}]
        for step in (1, 2):
            loss = (1e-3 * compute * step / 2) ** -0.1
            names = ("validation_loss", "validation_loss_0", "validation_loss_1")
            figures = dict.fromkeys(names, loss) | {name.replace("loss", "accuracy"): 1 - loss / 10 for name in names}
            lines.append({"step": step, **figures})
        folder = tmp_path / f"run-{size}"
        folder.mkdir()
        (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(str(folder))
    return folders


def test_the_script_writes_the_plot_and_the_figures(trained, tmp_path, capsys):
    output = tmp_path / "new" / "scaling.png"
    script.main([*trained, "--output", str(output), "--json", str(tmp_path / "other" / "laws.json")])
    printed = capsys.readouterr().out
    assert "loss, all tokens        parameters  (2 N)^-0.2500" in printed
    assert "loss, all tokens        compute     (0.001 C)^-0.1000" in printed
    assert f"wrote {output}" in printed
    assert Image.open(output).size[0] > 500
    laws = json.loads((tmp_path / "other" / "laws.json").read_text())["laws"]
    found = {(law["figure"], law["axis"]): law["exponent"] for law in laws}
    assert found["loss", "parameters"] == pytest.approx(-0.25)
    assert found["last_scale_error_rate", "compute"] == pytest.approx(-0.1)


def test_the_script_runs_by_itself(trained, tmp_path):
    run_script(SCRIPT, *trained, "--output", str(tmp_path / "scaling.pdf"))
    assert (tmp_path / "scaling.pdf").stat().st_size > 0


def test_bad_input_writes_nothing(trained, tmp_path):
    for runs, output, message in (
        (trained[:2], "scaling.png", "at least 3 different sizes"),
        ([*trained, str(tmp_path)], "scaling.png", "train_log.jsonl"),
        (trained, "scaling.xyz", "--output must be a picture file"),
        (trained, "scaling", "--output must be a picture file"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main([*runs, "--output", str(tmp_path / output)])
        assert not (tmp_path / output).exists()
