# SPDX-License-Identifier: Apache-2.0
"""
A Sphinx extension that writes what language models read of the site: `llms.txt` (llmstxt.org), a list of all pages with
their first sentences, and each page in Markdown beside its HTML. The reference in Markdown is the docstrings as they are.
"""

import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import hf_var


def keep_first_sentence(app: Sphinx, document: nodes.document) -> None:
    paragraph = next(iter(document.findall(nodes.paragraph)), None)
    text = "" if paragraph is None else " ".join(paragraph.astext().split())
    # "et al." ends no sentence.
    sentence = re.split(r"(?<!al)\. ", text, maxsplit=1)[0].rstrip(".:")
    app.env.metadata[app.env.current_document.docname]["about"] = f"{sentence}."


def write_markdown(app: Sphinx, docname: str) -> str:
    """Write a page in Markdown; returns its path on the site."""
    source, path = Path(app.env.doc2path(docname)), f"{docname}.md"
    target = Path(app.outdir, path)
    if source.suffix == ".md":
        shutil.copyfile(source, target)
    else:
        parts, metadata = [f"# {app.env.titles[docname].astext()}"], app.env.metadata[docname]
        signatures = metadata.get("signatures", {})
        for what, name, text in metadata.get("docstrings", ()):
            level = "###" if what in ("attribute", "method", "property") else "##"
            parts += [f"{level} `{name}{signatures.get(name, '')}`", text]
        target.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def write_llms(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.name != "html":
        return
    root = app.env.get_doctree(app.config.root_doc)
    lines = [f"# {app.config.project}", f"> {hf_var.__doc__}"]
    for tree in root.findall(addnodes.toctree):
        lines.append(f"## {tree['caption']}")
        entries = []
        for _, docname in tree["entries"]:
            title, path = app.env.titles[docname].astext(), write_markdown(app, docname)
            entries.append(f"- [{title}]({path}): {app.env.metadata[docname]['about']}")
        lines.append("\n".join(entries))
    Path(app.outdir, "llms.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", keep_first_sentence)
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True}
