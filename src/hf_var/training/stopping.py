# SPDX-License-Identifier: Apache-2.0
"""
Stopping a run after the current step. Schedulers send SIGTERM before they take a machine away.

Accelerate's `set_trigger` and `check_trigger` agree through the accelerator, for which every step would have to wait.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StopRequest:
    """Detects SIGTERM in any process; all processes agree on it after a step."""

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self.is_agreed = False
        self._is_asked = False
        self._group: Any = None
        self._handler: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGTERM inside the block. A second one ends the process at once."""
        # Through the CPUs, so that no step waits for a device.
        self._group = torch.distributed.new_group(backend="gloo") if self.num_processes > 1 else None
        # Only a program's main thread may install signal handlers.
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            self._restore_handler()

    def agree(self) -> None:
        """Find out whether any process was asked to stop; all of them call this after a step."""
        asked = torch.tensor(int(self._is_asked))
        if self._group is not None:
            torch.distributed.all_reduce(asked, group=self._group)
        self.is_agreed = int(asked) > 0

    def _ask(self, *_: Any) -> None:
        self._is_asked = True
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None
