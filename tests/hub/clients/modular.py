# SPDX-License-Identifier: Apache-2.0
"""Publishes a pipeline and a block, and puts them together on another machine by their names alone."""

import sys
from pathlib import Path

import torch
from diffusers import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from huggingface_hub import HfApi

from hf_var import DIGITS_CHECKPOINT, VARModularPipeline, VARPipeline


def draw(pipe, **inputs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="pt")


def main(block_folder: str) -> None:
    digits = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    digits.push_to_hub("user/digits")
    HfApi().create_repo("user/prompt_to_class")
    HfApi().upload_folder(repo_id="user/prompt_to_class", folder_path=Path(block_folder))

    pipe = ModularPipeline.from_pretrained("user/digits")
    assert type(pipe) is VARModularPipeline
    pipe.load_components()
    expected = draw(digits, class_labels=[3, 1]).images
    assert torch.equal(draw(pipe, class_labels=[3, 1]).images, expected)

    block = ModularPipelineBlocks.from_pretrained("user/prompt_to_class", trust_remote_code=True)
    assert MellonPipelineConfig.load("user/prompt_to_class").node_params["custom"]["input_names"] == ["prompt"]
    blocks = pipe.blocks
    blocks.sub_blocks.insert("prompt_to_class", block, 0)
    pipe = blocks.init_pipeline("user/digits")
    pipe.load_components()
    assert torch.equal(draw(pipe, prompt="a 3 beside a 1").images, expected)

    pipe.save_pretrained("modular", push_to_hub=True, repo_id="user/modular", overwrite_modular_index=True)
    again = ModularPipeline.from_pretrained("user/modular")
    again.load_components()
    assert torch.equal(draw(again, class_labels=[3, 1]).images, expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
