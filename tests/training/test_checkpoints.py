# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run is resumed from."""

import pytest

from hf_var.training.checkpoints import find_checkpoint


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
