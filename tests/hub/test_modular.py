# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines and blocks over a Hub."""

import importlib.util
import json
from pathlib import Path

from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "prompt_to_class"


def test_a_pipeline_and_a_block_of_others(run_in_hub_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = Path(__file__).parent / "clients" / "modular.py"
    run_in_hub_process(script, EXAMPLE)


def test_the_example_is_what_its_block_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("block", EXAMPLE / "block.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    block = module.PromptToClassStep()
    block.save_pretrained(tmp_path)
    MellonPipelineConfig.from_custom_block(block, node_label="Prompt to Class").save(tmp_path)
    for name in ("modular_config.json", "mellon_pipeline_config.json"):
        written, shipped = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (tmp_path, EXAMPLE))
        version = "_diffusers_version"
        assert written | {version: None} == shipped | {version: None}
