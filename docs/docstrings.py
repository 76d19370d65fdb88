# SPDX-License-Identifier: Apache-2.0
"""
A Sphinx extension for docstrings in Hugging Face's format: sections of Google's style, which napoleon reads, with Markdown in
them, which becomes reStructuredText here. It also keeps the Markdown, for the copies of the pages that `llms.py` writes.
"""

import re
from textwrap import indent
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from transformers import PreTrainedConfig


FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"\[`(?P<name>[^`]+)`\]|\[(?P<text>[^\]`]+)\]\((?P<address>[^)\s]+)\)|`(?P<code>[^`]+)`")
SECTIONS = Config(napoleon_use_rtype=False)


def restructured(match: re.Match) -> str:
    """[`Name`], [text](address) or `code` in reStructuredText."""
    if name := match["name"]:
        # With a dot in front, a name is found in whatever module it is.
        short, name = name.startswith("~") * "~", name.removeprefix("~").removeprefix("hf_var.")
        found = f":py:obj:`{short}.{name}`"
    elif match["address"]:
        found = f"`{match['text']} <{match['address']}>`__"
    else:
        found = f"``{match['code']}``"
    # Unlike in Markdown, letters must not touch markup.
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    return before.isalnum() * "\\ " + found + after.isalnum() * "\\ "


def convert(markdown: str) -> str:
    """A docstring in reStructuredText, but for its sections."""
    parts = FENCE.split(markdown)
    parts[::2] = [INLINE.sub(restructured, text) for text in parts[::2]]
    parts[1::2] = [".. code-block:: pycon\n\n" + indent(code, "    ") for code in parts[1::2]]
    return "".join(parts)


def process_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    markdown = "\n".join(lines)
    metadata = app.env.metadata[app.env.current_document.docname]
    metadata.setdefault("docstrings", []).append((what, name, markdown))
    # A property's docstring is a sentence; what is before a colon is no type.
    what = "method" if what in ("attribute", "property") else what
    found = GoogleDocstring(convert(markdown), SECTIONS, what=what, name=name, obj=value).lines()
    # Python's domain looks up exceptions without the dot.
    lines[:] = [line.replace(":raises .", ":raises ") for line in found]


def process_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, annotation: str | None
) -> tuple[str, None] | None:
    """Leave out the arguments of configurations: most are transformers', and theirs are in the docstring."""
    if what == "class" and issubclass(value, PreTrainedConfig):
        return "", None
    app.env.metadata[app.env.current_document.docname].setdefault("signatures", {})[name] = signature or ""
    return None


def skip_member(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what other libraries define, what has no docstring of its own, and attributes that are classes."""
    function = getattr(value, "fget", None) or getattr(value, "func", None) or value
    ours = str(getattr(function, "__module__", "")).startswith("hf_var")
    return None if ours and function.__doc__ and not (what == "class" and isinstance(value, type)) else True


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True}
