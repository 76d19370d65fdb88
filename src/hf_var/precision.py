# SPDX-License-Identifier: Apache-2.0
"""Context manager for torch's precision of fp32 products."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter

import torch


# On CPUs without bf16 matrix units (AMX) torch then takes oneDNN for fp32 products, which rounds nothing there; that is much
# faster than MKL, which torch takes otherwise, on other CPUs than Intel's. No other value of the switch does so.
ONEDNN_MATMUL = {"mkldnn.matmul": "bf16"}
# As it is written. By default NVIDIA's cards round the factors of convolutions to 10 bits.
EXACT_ON_CUDA = {"cudnn.conv": "ieee", "cuda.matmul": "ieee"}


@contextmanager
def fp32_precision(settings: Mapping[str, str]) -> Iterator[None]:
    """
    Set torch's `fp32_precision` of some backends and set it back. The switches belong to the process: where blocks of
    several threads overlap, set them once around all threads instead.

    Args:
        settings (`dict[str, str]`): `"ieee"`, `"tf32"` or `"bf16"` by backend, such as `"cuda.matmul"`.
    """
    backends = {name: attrgetter(name)(torch.backends) for name in settings}
    before = {name: backend.fp32_precision for name, backend in backends.items()}
    try:
        for name, value in settings.items():
            backends[name].fp32_precision = value
        yield
    finally:
        for name, value in before.items():
            backends[name].fp32_precision = value
