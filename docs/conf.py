# SPDX-License-Identifier: Apache-2.0
"""
Settings of Sphinx for the documentation site, which `make docs` builds. The source directory is the root of the repository,
so that the links between pages are the same on the site and on GitHub.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import hf_var


project = "hf_var"
author = "The hf_var authors"
copyright = author
version = release = hf_var.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser", "sphinx_copybutton", "docstrings", "llms"]
root_doc = "docs/index"
include_patterns = ["docs/**", "CONTRIBUTING.md", "examples/README.md", "benchmarks/RESULTS.md"]
# The start page includes it.
exclude_patterns = ["docs/README.md"]
# Every reference must lead somewhere; those of built-in errors lead to Python's own documentation, which is not needed here.
nitpicky = True
nitpick_ignore_regex = [("py:exc", r"\w+Error")]

# As GitHub does it: anchors of headings, and quotes and dashes as they are written.
myst_heading_anchors = 4
smartquotes = False

autodoc_default_options = {
    "members": True,
    "special-members": "__call__",
    "inherited-members": True,
}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
# Types are in the docstrings, in words.
autodoc_typehints = "none"
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"hf_var {release}"
# The root of the site leads to the start page.
html_extra_path = ["site"]
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 20
linkcheck_workers = 4
