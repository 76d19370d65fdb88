# SPDX-License-Identifier: Apache-2.0
"""torch's switches for what fp32 products may be rounded to, for the time of a block."""

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
    """Set torch's `fp32_precision` of some backends, such as `{"cuda.matmul": "tf32"}`, for the whole process."""
    backends = {attrgetter(name)(torch.backends): value for name, value in settings.items()}
    before = {backend: backend.fp32_precision for backend in backends}
    for backend, value in backends.items():
        backend.fp32_precision = value
    try:
        yield
    finally:
        for backend, value in before.items():
            backend.fp32_precision = value
