# SPDX-License-Identifier: Apache-2.0
"""One run at a time in an output folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


LOCK_FILE = ".lock"


@contextmanager
def locked_folder(accelerator: Accelerator, output_dir: str | Path) -> Iterator[None]:
    """
    Hold the folder for the processes of one run. The system releases it when the main process ends, however it does.

    Raises:
        `ValueError`: In all processes, if another run holds it.
    """
    path = Path(output_dir) / LOCK_FILE
    descriptor, reasons = None, [""]
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor):
            holder = path.read_text(encoding="utf-8") or "another process"
            reasons = [f"`output_dir` = {str(output_dir)!r} is in use by another run: {holder}."]
    try:
        broadcast_object_list(reasons)
        if reasons[0]:
            raise ValueError(reasons[0])
        if descriptor is not None:
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """
    Lock a file unless another process holds the lock. Not by `filelock`: data loader workers would keep its locks alive
    after the process ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows has other locks.
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
