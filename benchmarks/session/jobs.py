# SPDX-License-Identifier: Apache-2.0
"""What gpu_session.py measures in a process of its own. A job hands over each row as soon as it has it."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from memory import forget_peak, measure_here, peak_bytes
from speed.clock import Timed, alternate, calls_to_warm_up, progress, timed
from speed.machine import Limits, Work, as_report, bf16_peak, describe, dtype_name, measure_limits, sampling_work
from speed.models import make_transformer, make_vqvae, transformer_fields, vqvae_fields
from speed.steps import Steps
from speed.variants import GUIDANCE_SCALE, SEED, TOP_K, TOP_P

from hf_var import VARPipeline
from hf_var.priors.costs import training_flops


DTYPE = torch.bfloat16
GIGABYTE = 1e9
BATCH_SIZES, TINY_BATCH_SIZES = (1, 64), (2,)
TRAINING_BATCH_SIZES, TINY_TRAINING_BATCH_SIZES = (32, 64, 128, 192), (2,)
# A training step must fit into this share of the memory, as far as that of a smaller batch tells.
MEMORY_SHARE = 0.9
TESTS = Path(__file__).parents[2] / "tests"
TINY_TESTS = TESTS / "training/test_augmentation.py"
TEST_PROCESSES = 6

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """
    How jobs run.

    Args:
        device (`torch.device`): Where.
        tiny (`bool`): With models and batches that are as small as possible, to see whether all runs.
        scratch (`Path`): Folder for files that nobody needs afterwards.
    """

    device: torch.device
    tiny: bool
    scratch: Path

    @property
    def compile_backend(self) -> str:
        """What compiles; the graphs of tiny models run as they are, as making code of them takes longer than all else."""
        return "eager" if self.tiny else "inductor"


def attempt(
    settings: Settings, emit: Emit, row: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Emit `row` with what `measure` returns or, so that the next rows are measured in any case, with its error."""
    progress(f"measuring {row}")
    try:
        row |= measure()
    except Exception as error:
        # Out of memory first of all. The error itself holds the tensors of the call.
        row["error"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    emit(row)
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def tell_machine(settings: Settings, emit: Emit) -> Limits:
    """Measure the rates that floors follow from, and emit them with the machine."""
    limits = measure_limits(settings.device, [DTYPE], quick=settings.tiny)
    emit({"machine": describe(settings.device), "limits": as_report(limits)})
    return limits


# --------------------------------------------------------------------------------------------------------------------
# Sampling


def measure_sampling(settings: Settings, emit: Emit, model: str) -> None:
    """Batches of one and of many images, uncompiled and compiled, without and with the decoder."""
    model = "tiny" if settings.tiny else model
    limits = tell_machine(settings, emit)
    transformer = make_transformer(transformer_fields(model), DTYPE, settings.device)
    vqvae = make_vqvae(vqvae_fields(model), DTYPE, settings.device)

    @cache
    def work(batch_size: int) -> Work:
        """Counted once, as it takes seconds."""
        return sampling_work(transformer.config, vqvae.config, batch_size, guided=True, dtype=DTYPE)

    for mode in ("eager", "compiled"):
        pipe = VARPipeline(transformer, vqvae)
        pipe.set_progress_bar_config(disable=True)
        if mode == "compiled":
            # Otherwise as it compiles by itself: on CUDA with graphs that are replayed.
            pipe.compile(**({"backend": settings.compile_backend} if settings.tiny else {}))
        for batch_size in TINY_BATCH_SIZES if settings.tiny else BATCH_SIZES:
            for decoder in (False, True):
                row = {"mode": mode, "batch_size": batch_size, "decoder": "yes" if decoder else "no"}
                attempt(settings, emit, row, lambda: sample(settings, pipe, batch_size, decoder, work, limits))  # noqa: B023


def sample(
    settings: Settings,
    pipe: VARPipeline,
    batch_size: int,
    decoder: bool,
    work: Callable[[int], Work],
    limits: Limits,
) -> dict[str, Any]:
    """Times of one batch size."""
    device, config = settings.device, pipe.transformer.config
    labels = [index % (config.num_labels or 1) for index in range(batch_size)]
    options: dict[str, Any] = {"guidance_scale": GUIDANCE_SCALE, "top_k": min(TOP_K, config.codebook_size)}
    options |= {"top_p": TOP_P, "output_type": "pt" if decoder else "latent"}

    def draw() -> Timed:
        generator = torch.Generator(device).manual_seed(SEED)
        return Timed(timed(lambda: pipe(labels, generator=generator, **options), device)[0])

    forget_peak(device)
    times = measure(settings, draw, rounds=20 if batch_size == 1 else 7)
    needed = work(batch_size) if decoder else replace(work(batch_size), decoder_flops=0.0)
    floor = needed.floor(limits, DTYPE)
    return times | {
        "images_per_second": batch_size / times["median"],
        "ms_per_image": 1e3 * times["median"] / batch_size,
        "floor_ms_per_image": 1e3 * floor / batch_size,
        "floor_reached": floor / times["median"],
        "peak": peak_bytes(device) / GIGABYTE,
    }


def measure(settings: Settings, function: Callable[[], Timed], rounds: int) -> dict[str, Any]:
    """Median, spread and first calls of a single variant."""
    calls = calls_to_warm_up(settings.device)
    return alternate({"calls": function}, 2 if settings.tiny else rounds, warm_up_calls=calls)["calls"].times()


# --------------------------------------------------------------------------------------------------------------------
# Training


def measure_training(settings: Settings, emit: Emit, model: str) -> None:
    """Steps from codes: larger and larger batches as long as they fit, then the fastest of these compiled."""
    model = "tiny" if settings.tiny else model
    limits, rows = tell_machine(settings, emit), []
    for batch_size in TINY_TRAINING_BATCH_SIZES if settings.tiny else TRAINING_BATCH_SIZES:
        if rows and not fits(settings.device, rows[-1], batch_size):
            break
        row = {"mode": "eager", "batch_size": batch_size}
        rows.append(attempt(settings, emit, row, lambda: train(settings, model, row, limits)))  # noqa: B023
    fastest = max(rows, key=lambda row: row.get("tokens_per_second", 0))
    row = {"mode": "compiled", "batch_size": fastest["batch_size"]}
    attempt(settings, emit, row, lambda: train(settings, model, row, limits))


def fits(device: torch.device, row: dict[str, Any], batch_size: int) -> bool:
    """Whether a step should fit if its memory grows with the batch from that of `row`."""
    if "error" in row:
        return False
    expected = row["peak"] * batch_size / row["batch_size"]
    return device.type != "cuda" or expected < MEMORY_SHARE * torch.cuda.mem_get_info(device)[1] / GIGABYTE


def train(settings: Settings, model: str, row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Times of one batch size."""
    device, batch_size = settings.device, row["batch_size"]
    steps = Steps(model, device, batch_size, settings.compile_backend)
    step = steps.make("ours_bf16_compiled" if row["mode"] == "compiled" else "ours_bf16")
    forget_peak(device)
    times = measure(settings, step, rounds=7)
    config, peak_rate = steps.transformer.config, bf16_peak(device)
    rate = training_flops(config) * batch_size / times["median"]
    return times | {
        "tokens_per_second": batch_size * config.length / times["median"],
        "images_per_second": batch_size / times["median"],
        "utilisation": None if peak_rate is None else rate / peak_rate,
        "floor_reached": rate / limits.flops[dtype_name(DTYPE)],
        "peak": peak_bytes(device) / GIGABYTE,
    }


# --------------------------------------------------------------------------------------------------------------------
# Memory and tests


def measure_memory(settings: Settings, emit: Emit, models: tuple[str, ...]) -> None:
    """Peaks of sampling with the decoder, uncompiled, as memory.py has them."""
    for model in ("tiny",) if settings.tiny else models:
        for batch_size in TINY_BATCH_SIZES if settings.tiny else BATCH_SIZES:
            row = {"model": model, "variant": "ours_bf16", "batch_size": batch_size}
            attempt(settings, emit, row, lambda: measure_here("ours_bf16", model, batch_size, settings.device))  # noqa: B023


def run_tests(settings: Settings, emit: Emit) -> None:
    """The tests that are marked as needing a GPU, a row each."""
    import pytest

    class Reporter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or not report.passed:
                error = report.longreprtext.strip().rpartition("\n")[2] if report.failed else None
                emit({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "error": error})

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                error = report.longreprtext.strip().rpartition("\n")[2]
                emit({"test": report.nodeid, "outcome": "failed", "error": error})

    marked = [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    files = [TINY_TESTS] if settings.tiny else marked
    # Most of their time is compilation on one core each.
    several = ["-n", str(TEST_PROCESSES)] if settings.device.type == "cuda" else []
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *several, *map(str, files)], plugins=[Reporter()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


def count_tests(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all tests."""
    if not rows:
        return []
    outcomes = [row["outcome"] for row in rows]
    failed = [f"{row['test']}: {row['error']}" for row in rows if row["outcome"] == "failed"]
    counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
    return [counts | {"error": "; ".join(failed) or None}]
