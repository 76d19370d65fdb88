# SPDX-License-Identifier: Apache-2.0
"""The single file of a pipeline. `hub/test_code_files.py` loads repositories that hold one."""

import ast
import json
import logging
import os
import subprocess
import sys

import pytest
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from hf_var import ARPipeline, VARPipeline, VARTextToImagePipeline, code_files
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder, with_code=True)
    return folder


def test_the_files_of_a_folder(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    assert files == {"hf_var.py", "pipeline.py", "transformer/hf_var.py", "vqvae/hf_var.py"}
    assert len({(folder / name).read_text(encoding="utf-8") for name in files - {"pipeline.py"}}) == 1
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "VARPipeline"
    assert index["transformer"] == ["hf_var", "VARTransformer"]


def test_the_folder_is_loaded_without_its_code(folder):
    assert type(DiffusionPipeline.from_pretrained(folder)) is VARPipeline


def test_code_is_written_only_where_it_is_asked_for(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))


def test_what_diffusers_reads_off_the_files(folder, caplog):
    """It looks for files of relative imports, and for packages that are not there."""
    logger = logging.getLogger(dynamic_modules_utils.__name__)
    logger.addHandler(caplog.handler)
    try:
        assert dynamic_modules_utils.check_imports(folder / "hf_var.py") == []
        assert dynamic_modules_utils.check_imports(folder / "pipeline.py") == ["hf_var"]
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    for line in (folder / "hf_var.py").read_text(encoding="utf-8").splitlines():
        assert not line.strip().startswith(("from peft", "from hf_var", "import hf_var"))


@pytest.mark.parametrize("pipeline_class", [VARPipeline, VARTextToImagePipeline, ARPipeline])
def test_the_file_is_whole_and_always_the_same(pipeline_class, tmp_path):
    texts = []
    for name in ("first", "second"):
        code_files.write_code_files(tmp_path / name, pipeline_class, {})
        texts.append((tmp_path / name / "hf_var.py").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert texts[0].startswith("# SPDX-License-Identifier: Apache-2.0\n")
    (branch,) = [node for node in ast.parse(texts[0]).body if isinstance(node, ast.If)]
    defined = {node.name for node in branch.orelse if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {pipeline_class.__name__, "VQVAEModel", "register_attention"} <= defined


def test_lines_inside_of_texts_are_not_moved():
    code = 'def f():\n    x = """a\n b"""\n    return x\n'
    space: dict = {}
    exec(f"if True:\n{code_files._indented(code)}", space)
    assert space["f"]() == "a\n b"


def test_two_meanings_of_a_name_are_refused(tmp_path):
    trees = {tmp_path / "a.py": ast.parse("def f(): ..."), tmp_path / "b.py": ast.parse("from json import f")}
    with pytest.raises(ValueError, match="'f' has two meanings, a and import of json"):
        code_files._check_meanings(trees)


class OwnPipeline(VARPipeline):
    """A pipeline of a user's."""


def test_code_that_is_not_ours_is_refused(tmp_path):
    pipe = OwnPipeline.from_pipe(make_pipeline())
    with pytest.raises(ValueError, match="`with_code` needs a pipeline of hf_var itself, got a OwnPipeline"):
        pipe.save_pretrained(tmp_path, with_code=True)
    with pytest.raises(ValueError, match="`with_code` needs a pipeline of hf_var itself"):
        pipe.push_to_hub("user/own", with_code=True)
    with pytest.raises(ValueError, match="`with_code` must be true or false, got 'yes'"):
        pipe.save_pretrained(tmp_path, with_code="yes")
    assert not list(tmp_path.iterdir())


LOAD_BOTH = """
import importlib.abc, sys, torch
from diffusers import DiffusionPipeline

class WithoutHfVar(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_var":
            raise ModuleNotFoundError("No module named 'hf_var'", name="hf_var")

if {is_blocked}:
    sys.meta_path.insert(0, WithoutHfVar())
else:
    import hf_var
for name in ("first", "second", "first"):
    pipe = DiffusionPipeline.from_pretrained("./" + name, custom_pipeline="./" + name, trust_remote_code=True)
    print(type(pipe).__name__)
"""


@pytest.mark.parametrize("is_blocked", [True, False], ids=["without_hf_var", "with_hf_var"])
def test_folders_are_loaded_one_after_the_other(tmp_path, is_blocked):
    """diffusers gives the files of all local folders the same names."""
    make_pipeline().save_pretrained(tmp_path / "first", with_code=True)
    make_text_pipeline(has_encoders=False).save_pretrained(tmp_path / "second", with_code=True)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD_BOTH.format(is_blocked=is_blocked)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout.split() == ["VARPipeline", "VARTextToImagePipeline", "VARPipeline"], result.stderr
