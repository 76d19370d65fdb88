# SPDX-License-Identifier: Apache-2.0
"""Variants that run in turns, and what their times say."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


# Wall time, or what the process computed: with one thread, the latter hardly depends on what else the machine does.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
_clock = time.perf_counter


class Unavailable(Exception):
    """A variant cannot run here, for the reason given."""


@dataclass
class Timed:
    """
    One measurement.

    Args:
        seconds (`float`): Time of a whole batch.
        codes (`torch.Tensor`, *optional*): Tokens that were sampled or encoded, to be compared between variants.
        loss (`float`, *optional*): Loss of a training step, to be compared as well.
        extrapolated (`bool`, *optional*, defaults to `False`): Whether a part was measured and the rest follows from it.
    """

    seconds: float
    codes: torch.Tensor | None = None
    loss: float | None = None
    extrapolated: bool = False


@dataclass
class Series:
    """
    All rounds of a variant.

    Args:
        name (`str`): Name of the variant.
        seconds (`list[float]`): Times of the rounds.
        codes (`torch.Tensor`, *optional*): Tokens of the last round; all rounds have the same seed.
        loss (`float`, *optional*): Loss of the last round; all rounds have the same weights.
        extrapolated (`bool`): See [`Timed`].
        warm_up (`float`, *optional*):
            Wall time of the calls before all rounds, the first of which compiles where there is something to.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    codes: torch.Tensor | None = None
    loss: float | None = None
    extrapolated: bool = False
    warm_up: float | None = None

    def times(self) -> dict[str, Any]:
        """Median and spread."""
        return {
            "seconds": self.seconds,
            "median": statistics.median(self.seconds),
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "extrapolated": self.extrapolated,
            "warm_up": self.warm_up,
        }

    def ratios(self, baseline: "Series") -> dict[str, float]:
        """
        How many times faster than `baseline`: round against round, because a noisy machine is slow for both, and of
        these the median and the extremes.
        """
        ratios = [theirs / own for own, theirs in zip(self.seconds, baseline.seconds, strict=True)]
        return {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}

    def changed(self, reference: "Series") -> float | None:
        """Share of the tokens that differ from those of `reference`; `None` if there are no such tokens."""
        if self.codes is None or reference.codes is None or self.codes.shape != reference.codes.shape:
            return None
        return (self.codes != reference.codes).float().mean().item()

    def loss_error(self, reference: "Series") -> float | None:
        """Relative difference of the loss to that of `reference`; `None` if there is no loss."""
        if self.loss is None or reference.loss is None:
            return None
        return abs(self.loss - reference.loss) / abs(reference.loss)


def use_clock(name: str) -> None:
    """Choose one of `CLOCKS` for all measurements from now on."""
    global _clock
    _clock = CLOCKS[name]


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return _clock()


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    start = now(device)
    result = function()
    return now(device) - start, result


def calls_to_warm_up(device: torch.device) -> int:
    """Calls until all are alike: on CUDA a compiled function records its graphs in the second call and replays them later."""
    return 3 if device.type == "cuda" else 1


def alternate(
    variants: dict[str, Callable[[], Timed]],
    rounds: int,
    warm_up: Sequence[str] | None = None,
    warm_up_calls: int = 1,
) -> dict[str, Series]:
    """
    Run all variants in turns, beginning with another one each round, so that neither a change of the machine's speed nor
    what ran before favours one of them.

    Args:
        variants (`dict[str, Callable[[], Timed]]`): A measurement of each variant.
        rounds (`int`): How often.
        warm_up (`list[str]`, *optional*): Variants that run before all rounds, all if `None`.
        warm_up_calls (`int`, *optional*, defaults to 1): How often; see [`calls_to_warm_up`].
    """
    series = {name: Series(name) for name in variants}
    for name in variants if warm_up is None else warm_up:
        start = time.perf_counter()
        for _ in range(warm_up_calls):
            variants[name]()
        series[name].warm_up = time.perf_counter() - start
        progress(f"warm-up of {name}: {series[name].warm_up:.4g} s")
    names = list(variants)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            result = variants[name]()
            progress(f"round {number + 1} of {rounds}, {name}: {result.seconds:.4g} s")
            series[name].seconds.append(result.seconds)
            series[name].codes = None if result.codes is None else result.codes.cpu()
            series[name].loss, series[name].extrapolated = result.loss, result.extrapolated
    return series


def available(makers: dict[str, Callable[[], Callable[[], Timed]]]) -> tuple[dict[str, Callable[[], Timed]], dict]:
    """The variants that can be made, and why the others cannot."""
    made, skipped = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Unavailable as error:
            skipped[name] = str(error)
            progress(f"skipping {name}: {error}")
    return made, skipped


def progress(message: str) -> None:
    """Tell how far the run is, beside the table."""
    print(message, file=sys.stderr, flush=True)
