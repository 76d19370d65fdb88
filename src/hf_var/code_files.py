# SPDX-License-Identifier: Apache-2.0
"""The code of a pipeline as files in its folder, for those who load it without this package."""

import ast
import hashlib
import importlib.util
import io
import re
import sys
from collections.abc import Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from tokenize import generate_tokens, tok_name
from typing import Any


PACKAGE = Path(__file__).parent
# diffusers looks for `["hf_var", class]` of model_index.json in `hf_var.py` of the component's folder.
CODE_FILE, PIPELINE_FILE = "hf_var.py", "pipeline.py"
# Every module has these of its own, and one does for all.
SHARED_NAMES = {"logger", "logging"}

HEADER = '''\
# SPDX-License-Identifier: Apache-2.0
"""
`{pipeline}` and everything that it needs of hf_var {version}, in one file, under the Apache License 2.0.

Generated from the sources of hf_var: change them, not this file.
"""

import importlib.util
import sys
from pathlib import Path


MODULE = "hf_var_{digest}"

if __name__ != MODULE:
    # Each component has a copy of this file, and each copy is run: their classes have to be the same.
    if MODULE not in sys.modules:
        spec = importlib.util.spec_from_file_location(MODULE, __file__)
        sys.modules[MODULE] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[MODULE])
        except BaseException:
            del sys.modules[MODULE]
            raise
    globals().update({{name: value for name, value in vars(sys.modules[MODULE]).items() if name[:2] != "__"}})
else:
    SINGLE_FILE = Path(__file__).read_text(encoding="utf-8")
'''

FOOTER = """
    PIPELINES = {{"{pipeline}": {pipeline}}}
    register_attention()
"""

PIPELINE = '''\
# SPDX-License-Identifier: Apache-2.0
"""`{pipeline}` without hf_var, or of hf_var if that was imported. Generated, as the file that it imports."""

import sys

import diffusers.pipelines


# diffusers runs the files of all local folders under the same names: those of the folder before must not be found.
for _name in [name for name, value in globals().items() if isinstance(value, type)]:
    del globals()[_name]
sys.modules.pop(f"{{__package__}}.hf_var", None)
_installed = getattr(diffusers.pipelines, "hf_var", None)
if _installed is not None:
    {pipeline} = _installed.{pipeline}
else:
    {import_line}

    {pipeline} = _pipelines["{pipeline}"]
'''


def write_code_files(folder: str | PathLike, pipeline_class: type, components: Mapping[str, Any]) -> None:
    """
    Write the code of a pipeline of this package beside its weights: the same single file at the root and in the folder of
    each component of this package, since diffusers downloads no other, and `pipeline.py`.
    """
    check_has_code(pipeline_class)
    code = _code(pipeline_class)
    folders = [Path(folder, name) for name, component in components.items() if is_ours(type(component))]
    for place in (Path(folder), *folders):
        place.mkdir(parents=True, exist_ok=True)
        (place / CODE_FILE).write_text(code, encoding="utf-8")
    # Not in the text above: diffusers reads imports off lines, also off those of the single file, which holds this text.
    import_line = "from .hf_var import PIPELINES as _pipelines"
    text = PIPELINE.format(pipeline=pipeline_class.__name__, import_line=import_line)
    Path(folder, PIPELINE_FILE).write_text(text, encoding="utf-8")


def check_has_code(pipeline_class: type) -> None:
    """Raise a `ValueError` unless the class of a pipeline is one of this package."""
    if not is_ours(pipeline_class):
        raise ValueError(f"`with_code` needs a pipeline of hf_var itself, got a {pipeline_class.__qualname__}.")


def is_ours(kind: type) -> bool:
    """Whether a class is of this package, or of the single file that stands for it."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def is_single_file() -> bool:
    """Whether this is not the package, but the single file that stands for it."""
    return "SINGLE_FILE" in globals()


def _code(pipeline_class: type) -> str:
    """The single file of a pipeline."""
    if is_single_file():
        return globals()["SINGLE_FILE"]
    module: Any = sys.modules[pipeline_class.__module__]
    trees: dict[Path, ast.Module] = {}
    _collect(Path(module.__file__), trees)
    _check_meanings(trees)
    absolute = {line for tree in trees.values() for line in _absolute_imports(tree)}
    bodies = [_body(path, tree) for path, tree in trees.items()]
    code = _indented("\n".join([*sorted(absolute), *bodies]))
    version = re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    values = {"pipeline": pipeline_class.__name__, "version": version[1] if version else ""}
    digest = hashlib.sha256((code + str(values)).encode()).hexdigest()[:12]
    return HEADER.format(**values, digest=digest) + code + FOOTER.format(**values)


def _collect(path: Path, trees: dict[Path, ast.Module]) -> None:
    """Add a module behind all those of this package that it imports."""
    if path in trees:
        return
    tree = _parsed(path)
    for node in _imports(tree):
        if node.level > 0:
            if node not in tree.body or any(alias.asname for alias in node.names):
                raise ValueError(
                    f"{path.name}, line {node.lineno}: one file needs plain imports at the top of a module."
                )
            package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                _collect(_defining(base, alias.name), trees)
    trees[path] = tree


@cache
def _parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, which others do not change."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> list[ast.ImportFrom]:
    """All imports from a module, wherever they stand."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def _defining(module: str, name: str) -> Path:
    """The file of this package that defines what is imported from `module` by this name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    if not path.is_dir():
        return path.with_suffix(".py")
    for node in _parsed(path / "__init__.py").body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _defining(f"{module}.{node.module}", name)
    raise ValueError(f"{module} does not import {name!r}: one file needs names, not modules.")


def _check_meanings(trees: Mapping[Path, ast.Module]) -> None:
    """Raise a `ValueError` if two modules mean different things by one name at their top."""
    meanings: dict[str, str] = {}
    for path, tree in trees.items():
        for node in tree.body:
            names: dict[str, str] = {}
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = {node.name: path.stem}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {
                    part.id: path.stem for each in targets for part in ast.walk(each) if isinstance(part, ast.Name)
                }
            elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
                root = getattr(node, "module", None) or node.names[0].name
                names = {alias.asname or alias.name: f"import of {root.partition('.')[0]}" for alias in node.names}
            for name, meaning in names.items():
                if name not in SHARED_NAMES | {"__all__"} and meanings.setdefault(name, meaning) != meaning:
                    raise ValueError(f"{name!r} has two meanings, {meanings[name]} and {meaning}: one file has one.")


def _absolute_imports(tree: ast.Module) -> list[str]:
    """A line for each name that a module imports from other packages."""
    lines = []
    for node in tree.body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
            source = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
            lines += [f"{source} {ast.unparse(alias)}" for alias in node.names]
    return lines


def _body(path: Path, tree: ast.Module) -> str:
    """A module without its licence, its docstring, its imports and its list of public names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_docstring or is_list or isinstance(node, ast.Import | ast.ImportFrom):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    for node in _imports(tree):
        if node not in tree.body:
            # Of an extra, imported when it is used: diffusers would warn of a line that begins with `from`.
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = f"{line[: node.col_offset]}pass; {line[node.col_offset :]}"
    body = "\n".join(lines[1:]).strip("\n")
    return f"\n\n# {path.relative_to(PACKAGE).as_posix()}\n\n{body}"


def _indented(code: str) -> str:
    """Code as the body of an `if`; the lines inside of texts stay as they are."""
    inside: set[int] = set()
    for token in generate_tokens(io.StringIO(code).readline):
        if tok_name[token.type] in ("STRING", "FSTRING_MIDDLE"):
            inside.update(range(token.start[0] + 1, token.end[0] + 1))
    lines = code.split("\n")
    return "\n".join(
        f"    {line}" if line and number not in inside else line for number, line in enumerate(lines, start=1)
    )
