# SPDX-License-Identifier: Apache-2.0
"""
What only a GPU can tell, by one command in twelve minutes on one card: speed, memory, the tests that need a GPU, and FSDP2.

    python benchmarks/gpu_session.py --output outputs/gpu
    python benchmarks/gpu_session.py --output outputs/gpu --minutes 5 --jobs training fsdp2
    python benchmarks/gpu_session.py --output outputs/try --device cpu --tiny

The jobs run one after the other, the most important first, each in a process of its own. A job may use its time and what those
before it have left over; then it is stopped, and its rows until then are kept. A job that there is no time for is "not run". With
more than twelve minutes all have more. `gpu_session.md` and `gpu_session.json` are written anew all the time, and what a job
prints is in its `.log`. The last command tries all of it with tiny models on a CPU, whose numbers mean nothing.

Models have the published sizes and random weights, which cost as much as trained ones; nothing is downloaded. Times are
medians of a wall clock that waits for the device, sampling is guided and all of it in bf16.

- `compiled` is `pipe.compile()`, on CUDA with graphs that are replayed; in training, layers are compiled one by one.
- `decoder`: whether the time has pixels at its end, or the latents.
- `first calls`: seconds of the calls before the measured ones, in which kernels are chosen, compiled and recorded.
- `floor`: what the arithmetic at the rate of large products, or reading weights and cache once at that of the memory, takes at
  least, see RESULTS.md. Both rates are measured in the session; `floor reached` is the share of the time.
- `utilisation`: arithmetic of the model by the rate of the chip's data sheet, as utilisations are published. The figure to beat is
  50.4 k tokens/s and 22 % on an A100, by the training time of VAR-d16 that its authors state (issue 137 of their repository).
- `peak`: the most memory that torch had allocated from the first call on. What recorded graphs keep is only in part of it.
- `relative error of the loss`: of the steps after a checkpoint, between the training that wrote it and one that was resumed from it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import COLUMNS
from session import jobs
from session.processes import append_record, read_records, run_until
from session.sharded import train_sharded
from speed.report import LOSS_COLUMN, TOKENS_COLUMN, machine_text, write, write_table


NAME = "gpu_session"
ROOT = Path(__file__).parents[1]

Column = tuple[str, str, str]
MODE, BATCH, ERROR = ("", "mode", "{}"), ("batch", "batch_size", "{}"), ("error", "error", "{}")
FIRST_CALLS, PEAK = ("first calls, s", "warm_up", "{:.1f}"), ("peak, GB", "peak", "{:.2f}")
RATE, FLOOR = ("images/s", "images_per_second", "{:.4g}"), ("floor reached", "floor_reached", "{:.0%}")
SAMPLING = [MODE, BATCH, ("decoder", "decoder", "{}"), RATE, ("ms per image", "ms_per_image", "{:.4g}")]
SAMPLING += [("floor, ms", "floor_ms_per_image", "{:.3g}"), FLOOR, FIRST_CALLS, PEAK, ERROR]
TRAINING = [MODE, BATCH, ("step, s", "median", "{:.4g}"), TOKENS_COLUMN, RATE]
TRAINING += [("utilisation", "utilisation", "{:.1%}"), FLOOR, FIRST_CALLS, PEAK, ERROR]
TESTS: list[Column] = [(name, name, "{}") for name in ("passed", "failed", "skipped", "error")]
SHARDED = [("", "run", "{}"), ("steps", "steps", "{}"), ("step, ms", "step_ms", "{:.4g}"), TOKENS_COLUMN]
SHARDED += [("in all, s", "seconds", "{:.1f}"), LOSS_COLUMN]
MEMORY = [("model", "model", "{}"), *(column for column in COLUMNS if column[1] != "per_image"), ERROR]


@dataclass(frozen=True)
class Job:
    """
    A part of the session.

    Args:
        title (`str`): Heading of its table.
        run (`Callable`): What it does, in a process of its own.
        seconds (`float`): Its share of twelve minutes.
        least (`float`): With less it is not begun.
        columns (`list[tuple[str, str, str]]`): Header, field and form of its table.
        summarise (`Callable`, *optional*): Makes the rows of the table of what was recorded.
    """

    title: str
    run: Callable[[jobs.Settings, jobs.Emit], None]
    seconds: float
    least: float
    columns: list[Column]
    summarise: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list


# The most important first. Each scale is compiled, for each batch size, so that compilation is most of what sampling takes here.
JOBS = {
    "sampling_d16": Job("Sampling, d16", partial(jobs.measure_sampling, model="d16"), 240, 40, SAMPLING),
    "tests": Job("Tests that need a GPU", jobs.run_tests, 100, 45, TESTS, jobs.count_tests),
    "training": Job("Training from codes, d16", partial(jobs.measure_training, model="d16"), 80, 40, TRAINING),
    "sampling_d30": Job("Sampling, d30", partial(jobs.measure_sampling, model="d30"), 150, 40, SAMPLING),
    "fsdp2": Job("FSDP2 on one card, d16", partial(train_sharded, model="d16"), 100, 50, SHARDED),
    "memory": Job("Memory of sampling", partial(jobs.measure_memory, models=("d16", "d30")), 50, 30, MEMORY),
}


@dataclass
class Result:
    """What has become of a job: how it ended, its seconds, and what it recorded."""

    outcome: str = "not run"
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The records but that of the machine."""
        return [record for record in self.records if "machine" not in record]


class Session:
    """
    Runs the jobs that there is time for and writes what they find.

    Args:
        args (`argparse.Namespace`): The arguments of the command line.
        scratch (`Path`): Folder for files that nobody needs afterwards.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.scratch = args, scratch
        self.results = {name: Result() for name in args.jobs}

    def run(self) -> None:
        """All jobs. Each has a time at which it ends, so that the next one has what it leaves over."""
        start, total = time.monotonic(), 60 * self.args.minutes
        scale = max(1.0, total / sum(JOBS[name].seconds for name in self.args.jobs))
        end = start
        for name, result in self.results.items():
            end = min(end + scale * JOBS[name].seconds, start + total)
            begin = time.monotonic()
            if end - begin >= JOBS[name].least:
                result.outcome = "running"
                result.outcome = self._run_job(name, end)
                result.seconds = time.monotonic() - begin
                self._read(name)
            self.write()

    def _run_job(self, name: str, deadline: float) -> str:
        command = [sys.executable, __file__, "--job", name, "--device", self.args.device]
        command += ["--scratch", str(self.scratch), *(["--tiny"] if self.args.tiny else [])]
        return run_until(command, self.args.output / f"{name}.log", ROOT, deadline, lambda: self._look(name))

    def _look(self, name: str) -> None:
        """Write what is new, which stays even if the whole session is stopped."""
        if self._read(name):
            self.write()

    def _read(self, name: str) -> bool:
        """Read what a job has recorded; whether there is more than before."""
        result, number = self.results[name], len(self.results[name].records)
        result.records = read_records(records_file(self.scratch, name))
        return len(result.records) > number

    def write(self) -> None:
        """Write the tables and the JSON file."""
        (self.args.output / f"{NAME}.md").write_text(self.text(), encoding="utf-8")
        given = {name: value for name, value in vars(self.args).items() if value is not None}
        report = {"arguments": given, "jobs": {name: vars(result) for name, result in self.results.items()}}
        write(self.args.output, NAME, report)

    def text(self) -> str:
        """The tables."""
        parts = ["# GPU session"]
        if self.args.tiny:
            parts.append("All models are tiny, whatever the tables call them: the numbers mean nothing.")
        records = [record for result in self.results.values() for record in result.records if "machine" in record]
        if records:
            parts.append(machine_text(records[0]["machine"], records[0]["limits"]))
        outcomes = [{"job": name, **vars(result)} for name, result in self.results.items()]
        columns = [("job", "job", "{}"), ("outcome", "outcome", "{}"), ("seconds", "seconds", "{:.0f}")]
        parts.append(write_table(outcomes, columns))
        for name, result in self.results.items():
            if result.rows:
                rows = JOBS[name].summarise(result.rows)
                parts += [f"## {JOBS[name].title}", write_table(rows, JOBS[name].columns)]
        return "\n\n".join(parts) + "\n"


def records_file(scratch: Path, name: str) -> Path:
    """Where a job leaves its records."""
    return scratch / f"{name}.jsonl"


def run_here(name: str, device: str, tiny: bool, scratch: Path) -> None:
    """A job, in this process."""
    JOBS[name].run(
        jobs.Settings(torch.device(device), tiny, scratch), partial(append_record, records_file(scratch, name))
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder of the tables and the logs")
    parser.add_argument("--minutes", type=float, default=12.0, help="of all jobs together")
    parser.add_argument(
        "--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="default: all, in this order"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches: does it run")
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job is not None:
        run_here(args.job, args.device, args.tiny, args.scratch)
        return
    if args.minutes <= 0:
        parser.error(f"`minutes` must be positive, got {args.minutes}.")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "`device` = 'cuda' needs a GPU, and torch sees none. `--device cpu --tiny` tries the session without one."
        )
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(args, Path(scratch))
        session.run()
    print(session.text())


if __name__ == "__main__":
    main()
