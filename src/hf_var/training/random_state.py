# SPDX-License-Identifier: Apache-2.0
"""Random numbers: the global generators, which libraries and torch's dropout use, and those that follow from a position."""

import random
from typing import Any

import numpy as np
import torch


def position_generator(seed: int, position: int, stream: int) -> torch.Generator:
    """
    A generator of the CPU that follows from the position in a run alone: so a resumed run and one with other processes
    draw the same numbers. `stream` separates the uses of one position.
    """
    # torch's generator on the CPU uses only the lowest 32 bits of a seed, so the numbers are mixed first.
    (mixed,) = np.random.SeedSequence((seed, position, stream)).generate_state(1)
    return torch.Generator().manual_seed(int(mixed))


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, on the CPU and on `device`."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what [`random_state`] returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])
