# SPDX-License-Identifier: Apache-2.0
"""The session for a GPU: its jobs run with tiny models on a CPU, and whatever goes wrong leaves the other rows."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Prints, leaves a record and half of another, and starts a process in a session of its own, as torchrun does.
HANGS = """
import subprocess, sys, time
with open(sys.argv[1], "w") as records:
    records.write('{"row": 1}\\n{"ro')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(300)
"""
FAILS = """
import subprocess, sys
script = "raise ValueError('the reason')"
subprocess.run([sys.executable, "-c", script], check=True)
"""
# As torchrun shows the error of one of its processes.
FAILS_BELOW = FAILS.replace("raise ValueError('the reason')", "print('[rank0]: ValueError: the reason'); exit(1)")


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    """The script finds what it is made of beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def session() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_session", BENCHMARKS / "gpu_session.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(session, tmp_path):
    return session.jobs.Settings(torch.device("cpu"), tiny=True, scratch=tmp_path)


def run_session(session: ModuleType, output: Path, *arguments: str) -> tuple[dict, str]:
    """The JSON file and the tables of a session with tiny models."""
    session.main(["--device", "cpu", "--tiny", "--output", str(output), *arguments])
    report = json.loads((output / "gpu_session.json").read_text(encoding="utf-8"))
    return report["jobs"], (output / "gpu_session.md").read_text(encoding="utf-8")


def check_sampling(rows: list[dict]) -> None:
    kinds = [(row["mode"], row["decoder"]) for row in rows]
    assert kinds == [("eager", "no"), ("eager", "yes"), ("compiled", "no"), ("compiled", "yes")]
    for row in rows:
        assert "error" not in row
        assert row["images_per_second"] == pytest.approx(1000 / row["ms_per_image"])
        assert row["floor_reached"] == pytest.approx(row["floor_ms_per_image"] / row["ms_per_image"])
        assert row["warm_up"] > 0
        assert row["peak"] > 0
    # What the decoder adds at least.
    assert rows[1]["floor_ms_per_image"] > rows[0]["floor_ms_per_image"]


def check_sharded(rows: list[dict]) -> None:
    first, resumed = rows
    assert first["steps"] == 4
    assert resumed["steps"] == 1
    assert resumed["losses"] == first["losses"][3:]
    assert resumed["loss_error"] == 0
    assert all(math.isfinite(row["step_ms"]) and row["step_ms"] > 0 for row in rows)


def test_a_session_with_tiny_models(session, tmp_path, capsys):
    jobs, text = run_session(session, tmp_path, "--jobs", "sampling_d16", "tests", "fsdp2")
    assert capsys.readouterr().out.strip() == text.strip()
    assert {name: job["outcome"] for name, job in jobs.items()} == dict.fromkeys(jobs, "done"), text
    machine, *rows = jobs["sampling_d16"]["records"]
    assert machine["limits"]["flops"]["bfloat16"] > 0
    check_sampling(rows)
    assert [row["outcome"] for row in jobs["tests"]["records"]] == [
        "passed" if torch.accelerator.is_available() else "skipped"
    ]
    check_sharded(jobs["fsdp2"]["records"])
    for title in ("Sampling, d16", "Tests that need a GPU", "FSDP2 on one card, d16"):
        assert f"\n## {title}\n" in text


@pytest.mark.slow
def test_all_jobs_with_tiny_models(session, tmp_path):
    jobs, text = run_session(session, tmp_path)
    assert {name: job["outcome"] for name, job in jobs.items()} == dict.fromkeys(session.JOBS, "done"), text
    assert not [record for job in jobs.values() for record in job["records"] if record.get("error")]


def test_training_goes_on_with_the_fastest_batch_size_compiled(session, settings, fresh_compiler):
    records = []
    session.JOBS["training"].run(settings, records.append)
    _, eager, compiled = records
    assert (eager["mode"], compiled["mode"]) == ("eager", "compiled")
    for row in (eager, compiled):
        assert "error" not in row
        assert row["batch_size"] == 2
        # The tokens of 1, 2 x 2 and 4 x 4 places.
        assert row["tokens_per_second"] == pytest.approx(2 * 21 / row["median"])
        assert row["utilisation"] is None


@pytest.mark.parametrize(("batch_size", "expected"), [(128, True), (192, False)])
def test_a_batch_that_does_not_fit_is_not_tried(session, monkeypatch, batch_size, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100e9))
    device = torch.device("cuda")
    assert session.jobs.fits(device, {"batch_size": 64, "peak": 40.0}, batch_size) is expected
    assert not session.jobs.fits(device, {"batch_size": 64, "error": "OutOfMemoryError"}, batch_size)


def test_memory_has_the_columns_of_its_table(session, settings):
    records = []
    job = session.JOBS["memory"]
    job.run(settings, records.append)
    (row,) = records
    assert "error" not in row
    assert 0 < row["weights"] < row["before"] <= row["peak"]
    assert {field for _, field, _ in job.columns} - row.keys() == {"error"}


def test_an_error_is_a_row_and_the_next_one_is_measured(session, settings, monkeypatch):
    make = session.jobs.VARPipeline.compile

    def fail(pipe, **options):
        make(pipe, **options)
        pipe._compiled.steps[0] = lambda **inputs: torch.empty(2**60)

    monkeypatch.setattr(session.jobs.VARPipeline, "compile", fail)
    records = []
    session.JOBS["sampling_d16"].run(settings, records.append)
    rows = [record for record in records if "machine" not in record]
    errors = {(row["mode"], row["decoder"]): row.get("error", "") for row in rows}
    assert errors["eager", "no"] == errors["eager", "yes"] == ""
    for decoder in ("no", "yes"):
        assert errors["compiled", decoder].startswith("RuntimeError: ")
        assert "\n" not in errors["compiled", decoder]


def test_a_job_that_hangs_is_stopped_and_its_rows_stay(session, tmp_path):
    log, records, looks = tmp_path / "log", tmp_path / "records", []
    command = [sys.executable, "-c", HANGS, str(records)]
    start = time.monotonic()
    outcome = session.run_until(command, log, tmp_path, start + 3, lambda: looks.append(session.read_records(records)))
    assert outcome == "stopped"
    assert 3 <= time.monotonic() - start < 10
    assert session.read_records(records) == [{"row": 1}]
    assert looks[-1] == [{"row": 1}]
    assert not psutil.pid_exists(int(log.read_text()))


@pytest.mark.parametrize("script", [FAILS, FAILS_BELOW])
def test_a_job_that_fails_says_why(session, tmp_path, script):
    outcome = session.run_until([sys.executable, "-c", script], tmp_path / "log", tmp_path, time.monotonic() + 60)
    assert outcome == "failed: ValueError: the reason"


def test_what_there_is_no_time_for_is_not_run(session, tmp_path, monkeypatch):
    ended = []

    def run_job(command, log, folder, deadline, look):
        ended.append((command[command.index("--job") + 1], deadline - time.monotonic()))
        return "done"

    monkeypatch.setattr(session, "run_until", run_job)
    jobs, text = run_session(session, tmp_path, "--minutes", "0.5")
    assert {job["outcome"] for job in jobs.values()} == {"not run"}
    assert text.count("| not run |") == len(session.JOBS)
    # Six minutes hold the first two jobs, and the third one has what is left of its own.
    jobs, _ = run_session(session, tmp_path, "--minutes", "6")
    seconds = [job.seconds for job in session.JOBS.values()]
    assert [name for name, _ in ended][:3] == list(session.JOBS)[:3]
    assert ended[0][1] == pytest.approx(seconds[0], abs=1)
    # It has what the first one has left over.
    assert ended[1][1] == pytest.approx(seconds[0] + seconds[1], abs=1)
    assert max(left for _, left in ended) <= 360


def test_the_jobs_fill_twelve_minutes(session):
    assert sum(job.seconds for job in session.JOBS.values()) == 720
    assert all(job.least <= job.seconds for job in session.JOBS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--minutes", "0"], "`minutes` must be positive"), (["--jobs", "all"], "invalid choice")],
)
def test_wrong_arguments(session, arguments, message, capsys):
    with pytest.raises(SystemExit):
        session.main(arguments)
    assert message in capsys.readouterr().err
