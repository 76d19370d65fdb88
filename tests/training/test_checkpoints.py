# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run is resumed from, and the groups of processes that write them."""

import pytest
import torch
from accelerate import Accelerator
from torch import distributed, nn

from hf_var.training.checkpoints import Checkpoints, checkpoint_folders, find_checkpoint
from hf_var.training.identity import RunIdentity


def make_checkpoint(folder, step):
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    return path


def test_a_checkpoint_of_another_folder_begins_a_new_one_only(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    checkpoint = make_checkpoint(first, 2)
    assert find_checkpoint(second, str(checkpoint)) == checkpoint
    own = make_checkpoint(second, 9)
    assert find_checkpoint(second, str(own)) == own
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` = .* is not of `output_dir` = .*step-00000009"):
        find_checkpoint(second, str(checkpoint))
    assert own.is_dir()


def test_a_single_process_whose_group_has_no_cpus_writes_and_reads(tmp_path):
    # As torchrun and `accelerate launch` make it on one GPU, whose backend knows no CPUs.
    accelerator = Accelerator(cpu=True)
    distributed.init_process_group("cuda:gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        checkpoints = Checkpoints(accelerator, tmp_path, total_limit=1)
        model = nn.Linear(2, 3)
        expected = model.weight.detach().clone()
        checkpoints.save(1, {"model": model}, RunIdentity({}, {}))
        checkpoints.finish()
        nn.init.zeros_(model.weight)
        (folder,) = checkpoint_folders(tmp_path)
        checkpoints.load(folder, {"model": model})
        assert torch.equal(model.weight, expected)
    finally:
        distributed.destroy_process_group()
