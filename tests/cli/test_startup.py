# SPDX-License-Identifier: Apache-2.0
"""`hf-var` answers help and mistakes without what takes seconds to import; `import hf_var` loads everything, as always."""

import subprocess
import sys

import pytest

import hf_var
import hf_var.data
from hf_var.cli import COMMANDS, JOBS


# The ways to start the command. `-X importtime` names every module that is imported.
SCRIPT = ["-c", "import sys; from hf_var_command import script; sys.exit(script())"]
MODULES = (["-m", "hf_var"], ["-m", "hf_var.cli"])
SLOW = {"torch", "transformers", "diffusers", "accelerate", "datasets"}
# transformers' parser of configurations, which does not bring torch.
ALLOWED = {name: {"transformers"} for name in JOBS}
NAMES = [add.__name__.removeprefix("add_") for add in COMMANDS]


def run(*words: str, cwd=None) -> tuple[int, str, str, set[str]]:
    """Status, output, errors, and the packages that a process imports."""
    process = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, cwd=cwd)
    lines = process.stderr.splitlines()
    imported = {line.split("|")[-1].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    errors = "\n".join(line for line in lines if not line.startswith("import time:"))
    return process.returncode, process.stdout, errors, imported


@pytest.mark.parametrize("start", [SCRIPT, *MODULES], ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize(
    ("arguments", "status", "answer"),
    [
        (["--help"], 0, "generate"),
        (["--version"], 0, f"hf-var {hf_var.__version__}"),
        (["paint"], 2, "paint"),
        ([], 2, "COMMAND"),
    ],
)
def test_it_answers_without_slow_imports(start, arguments, status, answer):
    found, output, errors, imported = run(*start, *arguments)
    assert (found, imported & SLOW) == (status, set())
    assert answer in (errors if status else output)
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", [*NAMES, *JOBS])
def test_every_command_explains_itself_without_slow_imports(name):
    status, output, errors, imported = run(*SCRIPT, name, "--help")
    assert (status, errors) == (0, "")
    assert output.startswith(f"usage: hf-var {name}")
    assert imported & SLOW <= ALLOWED.get(name, set())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "--output"),
        (["generate", "--output", "out.png", "--sede", "1"], "--sede"),
        (["generate", "--output", "out.png", "--seed", "one"], "'one'"),
        (["generate", "--output", "out.xyz"], "--output"),
        (["inpaint", "--image", "a", "--mask", "b", "--output", "c.png", "--feather-width", "3"], "--paste-original"),
        (["score", "--images", "a.png", "--classify", "0"], "--classify"),
        (["reconstruct", "--images", "a.png"], "--output"),
        (["convert", "--output", "out"], "--vqvae"),
        (["convert", "--vqvae", "a", "--text-encoder", "b", "--output", "out"], "--text-encoder"),
        (["tokenize", "--data", "images"], "--vqvae"),
        (["evaluate", "--output", "out", "--modle", "a"], "Did you mean model"),
    ],
)
def test_mistakes_are_found_without_slow_imports(arguments, message, tmp_path):
    status, output, errors, imported = run(*SCRIPT, *arguments, cwd=tmp_path)
    assert (status, output) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert imported & SLOW <= ALLOWED.get(arguments[0], set())
    assert not list(tmp_path.iterdir())


def check_in_fresh_interpreter(code: str, *arguments: str) -> None:
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


REGISTERED = """
import diffusers, hf_var, transformers
names = {}
exec("from hf_var import *", names)
assert {*hf_var.__all__, "__name__"} <= set(dir(hf_var))
assert set(hf_var.__all__) <= names.keys()
assert names["VARPipeline"] is hf_var.VARPipeline is diffusers.VARPipeline
assert diffusers.pipelines.hf_var is hf_var
assert "hf_var" in transformers.CONFIG_MAPPING
"""


def test_the_command_loads_and_registers_everything_before_it_works(tmp_path):
    code = f"""
import sys, hf_var_command
assert hf_var_command.script() == 0
{REGISTERED}
"""
    check_in_fresh_interpreter(code, "generate", "--class-labels", "3", "--output", str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").exists()


def test_a_program_that_calls_the_command_has_everything_afterwards(tmp_path):
    code = f"""
import sys, hf_var_command
try:
    hf_var_command.main()
except SystemExit as exit:
    assert exit.code == 0
import hf_var
{REGISTERED}
"""
    check_in_fresh_interpreter(code, "--version")


def test_a_process_that_is_not_the_command_loads_and_registers_everything(tmp_path):
    # A script of that name, with these arguments, in a process that the command started.
    script = tmp_path / "hf-var"
    script.write_text(f"""
import sys, hf_var_command, hf_var
assert "diffusers" in sys.modules
assert set(hf_var.__all__) <= vars(hf_var).keys()
{REGISTERED}
try:
    hf_var.nonsense
except AttributeError as error:
    assert "module 'hf_var' has no attribute 'nonsense'" in str(error)
""")
    process = subprocess.run([sys.executable, script, "-m", "hf_var"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_names_of_the_data_come_when_they_are_used():
    assert hf_var.data.DataConfig is hf_var.data.config.DataConfig
    assert set(hf_var.data.__all__) <= set(dir(hf_var.data))
    assert {name for name in hf_var.data.__all__ if not hasattr(hf_var.data, name)} == set()
    with pytest.raises(AttributeError, match="module 'hf_var.data' has no attribute 'nonsense'"):
        _ = hf_var.data.nonsense
