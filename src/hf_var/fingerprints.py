# SPDX-License-Identifier: Apache-2.0
"""Digests of weights and settings, to compare models."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def fingerprint(configuration: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """
    A digest of a configuration and tensors.

    Args:
        configuration (`dict[str, Any]`): Fields that decide what a model does, as JSON knows them.
        tensors (`dict[str, torch.Tensor]`): Weights and buffers by name; their values count, in single precision.
    """
    digest = hashlib.sha256(json.dumps(dict(configuration), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
