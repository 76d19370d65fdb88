# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows must run: examples in docstrings, Python snippets in Markdown, links and commands."""

import doctest
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from hf_var import cli


ROOT = Path(__file__).parent.parent
ROOT_PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/RESULTS.md"]
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Snippets about files and repositories that only a user has; `hub/test_modular.py` loads such a block.
NEEDS_FILES = ("var_d16.pth", "switti-512", "user/prompt_to_class")


def objects_with_examples():
    """The classes and functions of all files that have an example."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            module = import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
            for name, value in vars(module).items():
                if getattr(value, "__module__", None) == module.__name__:
                    yield f"hf_var.{name}", value


def docstrings(name, value):
    yield name, inspect.getdoc(value) or ""
    if inspect.isclass(value):
        for attribute, method in vars(value).items():
            if inspect.isfunction(method) and not attribute.startswith("_") or attribute == "__call__":
                yield f"{name}.{attribute}", inspect.getdoc(method) or ""


EXAMPLES = [
    pytest.param(name, text, id=name)
    for object_name, value in objects_with_examples()
    for name, text in docstrings(object_name, value)
    if ">>>" in text
]


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_docstring_example(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Without the fences, which doctest would take for expected output.
    code = "\n".join(line for line in text.splitlines() if not line.strip().startswith("```"))
    test = doctest.DocTestParser().get_doctest(code, {}, name, None, None)
    report = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert tried > 0
    assert failed == 0, "".join(report)


def test_docstring_examples_exist():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert len(EXAMPLES) == len(re.findall(r"```python\n\s*>>> ", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in SNIPPET.findall(page.read_text(encoding="utf-8")):
        if not any(name in code for name in NEEDS_FILES):
            exec(compile(code, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hf-var"]:
                cli._parser().parse_args(words[1:])
            scripts = [word for word in words if word.endswith((".py", ".yaml"))]
            for script in scripts:
                assert (ROOT / script).exists(), f"{page.name} names {script}"


def test_every_recipe_is_explained():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    explained = re.findall(r"\]\(\.\./examples/recipes/(\w[\w.]*)\.yaml\)", text)
    assert sorted(explained) == sorted(path.stem for path in (ROOT / "examples" / "recipes").glob("*.yaml"))
