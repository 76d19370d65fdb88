# SPDX-License-Identifier: Apache-2.0
"""Core-seconds and steps: how many optimizer steps fit into a budget, by measurements of short trainings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


# Steps of the first measurement of a calibration; also the fewest steps of a training.
FIRST_STEPS = 10
# A calibration's longest measurement takes this share of the budget, and no more than the seconds below.
CALIBRATION_SHARE = 0.1
MOST_CALIBRATION_SECONDS = 30.0


@dataclass(frozen=True)
class Rate:
    """
    What a training costs: `fixed + seconds_per_step * steps` core-seconds. The fixed part is reading the data, making the
    model, a k-means start, the first calls, and writing the result.
    """

    seconds_per_step: float
    fixed: float

    def steps_within(self, seconds: float) -> int:
        """The most steps that a budget pays, `FIRST_STEPS` at least."""
        return max(FIRST_STEPS, int((seconds - self.fixed) / self.seconds_per_step))

    def after(self, steps: int, seconds: float) -> "Rate":
        """The same with the seconds per step of a whole training, which says more than a short one."""
        per_step = (seconds - self.fixed) / steps
        return Rate(per_step, self.fixed) if per_step > 0 else self


def fit(first: tuple[int, float], second: tuple[int, float]) -> Rate:
    """The line through two measurements of (steps, core-seconds), the second with more steps."""
    (steps, seconds), (more_steps, more_seconds) = first, second
    if not 0 < steps < more_steps:
        raise ValueError(f"The second measurement must have more steps than the first, got {steps} and {more_steps}.")
    per_step = (more_seconds - seconds) / (more_steps - steps)
    if per_step <= 0 or per_step * steps > seconds:
        # Noise was larger than the steps. A training without a fixed part is the most that they can cost.
        return Rate(more_seconds / more_steps, 0.0)
    return Rate(per_step, seconds - per_step * steps)


def calibrate(measure: Callable[[int], float], budget: float) -> Rate:
    """
    The rate of a training, by `measure`, which gives the core-seconds of a training of so many steps. The first
    measurement is nearly all fixed part, so the second says little more than how many steps the third should have.
    """
    target = min(CALIBRATION_SHARE * budget, MOST_CALIBRATION_SECONDS)
    first = (FIRST_STEPS, measure(FIRST_STEPS))
    second = first
    for _ in range(2):
        # Before a second measurement the seconds per step are at most these.
        per_step = first[1] / first[0] if second is first else fit(first, second).seconds_per_step
        steps = first[0] + max(first[0], int(target / per_step))
        if steps <= 1.5 * second[0] and second is not first:
            break
        second = (steps, measure(steps))
    return fit(first, second)


def schedule(recipe: Mapping[str, Any], steps: int) -> dict[str, int]:
    """The arguments of a recipe that are numbers of steps, in proportion to a training of `steps` steps."""
    arguments = {"max_train_steps": steps}
    whole = int(recipe["max_train_steps"])
    for name in ("unquantized_steps", "lr_warmup_steps"):
        if name in recipe:
            # Longer trainings keep the warm-up, which is for the first steps, and shorter ones keep some of both.
            scaled = max(1, round(int(recipe[name]) * steps / whole))
            arguments[name] = min(scaled, int(recipe[name])) if name == "lr_warmup_steps" else scaled
    return arguments
