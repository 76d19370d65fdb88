# SPDX-License-Identifier: Apache-2.0
"""How often a training's gradients are added up, whatever else its process does with Accelerate."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_var.training.accelerator import make_accelerator
from hf_var.training.run import RunConfig


def accumulated(steps: int) -> list[bool]:
    """Of five batches, whether each completes a step."""
    accelerator = make_accelerator(RunConfig(output_dir="unused", gradient_accumulation_steps=steps), 1, 1.0)
    found = []
    for _ in range(5):
        with accelerator.accumulate(torch.nn.Linear(1, 1)):
            found.append(accelerator.sync_gradients)
    return found


def test_loaders_of_other_trainings_do_not_end_an_accumulation() -> None:
    loader = Accelerator().prepare(DataLoader(torch.arange(2)))
    batches = iter(loader)
    # At its last batch, as a training that was told its number of steps leaves it.
    next(batches), next(batches)
    assert Accelerator().gradient_state.end_of_dataloader
    assert accumulated(2) == [False, True, False, True, False]
    assert accumulated(1) == [True] * 5
    assert accumulated(3) == [False, False, True, False, False]


def test_another_number_in_the_configuration_of_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 2, but Accelerate's configuration says 4"):
        accumulated(2)
    assert accumulated(4) == [False, False, False, True, False]
