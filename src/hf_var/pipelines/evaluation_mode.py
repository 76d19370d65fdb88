# SPDX-License-Identifier: Apache-2.0
"""The mode that the models of a pipeline draw in."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def in_evaluation_mode(call: Callable) -> Callable:
    """Draw without dropout from models that are being trained, and give every module its mode back."""

    @functools.wraps(call)
    def wrapper(pipeline: Any, *args, **kwargs):
        models = [pipeline.transformer, pipeline.vqvae]
        models += [kwargs["refiner"]] if isinstance(kwargs.get("refiner"), nn.Module) else []
        training = [module for model in models for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with pipeline._matmul_library():
                return call(pipeline, *args, **kwargs)
        finally:
            for module in training:
                module.training = True

    return wrapper
