# SPDX-License-Identifier: Apache-2.0
"""`torch.export` of every model: its `forward`, and the graphs that `hf_var.export` writes, for any number of images."""

import numpy as np
import pytest
import torch

from export.drawing import Programs, draw_onnx, noise_of, without_rule
from export.models import MODELS, PIPELINES
from hf_var.export.graphs import find_graphs
from hf_var.export.writing import export_program
from hf_var.text_encoders import text_ids
from pipelines.texts import make_text_pipeline
from pipelines.tiny import seeded


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def compare(found, expected):
    """Floating-point numbers to their rounding, codes exactly."""
    torch.testing.assert_close(tuple(found), tuple(expected), **CLOSE)


def few(kinds, quick):
    """All of `kinds`, of which those that are not `quick` differ from these in details."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", few(MODELS, ("vqvae", "hierarchy", "var", "text", "rq", "cnn", "snail")))
def test_forward_of_any_number_of_images(kind):
    make, make_inputs = MODELS[kind]
    model = make()
    inputs = make_inputs(model, 3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs}).module()
    for batch_size in (3, 2):
        inputs = make_inputs(model, batch_size)
        with torch.no_grad():
            compare(program(**inputs).to_tuple(), model(**inputs).to_tuple())


@pytest.mark.parametrize("kind", few(MODELS, ("var",)))
def test_forward_of_one_number_of_images(kind):
    make, make_inputs = MODELS[kind]
    model = make()
    inputs = make_inputs(model, 1)
    program = torch.export.export(model, (), inputs).module()
    with torch.no_grad():
        compare(program(**inputs).to_tuple(), model(**inputs).to_tuple())


@pytest.mark.parametrize("kind", few(PIPELINES, ("levels",)))
def test_graphs_of_any_number_of_images(kind):
    for graph in find_graphs(PIPELINES[kind]()):
        program = export_program(graph).module()
        for batch_size in (1, 3):
            inputs = [resized(graph, name, batch_size) for name in graph.inputs]
            with torch.no_grad():
                found, expected = program(*inputs), graph.function(graph.modules, *inputs)
            compare(*((each,) if isinstance(each, torch.Tensor) else each for each in (found, expected)))


def resized(graph, name, batch_size):
    """An input of a graph for other sizes than those of its example: one token after an empty cache."""
    sizes = {"batch": batch_size, "text": 3, "tokens": 1, "past": 0}
    example, own = graph.inputs[name], graph.sizes(name)
    shape = [sizes[own[dim]] if dim in own else size for dim, size in enumerate(example.shape)]
    if example.is_floating_point():
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    # Masks and sizes of crops are at least 1; ids may be 0.
    has_zero = not name.endswith(("mask", "crop_sizes"))
    return torch.full(shape, 0 if has_zero else 1, dtype=example.dtype)


@pytest.mark.parametrize("fields", [{}, {"is_causal": False, "crop_conditioning": False}], ids=["causal", "scales"])
def test_the_explicit_cache_draws_the_codes_of_a_pipeline_of_texts(fields):
    pipe = make_text_pipeline(fields)
    graphs = Programs(pipe)
    prompts, settings = ["a red cat", "dark"], {"guidance_scale": 3.0, "top_p": 0.9}
    expected = pipe(prompts, generator=seeded(), output_type="latent", **settings).codes
    pairs = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    ids = text_ids([tokenizer for tokenizer, _ in pairs], [*prompts, "", ""], graphs.description["text_length"])
    text = graphs("text_encoder", text_ids=ids.numpy())
    crops = {} if fields else {"crop_sizes": np.full((4, 2), 512)}
    condition = graphs("condition", **text, **crops)
    sampling = graphs.description["sampling"] | {"guidance_scale": 3.0, "top_p": [0.9] * 3}
    found = draw_onnx.draw(graphs, condition, noise_of(seeded()), **without_rule(sampling))
    np.testing.assert_array_equal(found, expected.numpy())
