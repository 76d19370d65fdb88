# SPDX-License-Identifier: Apache-2.0
"""The example that draws without torch, and what makes its codes comparable with those of a pipeline."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from hf_var.export.graphs import find_graphs
from hf_var.export.writing import describe, export_program


EXAMPLE = Path(__file__).parents[2] / "examples" / "draw_onnx.py"
_spec = importlib.util.spec_from_file_location("draw_onnx", EXAMPLE)
draw_onnx = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(draw_onnx)


class Programs:
    """The graphs of a pipeline in the example's form, run by torch itself."""

    def __init__(self, pipe):
        graphs = find_graphs(pipe)
        self.description = describe(pipe, graphs)
        self.graphs, self.programs = {graph.name: graph for graph in graphs}, {}

    def __call__(self, name, **inputs):
        if name not in self.programs:
            self.programs[name] = export_program(self.graphs[name]).module()
        described = self.description["graphs"][name]
        with torch.no_grad():
            found = self.programs[name](*(torch.from_numpy(inputs[each]) for each in described["inputs"]))
        found = (found,) if isinstance(found, torch.Tensor) else found
        return {each: value.numpy() for each, value in zip(described["outputs"], found, strict=True)}


def noise_of(generator: torch.Generator):
    """Exponential numbers as the pipelines draw them."""
    return lambda shape: torch.empty(shape).exponential_(generator=generator).numpy()


def without_rule(sampling: dict) -> dict:
    """The settings that the example's `draw` takes."""
    return {name: value for name, value in sampling.items() if name != "guidance_rule"}


def assert_close(found, expected, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
