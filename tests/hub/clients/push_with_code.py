# SPDX-License-Identifier: Apache-2.0
"""Publishes pipelines with their code, and loads them as one who has hf_var."""

import sys
from pathlib import Path

import numpy
import torch
from diffusers import DiffusionPipeline

import hf_var


INPUTS = {"digits": {"class_labels": [3, 1]}, "emoji": {"prompt": ["red heart", "cat"]}}


def draw(pipe, name: str) -> numpy.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**INPUTS[name], generator=torch.Generator().manual_seed(0), output_type="np").images


def main(reference: str, name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(
        {"digits": hf_var.DIGITS_CHECKPOINT, "emoji": hf_var.EMOJI_CHECKPOINT}[name]
    )
    expected = draw(pipe, name)
    assert expected.std() > 0.02, "the images are grey"
    numpy.save(Path(reference, name), expected)
    pipe.push_to_hub(f"user/{name}", with_code=True)
    # No flag is needed, and no code of the repository is run.
    routes = {}, {"custom_pipeline": f"user/{name}", "trust_remote_code": True}
    for route in routes:
        found = DiffusionPipeline.from_pretrained(f"user/{name}", **route)
        assert type(found) is type(pipe)
        assert type(found.transformer) is type(pipe.transformer)
        numpy.testing.assert_array_equal(draw(found, name), expected)
    assert not [name for name in sys.modules if name.startswith("hf_var_")]


if __name__ == "__main__":
    main(*sys.argv[1:])
