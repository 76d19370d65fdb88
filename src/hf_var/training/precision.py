# SPDX-License-Identifier: Apache-2.0
"""How exact fp32 matrix products are, while a run lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """
    Inside the block, factors of fp32 matrix products may be rounded to `precision`, in the whole process.

    torch does so where the hardware has a faster way for it: Ampere GPUs and later for tf32, CPUs with AMX for both. On
    other CPUs bf16 has torch hand the products to oneDNN, which then does not round; where MKL, which torch takes
    otherwise, is slow, as on AMD's, that is the larger gain.

    Args:
        precision (`str`): ieee, which leaves torch's settings alone, tf32 or bf16. GPUs round to tf32 for both.
    """
    backends = cast(Any, torch.backends)
    settings = (backends.mkldnn.matmul, backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    if precision != "ieee":
        for setting, value in zip(settings, (precision, "tf32"), strict=True):
            setting.fp32_precision = value
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
