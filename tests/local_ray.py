# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster on this machine. Tests that import this are skipped where Ray is missing."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest


pytest.importorskip("ray.data", reason="needs the extra `ray`")
import ray


TESTS = Path(__file__).parent
# Of the package, and of modules that workers import by name.
PATHS = os.pathsep.join(
    [str(TESTS.parent / "src"), str(TESTS / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


@contextmanager
def local_cluster() -> Iterator[None]:
    """A cluster of two CPUs, which this process is connected to."""
    variables = {"PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    try:
        yield
    finally:
        ray.shutdown()


def actor_processes(name: str) -> list[psutil.Process]:
    """The actors of this class in the cluster that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and name in " ".join(child.cmdline())]


def wait_for(condition: Callable[[], object], run: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert run(), "The run ended too early."
        assert time.monotonic() < end
        time.sleep(0.002)
