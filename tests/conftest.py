# SPDX-License-Identifier: Apache-2.0
"""The surroundings every test runs in: no Hub, no cache of the user's, one thread."""

import atexit
import os
import shutil
import tempfile


# The libraries read these when they are imported, hence before anything else. Subprocesses inherit them, and so do the
# workers of pytest-xdist, which share the folder that the main process removes at its end.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_var_tests_")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest
import torch


# Also where a plugin imported torch first. Sums in one order, whatever the machine, and no fight over its cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
        if accelerators < needed:
            skip = pytest.mark.skip(reason=f"needs {needed} accelerator(s), found {accelerators}")
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(skip)


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled before the test, and nothing stays after it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
