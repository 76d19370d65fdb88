# SPDX-License-Identifier: Apache-2.0
"""One run at a time in an output folder."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers.utils import logging


logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def locked_folder(accelerator: Accelerator, output_dir: str | Path) -> Iterator[None]:
    """Hold the folder for the processes of one run. The system releases it when the main process ends."""
    path = Path(output_dir) / LOCK_FILE
    descriptor, errors = None, [None]
    if accelerator.is_main_process:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(descriptor):
                holder = path.read_text(encoding="utf-8") or "another process"
                errors = [ValueError(f"`output_dir` = {str(output_dir)!r} is in use by another run: {holder}.")]
        except OSError as error:
            errors = [error]
    try:
        # The other processes would wait for a main process that has failed.
        broadcast_object_list(errors)
        if errors[0] is not None:
            raise errors[0]
        if descriptor is not None:
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file unless another process has. Not by `filelock`, whose locks data loader workers keep alive."""
    try:
        import fcntl
    except ImportError:  # Windows has other locks.
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning(f"The file system has no locks ({error}), so a second run in the same folder goes unnoticed.")
    return True
