# SPDX-License-Identifier: Apache-2.0
"""A digest of a model changes with everything that decides what it computes, and with nothing else."""

import torch
from torch import nn

from hf_var.fingerprints import fingerprint


def digest(module: nn.Module) -> str:
    return fingerprint({}, module.state_dict())


def make_module() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return module


def test_fingerprint_changes_with_every_tensor() -> None:
    first = digest(make_module())
    assert digest(make_module().eval().requires_grad_(False)) == first
    assert len(first) == 16
    found = {first, digest(make_module().half()), digest(make_module().bfloat16())}
    for name in make_module().state_dict():
        module = make_module()
        # One unit in the last place, or one more batch.
        tensor = module.state_dict()[name].view(-1)
        tensor[-1:] = tensor[-1:].nextafter(torch.tensor(9.0)) if tensor.is_floating_point() else tensor[-1:] + 1
        found.add(digest(module))
    other = nn.Sequential(make_module()[0])
    renamed = nn.ModuleDict({"a": make_module()[0]})
    found |= {digest(other), digest(renamed)}
    assert len(found) == 3 + len(make_module().state_dict()) + 2


def test_fingerprint_does_not_depend_on_the_layout_in_memory() -> None:
    module = nn.Conv2d(2, 3, 3)
    before = digest(module)
    assert digest(module.to(memory_format=torch.channels_last)) == before
