# SPDX-License-Identifier: Apache-2.0
"""Context manager for torch's precision of fp32 products."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from typing import Any

import torch


# On CPUs without bf16 matrix units (AMX) torch then takes oneDNN for fp32 products, which rounds nothing there; that is much
# faster than MKL, which torch takes otherwise, on other CPUs than Intel's. No other value of the switch does so.
ONEDNN_MATMUL = {"mkldnn.matmul": "bf16"}
# As it is written. By default NVIDIA's cards round the factors of convolutions to 10 bits.
EXACT_ON_CUDA = {"cudnn.conv": "ieee", "cuda.matmul": "ieee"}
# Of a backend's switch: what it was before the first block, and what each block that has not ended wants, latest last.
_wanted: dict[str, list[tuple[object, Any]]] = {}
_lock = threading.Lock()


@contextmanager
def fp32_precision(settings: Mapping[str, str]) -> Iterator[None]:
    """
    Set torch's `fp32_precision` of some backends and set it back. The switches belong to the process: where blocks of
    several threads overlap, the latest that has not ended decides for all, and the last to end sets them back.

    Args:
        settings (`dict[str, str]`): `"ieee"`, `"tf32"` or `"bf16"` by backend, such as `"cuda.matmul"`.
    """
    block, entered = object(), []
    try:
        with _lock:
            for name, value in settings.items():
                backend = attrgetter(name)(torch.backends)
                before = backend.fp32_precision
                backend.fp32_precision = value
                _wanted.setdefault(name, [(None, before)]).append((block, value))
                entered.append(name)
        yield
    finally:
        with _lock:
            for name in entered:
                _wanted[name] = [entry for entry in _wanted[name] if entry[0] is not block]
                attrgetter(name)(torch.backends).fp32_precision = _wanted[name][-1][1]
                if len(_wanted[name]) == 1:
                    del _wanted[name]


@cache
def is_onednn_exact() -> bool:
    """Whether oneDNN computes fp32 products in fp32 on this CPU, also where it may round: without bf16 matrix units."""
    capabilities = torch.cpu.get_capabilities()
    units = any(value for name, value in capabilities.items() if name.startswith("amx"))
    return torch.backends.mkldnn.is_available() and capabilities.get("architecture") == "x86_64" and not units
