# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests that talk to a Hub over HTTP: the server in this process, its clients in fresh interpreters."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub_server import USER_TOKEN, HubServer


SOURCES = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def run_in_hub_process(hub, tmp_path_factory) -> Callable[..., str]:
    """
    Runs Python in a fresh interpreter whose only Hub is `hub`, because the client reads its environment when it is
    imported. Returns what the process printed; if it fails, raises a `RuntimeError` with its standard error.

    Args of the returned function:
        code (`str` or `Path`):
            A snippet, or a script.
        arguments:
            What the snippet or script finds in `sys.argv[1:]`.
        home (`Path`, *optional*):
            The folder of the client's caches. Defaults to a new one for each process.
        token (`str`, *optional*, defaults to that of the user called `user`):
            The client's access token, `None` for an anonymous client.
        environment:
            Further environment variables, such as `HF_HUB_OFFLINE="1"`.
    """

    def run(
        code: str | Path,
        *arguments: object,
        home: Path | None = None,
        token: str | None = USER_TOKEN,
        **environment: str,
    ) -> str:
        program = [str(code)] if isinstance(code, Path) else ["-c", textwrap.dedent(code)]
        variables = hub.environment(home or tmp_path_factory.mktemp("hf_home"), token)
        # One thread: the components are tiny, and results are compared for equality.
        variables.update(OMP_NUM_THREADS="1", **environment)
        variables["PYTHONPATH"] = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
        process = subprocess.run(
            [sys.executable, *program, *map(str, arguments)],
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if process.returncode != 0:
            raise RuntimeError(f"the Hub client exited with {process.returncode}:\n{process.stderr}")
        return process.stdout

    return run
