# SPDX-License-Identifier: Apache-2.0
"""
Jobs in processes of their own, which are ended when their time is over.

The processes start afresh: one that is forked from another cannot use CUDA if that one has looked for a GPU, as libraries do
while they are imported.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


# Seconds between two looks at a job.
INTERVAL = 1.0
# The end of a traceback, torchrun's among them.
ERROR = re.compile(r"(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
# They only say that a process has failed, which has said why.
CONSEQUENCES = ("CalledProcessError", "ChildFailedError")


def run_until(
    command: Sequence[str], log: Path, folder: Path, deadline: float, look: Callable[[], None] = lambda: None
) -> str:
    """
    Run `command` in `folder` and say how it ended: `"done"`, `"failed"` with the error, or `"stopped"`.

    Args:
        command (`list[str]`): The program and its arguments.
        log (`Path`): File for all that it prints.
        folder (`Path`): Where it runs.
        deadline (`float`): Time of `time.monotonic()` at which it is ended, with all processes that it has started.
        look (`Callable[[], None]`, *optional*): Called every second meanwhile.
    """
    # Nothing is downloaded, and on a machine without a network nothing waits for one.
    options: Any = {"cwd": folder, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "stdin": subprocess.DEVNULL}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, **options)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                process.wait(max(0.0, min(INTERVAL, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                look()
        code = process.poll()
    finally:
        end_tree(process)
    if code is None:
        return "stopped"
    return "done" if code == 0 else f"failed: {find_error(log) or f'exit code {code}'}"


def end_tree(process: subprocess.Popen) -> None:
    """End a process and all that it has started: torchrun gives its processes sessions of their own."""
    if process.poll() is not None:
        return
    root = psutil.Process(process.pid)
    # Those above first, which would start others in place of those that end.
    tree = [root, *root.children(recursive=True)]
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    # One that waits for a driver may never end.
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    psutil.wait_procs(tree[1:], timeout=10)


def find_error(log: Path) -> str | None:
    """The last error that was printed into a file."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [match[1] for line in lines if (match := ERROR.fullmatch(line.strip()))]
    return next((error for error in reversed(errors) if not any(name in error for name in CONSEQUENCES)), None)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line of JSON to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file that may be written right now, none if it is not there."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
