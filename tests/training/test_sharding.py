# SPDX-License-Identifier: Apache-2.0
"""A sharded model gives the folder of a whole one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_var.training.sharding import is_sharded, whole_model, whole_tensor


def test_a_model_of_one_process_is_left_as_it_is(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    assert not is_sharded(model)
    assert whole_model(model, lambda: nn.Linear(2, 3), tmp_path) is model
    assert whole_tensor(model.weight) is model.weight
    assert not list(tmp_path.iterdir())


def test_training_with_shards_equals_training_without(tmp_path: Path) -> None:
    script = Path(__file__).with_name("sharding_processes.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=200)
    whole, sharded = (load_file(tmp_path / processes / "model.safetensors") for processes in "12")
    assert whole.keys() == sharded.keys()
    for name in whole:
        torch.testing.assert_close(
            sharded[name], whole[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text
        )
    assert (tmp_path / "1/config.json").read_text() == (tmp_path / "2/config.json").read_text()
    expected, found = (json.loads((tmp_path / processes / "figures.json").read_text()) for processes in "12")
    assert found.pop("codes") == expected.pop("codes")
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected["loss"] > 0
    assert expected["accuracy"] == pytest.approx((expected["accuracy_0"] + 4 * expected["accuracy_1"]) / 5)
