# SPDX-License-Identifier: Apache-2.0
"""The releases that we say we run with: bounds, the lock, and the commands that install by them."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LISTS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
REQUIREMENTS = [Requirement(text) for texts in LISTS for text in texts if not text.startswith("hf-var")]
LOCK = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
LOCKED = [Requirement(line) for line in LOCK if not line.startswith("#")]
# What torch pins for itself is torch's business, and OpenVINO is not installed by the commands that use the lock.
UNLOCKED = {"torch", "torchvision", "openvino", "ray"}
PYTHONS = ["3.11.9", "3.12.7", "3.13.1"]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def bounds(name):
    """Lower and upper bound of a dependency."""
    (requirement,) = [each for each in REQUIREMENTS if each.name == name]
    found = {each.operator: each.version for each in requirement.specifier}
    return found.get(">="), found.get("<")


def make(*arguments):
    # Without what a `make test` around this hands down.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


# --------------------------------------------------------------------------------------------------------------------
# The lock


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_one_version_of_every_dependency_within_its_bounds(python, platform):
    environment = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": platform,
        "platform_machine": "x86_64",
    }
    pins = [each for each in LOCKED if each.marker is None or each.marker.evaluate(environment)]
    versions = {canonicalize_name(each.name): each.specifier for each in pins}
    assert len(versions) == len(pins)
    assert all(re.fullmatch(r"==[\w.+!]+", str(specifier)) for specifier in versions.values())
    for requirement in REQUIREMENTS:
        name = canonicalize_name(requirement.name)
        if name not in UNLOCKED:
            assert requirement.specifier.contains(str(versions[name]).removeprefix("==")), name


def test_torch_is_left_to_its_range():
    names = {canonicalize_name(each.name) for each in LOCKED}
    assert not names & (UNLOCKED | {"triton"})
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def test_the_lock_says_nothing_of_where_it_was_made():
    assert not [line for line in LOCK if re.search(r"[:@]|//|\\|--", line) and not line.startswith("# SPDX")]
    assert all(each.url is None for each in LOCKED)


@needs_make
@pytest.mark.parametrize(
    ("target", "extras"), [("demo", "."), ("test", ".[test]"), ("quality", ".[dev]"), ("docs", ".[docs]")]
)
def test_the_commands_of_the_readme_install_by_the_lock(target, extras):
    # As if nothing were there, and as if the lock had changed since.
    for option in ("--always-make", "--what-if=requirements/lock.txt"):
        installs = [line for line in make("--dry-run", option, target).splitlines() if "pip install" in line]
        assert installs == [
            f'.venv/bin/python -m pip install --constraint requirements/lock.txt --editable "{extras}"'
        ]


# --------------------------------------------------------------------------------------------------------------------
# Both ends


@needs_make
def test_the_oldest_and_newest_environments_have_all_dependencies():
    """What `make test-oldest` and `make test-newest` install is read off pyproject.toml."""
    lines = set(make("--eval", "show: ; @$(LOWER_BOUNDS)", "show").split())
    # Ray, which has an extra of its own, is large, and tests do without it.
    plain = [each for each in REQUIREMENTS if not each.extras]
    expected = {f"{each.name}>={bounds(each.name)[0]}" for each in plain if bounds(each.name)[0]}
    assert {"transformers>=5.20", "pytest>=9.2"} < expected
    assert lines - {"hatchling>=1.27"} == expected
    oldest, newest = (make("--dry-run", f"test-{end}") for end in ("oldest", "newest"))
    assert '--constraint .venv-oldest/constraints.txt --editable ".[test]"' in oldest
    assert "--upgrade --requirement .venv-newest/requirements.txt" in newest
    assert "-m pytest" in oldest
    assert "-m pytest" in newest


@pytest.mark.parametrize("name", ["transformers", "diffusers"])
def test_the_supported_releases_are_those_of_the_documents(name):
    lowest, excluded = (Version(bound) for bound in bounds(name))
    assert (lowest.major, excluded.micro) == (excluded.major, 0)
    words = f"{name} {lowest.major}.{lowest.minor} to {lowest.major}.{excluded.minor - 1}"
    for document in ("README.md", "CONTRIBUTING.md", "docs/release_notes.md"):
        assert words in (ROOT / document).read_text(encoding="utf-8"), document
    # The lock is at the newest of them.
    (pin,) = [str(each.specifier).removeprefix("==") for each in LOCKED if each.name == name]
    assert Version(pin).minor == excluded.minor - 1


def test_the_oldest_python_is_the_same_everywhere():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    versions = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert versions == [python.rpartition(".")[0] for python in PYTHONS]
    assert versions[0] == oldest
    tools = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{oldest.replace(".", "")}"' in tools
    assert f'pythonVersion = "{oldest}"' in tools
    assert str(versions).replace("'", '"') in (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert f"Python {oldest} or " in (ROOT / "README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# What a change has to pass


@pytest.mark.parametrize(
    ("failing", "code"), [("none", 0), ("smoke-newest", 0), ("test", 1), ("quality", 1)], ids=lambda value: str(value)
)
def test_newest_releases_warn_and_do_not_block(failing, code, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    stub = tmp_path / "bin" / "make"
    stub.write_text(f'#!/bin/sh\necho "make $1" >> made\necho "=== 3 passed in 1s ==="\n[ "$1" != {failing} ]\n')
    stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(tmp_path / ".ci" / "run")]
    result = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "made").read_text().split("\n")[:3] == ["make test", "make quality", "make smoke-newest"]
    assert re.search(r"^pytest: +=== 3 passed", result.stdout, re.MULTILINE)
    verdict = "failed .a warning" if failing == "smoke-newest" else "passed"
    assert re.search(rf"^newest releases: {verdict}", result.stdout, re.MULTILINE)


def test_actions_are_pinned_by_their_commits():
    """A tag can be moved to other code."""
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        for line in workflow.read_text(encoding="utf-8").splitlines():
            assert "uses:" not in line or re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line
