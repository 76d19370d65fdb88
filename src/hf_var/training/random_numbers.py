# SPDX-License-Identifier: Apache-2.0
"""Random numbers that do not depend on how a run is spread over processes and calls."""

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
