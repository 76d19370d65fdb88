# SPDX-License-Identifier: Apache-2.0
"""Repositories that hold the code of their pipeline: with hf_var it is not run, and without hf_var it draws the same images."""

from pathlib import Path

import pytest


CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module", params=["digits", "emoji"])
def published(request, run_in_hub_process, tmp_path_factory):
    """The name of a repository, and the folder of the images that its pipeline draws here."""
    folder = tmp_path_factory.mktemp(request.param)
    run_in_hub_process(CLIENTS / "push_with_code.py", folder, request.param)
    return request.param, folder


def test_without_hf_var(published, run_in_hub_process, monkeypatch):
    name, folder = published
    monkeypatch.chdir(folder)
    run_in_hub_process(CLIENTS / "load_code.py", folder, name)
