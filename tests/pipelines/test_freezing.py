# SPDX-License-Identifier: Apache-2.0
"""`pipe.compile()` on a CPU: one graph, whose weights are constants. Tracing is what can fail here, so the quick backend does."""

import shutil

import pytest
import torch
from accelerate import cpu_offload

from hf_var.pipelines.compilation import CompiledModels, FrozenModels
from pipelines.compiled import assert_same, compile_and_count, draw, make_copy
from pipelines.tiny import make_pipeline, make_transformer


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def warnings(monkeypatch):
    """What the frozen transformer warns of."""
    messages = []
    monkeypatch.setattr("hf_var.pipelines.compilation.logger.warning", messages.append)
    return messages


@pytest.mark.parametrize("first", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_one_graph_is_for_all_scales_and_batch_sizes(first, shared_adaln):
    # With guidance as many sequences as there are heads, tokens of a map, AdaLN vectors or channels.
    pipe = make_pipeline(transformer={"num_hidden_layers": 1, "shared_adaln": shared_adaln})
    counter = compile_and_count(pipe, freezing=True)
    for number in (first, 1, 5, 2, first):
        labels = [number % 5] * number
        assert_same(draw(pipe, labels), draw(make_copy(pipe), labels))
        assert counter.frame_count == 1


def test_more_scales_than_dynamo_makes_graphs_of_one_function():
    pipe = make_pipeline(patch_nums=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), transformer={"num_hidden_layers": 1})
    counter = compile_and_count(pipe, freezing=True)
    assert_same(draw(pipe), draw(make_copy(pipe)))
    assert counter.frame_count == 1
    # One sequence: that is where torch has a graph of its own.
    for _ in range(2):
        assert_same(draw(pipe, [3], guidance_scale=1.0), draw(make_copy(pipe), [3], guidance_scale=1.0))
        assert counter.frame_count == 2


def test_the_unconditional_half_is_dropped_without_another_layout():
    pipe = make_pipeline(patch_nums=(1, 2, 3, 4, 5, 6))
    settings = {"labels": [0, 1, 2], "guidance_scale": lambda k, num_scales: 3.0 if k < 3 else 1.0}
    expected = draw(pipe, **settings)
    counter = compile_and_count(pipe, freezing=True)
    assert_same(draw(pipe, **settings), expected)
    assert counter.frame_count == 1


def test_weights_are_constants_while_it_compiles_and_nowhere_else(pipe):
    config = torch._inductor.config
    seen = []

    def note(graph, inputs):
        seen.append(config.freezing)
        return graph.forward

    before = config.freezing
    pipe.compile(freezing=True, backend=note)
    draw(pipe)
    assert seen == [True]
    assert config.freezing == before
    draw(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(config.freezing) or {})
    assert seen == [True, before, before, before]


def test_the_default_on_a_cpu():
    pipe = make_pipeline()
    for arguments, expected in [
        ({}, FrozenModels),
        ({"mode": "max-autotune"}, FrozenModels),
        ({"freezing": True, "backend": "eager"}, FrozenModels),
        ({"backend": "eager"}, CompiledModels),
        ({"freezing": False}, CompiledModels),
    ]:
        pipe.compile(**arguments)
        assert type(pipe._compiled) is expected


def offload(transformer):
    cpu_offload(transformer, execution_device=torch.device("cpu"))


def add_hook(transformer):
    transformer.register_forward_hook(lambda module, inputs, output: None)


def quantize(transformer):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(transformer, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("change", [offload, add_hook, quantize])
def test_what_cannot_be_frozen_is_run_as_it_is(change, warnings):
    pipe = make_pipeline()
    counter = compile_and_count(pipe, freezing=True)
    change(pipe.transformer)
    expected = draw(make_copy(pipe))
    for _ in range(2):
        assert_same(draw(pipe), expected)
    assert counter.frame_count == 0
    assert len(warnings) == 1
    with pytest.raises(ValueError, match="`freezing=True` needs a plain transformer"):
        pipe.compile(freezing=True)
    pipe.compile()
    assert type(pipe._compiled) is CompiledModels


def test_hooks_are_called_at_every_scale(pipe):
    calls = []
    compile_and_count(pipe, freezing=True)
    draw(pipe)
    pipe.transformer.register_forward_hook(lambda module, inputs, output: calls.append(1))
    draw(pipe)
    assert len(calls) == 3


def load(transformer):
    transformer.load_state_dict(make_transformer(seed=5).state_dict())


def write_data(transformer):
    for parameter in transformer.parameters():
        parameter.data.mul_(1.5)


def write_columns(transformer):
    for layer in transformer.layers:
        layer.mlp.fc1.weight.data[:, 1:] *= 1.5


def exchange(transformer):
    transformer.layers[1] = make_transformer(seed=5).layers[1]


def change_one_value(transformer):
    with torch.no_grad():
        transformer.layers[0].mlp.fc1.weight[3, 5] += 100


def halve(transformer):
    transformer.to(torch.bfloat16)


@pytest.mark.parametrize("change", [load, write_data, write_columns, exchange, change_one_value, halve])
def test_changed_weights_are_seen(pipe, warnings, change):
    counter = compile_and_count(pipe, freezing=True)
    before = draw(pipe)
    compiled = counter.frame_count
    change(pipe.transformer)
    expected = draw(make_copy(pipe))
    assert not torch.equal(expected.images, before.images)
    for _ in range(2):
        assert_same(draw(pipe), expected)
    assert counter.frame_count == compiled
    (warning,) = warnings
    assert "compile()" in warning
    again = compile_and_count(pipe, freezing=True)
    output = draw(pipe)
    assert again.frame_count > 0
    assert_same(output, expected)
    assert len(warnings) == 1


def test_weights_that_change_before_the_first_call_are_compiled(pipe, warnings):
    counter = compile_and_count(pipe, freezing=True)
    load(pipe.transformer)
    assert_same(draw(pipe), draw(make_copy(pipe)))
    assert counter.frame_count > 0
    assert not warnings


def test_new_labels_are_no_change_of_the_graph(pipe, warnings):
    counter = compile_and_count(pipe, freezing=True)
    draw(pipe)
    compiled = counter.frame_count
    pipe.transformer.set_labels({0: "crane", 1: "goldfish"})
    assert_same(draw(pipe, [0, 1, None]), draw(make_copy(pipe), [0, 1, None]))
    assert counter.frame_count == compiled
    assert not warnings


def test_autocast_has_a_graph_of_its_own(pipe):
    expected = draw(pipe)
    counter = compile_and_count(pipe, freezing=True)
    assert_same(draw(pipe), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(draw(pipe), draw(make_copy(pipe)))
    assert_same(draw(pipe), expected)
    assert counter.frame_count == 2


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="torch packs fp32 weights where it was built with MKL"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_draw_the_same_and_multiply_packed_weights(dtype):
    pipe = make_pipeline(transformer={"hidden_size": 64, "num_attention_heads": 4}).to(dtype)
    expected = draw(pipe, [2, 3])
    pipe.compile()
    output = draw(pipe, [2, 3])
    if dtype == torch.float32:
        assert torch.equal(output.codes, expected.codes)
        torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-4)
    else:
        # Other roundings make some other draws.
        assert (output.codes == expected.codes).float().mean() > 0.7
    with torch.profiler.profile() as profile:
        draw(pipe, [1, 0, 4])
    calls = {event.key: event.count for event in profile.key_averages()}
    # At two scales: six products in each of two layers, and the head.
    assert calls.get("mkldnn::_linear_pointwise") == 2 * (2 * 6 + 1)
