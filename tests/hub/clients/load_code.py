# SPDX-License-Identifier: Apache-2.0
"""One who has no hf_var: loads what `push_with_code.py` published, saves it and loads it again."""

import importlib.abc
import json
import sys
from pathlib import Path


class WithoutHfVar(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        # The code in a repository lies in modules of other names.
        if name.partition(".")[0] == "hf_var":
            raise ModuleNotFoundError("No module named 'hf_var'", name="hf_var")


sys.meta_path.insert(0, WithoutHfVar())

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402


INPUTS = {"digits": {"class_labels": [3, 1]}, "emoji": {"prompt": ["red heart", "cat"]}}


def load(name: str):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(name, custom_pipeline=name)
    return DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)


def main(reference: str, name: str) -> None:
    inputs = INPUTS[name]
    pipe = load(f"user/{name}")
    expected = numpy.load(Path(reference, f"{name}.npy"))
    pipe.save_pretrained(name)
    index = json.loads(Path(name, "model_index.json").read_text(encoding="utf-8"))
    assert index["vqvae"] == ["hf_var", "VQVAEModel"]
    assert Path(name, "hf_var.py").read_text() == Path(name, "vqvae", "hf_var.py").read_text()
    again = load(f"./{name}")
    assert type(again) is type(pipe)
    for found in (pipe, again):
        found.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = found(**inputs, generator=generator, output_type="np").images
        numpy.testing.assert_array_equal(images, expected)
    assert "hf_var" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
