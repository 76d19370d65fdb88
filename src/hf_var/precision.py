# SPDX-License-Identifier: Apache-2.0
"""torch's switches for what fp32 products may be rounded to, for the time of a block."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter

import torch


# On CPUs without bf16 matrix units (AMX) torch then takes oneDNN for fp32 products, which rounds nothing there; that is much
# faster than MKL, which torch takes otherwise, on other CPUs than Intel's. No other value of the switch does so.
ONEDNN_MATMUL = {"mkldnn.matmul": "bf16"}
# As it is written. By default NVIDIA's cards round the factors of convolutions to 10 bits.
EXACT_ON_CUDA = {"cudnn.conv": "ieee", "cuda.matmul": "ieee"}


# How many blocks want a switch, and what it was before the first of them: in several threads blocks overlap.
_held: dict[str, tuple[int, str]] = {}
_lock = threading.Lock()


@contextmanager
def fp32_precision(settings: Mapping[str, str]) -> Iterator[None]:
    """
    Set torch's `fp32_precision` of some backends and set it back. The settings are those of the whole process: of blocks
    that overlap the last one decides, and the last one to end sets back.

    Args:
        settings (`dict[str, str]`): `"ieee"`, `"tf32"` or `"bf16"` by backend, such as `"cuda.matmul"`.
    """
    with _lock:
        for name, value in settings.items():
            backend = attrgetter(name)(torch.backends)
            number, before = _held.get(name, (0, backend.fp32_precision))
            backend.fp32_precision = value
            _held[name] = (number + 1, before)
    try:
        yield
    finally:
        with _lock:
            for name in settings:
                number, before = _held.pop(name)
                if number > 1:
                    _held[name] = (number - 1, before)
                else:
                    attrgetter(name)(torch.backends).fp32_precision = before
