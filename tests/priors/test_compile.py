# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` and `torch.export`. Tracing is what can fail here, so the quick backends do."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_var import VARCache
from priors.tiny import logits_block_by_block, logits_by_calls, tiny_inputs, tiny_model


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compile_training_forward(backend, attention="sdpa"):
    """Check values and gradients of the compiled training forward, and that a second batch compiles nothing."""
    model, twin = (tiny_model(attention, class_dropout_prob=0.0, num_hidden_layers=1).train() for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = tiny_inputs(model.config, seed=seed)
        found, expected = compiled(**inputs), twin(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
        for each, output in ((model, found), (twin, expected)):
            each.zero_grad()
            output.loss.backward()
        for (name, parameter), reference in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, reference.grad, msg=name, **CLOSE)
        assert counter.frame_count == 1


def test_training_forward_compiles_into_one_graph():
    compile_training_forward("aot_eager", attention="sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_forward_compiles_into_one_graph_of_kernels(attention):
    compile_training_forward("inductor", attention)


def test_training_forward_with_all_kinds_of_dropout_compiles():
    model = tiny_model(
        num_hidden_layers=2, drop_path_rate=0.3, dropout=0.1, attention_dropout=0.1, class_dropout_prob=0.5
    ).train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    inputs = tiny_inputs(model.config)
    first, second = (compiled(**inputs).loss for _ in range(2))
    assert counter.frame_count == 1
    # The masks are drawn at run time, not once at tracing.
    assert first != second


def test_steps_of_the_second_image_compile_nothing():
    model = tiny_model(num_hidden_layers=1, patch_nums=(1, 2))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = tiny_inputs(model.config, seed=seed)
        cache = VARCache(model.config)
        logits = logits_by_calls(compiled, inputs, [1, 1], cache)
        torch.testing.assert_close(logits, logits_block_by_block(model, inputs), **CLOSE)
        # One graph for each block.
        assert counter.frame_count == 2


def test_compiled_layers_serve_every_scale():
    """The layers alone compile twice, with the class and without, however many blocks there are."""
    patch_nums = (1, 2, 3, 4, 5, 6, 8)
    model, twin = (tiny_model(num_hidden_layers=1, patch_nums=patch_nums) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    model.layers[0].compile(fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = tiny_inputs(model.config, seed=seed)
        with torch.no_grad():
            logits = logits_block_by_block(model, inputs)
            torch.testing.assert_close(logits, logits_block_by_block(twin, inputs), **CLOSE)
        assert counter.frame_count == 2


@pytest.mark.parametrize("part", ["training", "first_block"])
def test_export(part):
    model = tiny_model(num_hidden_layers=1)
    names = ("class_labels", "scale_inputs", "labels") if part == "training" else ("class_labels",)

    def inputs(batch_size):
        return {name: tiny_inputs(model.config, batch_size)[name] for name in names}

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (), inputs(3), dynamic_shapes={name: {0: batch} for name in names}, strict=False
    )
    for batch_size in (3, 5):
        found, expected = program.module()(**inputs(batch_size)), model(**inputs(batch_size))
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        if part == "training":
            torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
