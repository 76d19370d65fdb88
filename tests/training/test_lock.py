# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder, where the file system has locks."""

import errno
import fcntl
import os

import pytest
from accelerate import Accelerator

from hf_var.training import lock


def failing(code):
    def lockf(descriptor, operation):
        raise OSError(code, os.strerror(code))

    return lockf


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_warned_of(code, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(lock.logger, "warning", warnings.append)
    monkeypatch.setattr(fcntl, "lockf", failing(code))
    with lock.locked_folder(Accelerator(), tmp_path / "run"):
        assert (tmp_path / "run" / lock.LOCK_FILE).exists()
    (warning,) = warnings
    assert "has no locks" in warning


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_folder_that_is_held_is_refused(code, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", failing(code))
    with pytest.raises(ValueError, match="is in use by another run"), lock.locked_folder(Accelerator(), tmp_path):
        raise AssertionError("the folder is held")


def test_other_errors_are_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), lock.locked_folder(Accelerator(), tmp_path):
        raise AssertionError("the folder cannot be locked")
