# SPDX-License-Identifier: Apache-2.0
"""The documentation site: it builds without a warning, has every public name and recipe, and no link in it is broken."""

import ast
import html
import io
import re
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


pytest.importorskip("furo", reason="needs the extra `docs`")
pytest.importorskip("myst_parser", reason="needs the extra `docs`")
pytest.importorskip("sphinx_copybutton", reason="needs the extra `docs`")

from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils
from sphinx.util.inventory import InventoryFile


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "hf_var"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, and the warnings of its build."""
    folder, warnings = tmp_path_factory.mktemp("site"), io.StringIO()
    # As `make docs` does it, without another import of torch.
    with patch_docutils(ROOT / "docs"), docutils_namespace():
        Sphinx(ROOT, ROOT / "docs", folder / "html", folder / "trees", "html", status=None, warning=warnings).build()
    return folder / "html", warnings.getvalue()


def test_the_site_builds_without_a_warning(site):
    assert site[1] == ""


def public_names():
    """What modules list in `__all__`, and what has a docstring for users, with arguments."""
    modules = [*(path.parent for path in PACKAGE.glob("*/__init__.py")), *PACKAGE.glob("[!_]*.py")]
    for name in ("hf_var", *(f"hf_var.{module.stem}" for module in modules)):
        yield from getattr(import_module(name), "__all__", [])
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and "Args:\n" in (ast.get_docstring(node) or ""):
                yield node.name


def test_every_public_name_is_in_the_reference(site):
    inventory = InventoryFile.loads((site[0] / "objects.inv").read_bytes(), uri="")
    documented = {
        name.rpartition(".")[2] for kind, names in inventory.data.items() if kind.startswith("py:") for name in names
    }
    missing = set(public_names()) - documented
    assert not missing, f"add {sorted(missing)} to a page of docs/api"


def test_no_link_is_broken_and_no_file_comes_from_elsewhere(site):
    folder = site[0]
    pages = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    anchors = {path: set(re.findall(r'\sid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        for tag, target in re.findall(r'<(a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
            address = urlsplit(html.unescape(target))
            if address.scheme:
                assert tag == "a", f"{path.name} loads {target}"
                continue
            place = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert place.is_file(), f"{path.name} links to {target}"
            if address.fragment:
                assert unquote(address.fragment) in anchors[place], f"{path.name} links to {target}"


def test_language_models_get_all_pages_in_markdown(site):
    text = (site[0] / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# hf_var\n\n> ")
    listed = re.findall(r"^- \[.+?\]\((.+?)\): .+\.$", text, re.MULTILINE)
    pages = {path.relative_to(site[0]).as_posix() for path in site[0].rglob("*.md")}
    assert set(listed) == pages
    missing = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")} - pages - {"docs/README.md"}
    assert not missing, f"add {sorted(missing)} to docs/index.rst"
    assert {"docs/quickstart.md", "docs/api/scoring.md", "benchmarks/RESULTS.md"} <= pages
    reference = (site[0] / "docs/api/scoring.md").read_text(encoding="utf-8")
    assert "## `hf_var.scoring.classify(pipe, images=None" in reference


def test_markdown_of_docstrings_becomes_html(site):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (site[0] / "docs" / "api").glob("*.html")}
    assert len(pages) == len(list((ROOT / "docs" / "api").glob("*.rst")))
    for name, text in pages.items():
        article = text.partition("<article")[2].partition("</article>")[0]
        words = re.sub(r"<pre>.*?</pre>|<[^>]+>", "", article, flags=re.DOTALL)
        assert not re.search(r"`|\]\(|\*optional|Args:", words), name
    assert re.search(r'href="#hf_var.VQVAEConfig"[^>]*><code[^>]*><span class="pre">VQVAEConfig<', pages["tokenizers"])
