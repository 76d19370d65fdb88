# SPDX-License-Identifier: Apache-2.0
"""Tensors that are written in the background."""

import errno
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_var.training import state_files
from hf_var.training.state_files import (
    join_state,
    read_shards,
    split_state,
    tensor_shapes,
    wait_for_shards,
    without_process_warning,
    write_shards,
)


def make_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "steps": 3,
        "nothing": None,
        "names": ["a", "b"],
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
        "whole numbers": torch.arange(5),
        "bytes": np.arange(4, dtype=np.uint8),
        "half": torch.randn(3, 2, generator=generator).bfloat16(),
        "empty": torch.empty(0, 4),
        "nested": {"images": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)},
        "list": [torch.randn(7, generator=generator), {"turned": torch.randn(4, 6, generator=generator).T}],
    }


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    finished: list[str] = []
    written = write_shards(folder, tensors, None, lambda: finished.append("written"))
    # The training goes on.
    for tensor in tensors.values():
        tensor.zero_()
    wait_for_shards(written)
    return finished


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (torch.Tensor, np.ndarray)):
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=0)
    else:
        assert found == expected


@pytest.mark.contract
@pytest.mark.parametrize("file_size", [state_files.MAX_FILE_SIZE, 100], ids=["one file", "many files"])
def test_what_is_written_is_what_was_there_when_it_was_asked_for(
    file_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_files, "MAX_FILE_SIZE", file_size)
    structure, tensors = split_state(make_state(), "part")
    assert write(tmp_path, tensors) == ["written"]
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (file_size == 100)
    found = read_shards(tmp_path, tensor_shapes(structure), {}, None)
    assert_same(join_state(structure, found), make_state())


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2), "b": torch.ones(3)})
    assert read_shards(tmp_path, {}, {}, None) == {}
    found = read_shards(tmp_path, {"b": torch.Size([3])}, {}, None)
    assert list(found) == ["b"]
    assert torch.equal(found["b"], torch.ones(3))


def test_what_is_incomplete_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "MAX_FILE_SIZE", 100)
    structure, tensors = split_state({"a": torch.ones(40), "b": torch.ones(40)}, "part")
    write(tmp_path, tensors)
    shapes = tensor_shapes(structure)
    with pytest.raises(ValueError, match=r"'part/a' is not there as a whole"):
        read_shards(tmp_path, {"part/a": torch.Size([41])}, {}, None)
    with pytest.raises(ValueError, match=r"'part/b' has the shape \(40,\), expected \(50,\)"):
        read_shards(tmp_path, shapes, {"part/b": torch.empty(50)}, None)
    file = max(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_shards(tmp_path, shapes, {}, None)
    file.unlink()
    with pytest.raises(ValueError, match=r"'part/b' is not there as a whole"):
        read_shards(tmp_path, shapes, {}, None)


def test_names_that_collide_are_refused() -> None:
    with pytest.raises(ValueError, match="Two tensors of a state have the name 'part/a/b'"):
        split_state({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "part")


def test_one_process_is_nothing_to_warn_of(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught, without_process_warning():
        write(tmp_path, {"a": torch.ones(2)})
        read_shards(tmp_path, {"a": torch.Size([2])}, {}, None)
    assert caught == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    write(tmp_path, {"a": torch.ones(2)})
    monkeypatch.setattr(state_files.HuggingFaceStorageReader, "read_data", fail)
    with pytest.raises(ValueError, match=r"truncated or damaged: .*Input/output error"):
        read_shards(tmp_path, {"a": torch.Size([2])}, {}, None)


@pytest.mark.contract
def test_the_error_is_that_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_files._ShardWriter, "write_data", fail)
    finished: list[str] = []
    written = write_shards(tmp_path, {"a": torch.ones(2)}, None, lambda: finished.append("written"))
    with pytest.raises(OSError, match="No space left on device"):
        wait_for_shards(written)
    assert finished == []
