# SPDX-License-Identifier: Apache-2.0
"""
`pipe.compile()`: the same images, and nothing compiled twice. Tracing is what can fail here, so the quick backend does.
Where a test does not say, a graph for each scale; the tests of what is frozen alone are in test_freezing.py.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_var import VARImg2ImgPipeline, VARInpaintPipeline
from hf_var.pipelines import base
from pipelines.compiled import SETTINGS, assert_same, compile_and_count, draw, make_copy
from pipelines.tiny import make_pipeline, make_transformer, seeded


pytestmark = pytest.mark.usefixtures("fresh_compiler")
either_way = pytest.mark.parametrize("freezing", [False, True], ids=["per_scale", "frozen"])


def kept_cache(pipe):
    """The cache that waits for the next call."""
    return pipe._compiled._cache


@either_way
@pytest.mark.parametrize("settings", SETTINGS)
def test_compiled_models_draw_the_same(pipe, settings, freezing):
    expected = draw(pipe, **settings)
    counter = compile_and_count(pipe, freezing)
    assert counter.frame_count == 0
    assert_same(draw(pipe, **settings), expected)
    compiled = counter.frame_count
    assert compiled > 0
    for _ in range(2):
        assert_same(draw(pipe, **settings), expected)
    assert counter.frame_count == compiled


def test_every_scale_has_one_graph_and_the_decoder_another():
    # More scales than the eight graphs that Dynamo makes of one function.
    patch_nums = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    pipe = make_pipeline(patch_nums=patch_nums, transformer={"num_hidden_layers": 1})
    expected = draw(pipe)
    counter = compile_and_count(pipe)
    for _ in range(2):
        assert_same(draw(pipe), expected)
        assert counter.frame_count == len(patch_nums) + 1
    # Another batch size: again as many.
    draw(pipe, labels=[0])
    assert counter.frame_count == 2 * (len(patch_nums) + 1)
    assert_same(draw(pipe), expected)
    draw(pipe, labels=[0])
    assert counter.frame_count == 2 * (len(patch_nums) + 1)


@pytest.mark.slow
def test_compiled_kernels_draw_the_same(pipe):
    expected = draw(pipe)
    pipe.compile(freezing=False)
    for _ in range(2):
        output = draw(pipe)
        assert torch.equal(output.codes, expected.codes)
        torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-4)


def test_the_cache_stays_between_calls_of_the_same_batch_size(pipe):
    compile_and_count(pipe)
    addresses = []
    for labels in ([0, 1], [2, 3], [0]):
        draw(pipe, labels=labels)
        addresses.append(
            {buffer.data_ptr() for layer in kept_cache(pipe).layers for buffer in (layer.keys, layer.values)}
        )
    assert addresses[0] == addresses[1]
    assert kept_cache(pipe).batch_size == 2


def test_classes_of_the_last_call_are_forgotten(pipe):
    expected = draw(pipe, labels=[2, 3])
    compile_and_count(pipe)
    draw(pipe, labels=[0, 1])
    assert_same(draw(pipe, labels=[2, 3]), expected)


def test_an_interrupted_call_leaves_nothing_behind(pipe):
    def fail(*_):
        raise RuntimeError("stopped by the callback")

    expected = draw(pipe)
    compile_and_count(pipe)
    with pytest.raises(RuntimeError, match="stopped"):
        draw(pipe, callback_on_step_end=fail)
    assert_same(draw(pipe), expected)


def test_changed_weights_are_seen(pipe):
    compile_and_count(pipe)
    before = draw(pipe)
    changed = make_pipeline(transformer={"seed": 5})
    pipe.transformer.load_state_dict(changed.transformer.state_dict())
    expected = draw(changed)
    assert not torch.equal(expected.codes, before.codes)
    assert_same(draw(pipe), expected)


@either_way
def test_an_exchanged_transformer_is_run_as_it_is(pipe, freezing):
    counter = compile_and_count(pipe, freezing)
    pipe.transformer = make_transformer(seed=5)
    assert_same(draw(pipe), draw(make_copy(pipe)))
    # At most the decoder.
    assert counter.frame_count == (0 if freezing else 1)


@either_way
def test_a_refiner_is_run_as_it_is(pipe, freezing):
    models = (make_transformer(seed=7), pipe.transformer)
    expected = [draw(pipe, refiner=model, refiner_start=2) for model in models]
    counter = compile_and_count(pipe, freezing)
    for model, images in zip(models, expected, strict=True):
        assert_same(draw(pipe, refiner=model, refiner_start=2), images)
    # The second scale, or two scales and the decoder.
    assert counter.frame_count == (1 if freezing else 3)


@either_way
@pytest.mark.parametrize("pipeline_class", [VARImg2ImgPipeline, VARInpaintPipeline])
def test_pipelines_that_edit(pipe, pipeline_class, freezing):
    edit = pipeline_class.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 8, 8, generator=seeded())
    inputs = {"image": image, "class_labels": [0, 1], "output_type": "pt"}
    inputs |= {"mask_image": torch.ones(8, 8)} if pipeline_class is VARInpaintPipeline else {"strength": 0.7}

    def run():
        return edit(**inputs, generator=seeded())

    expected = run()
    counter = compile_and_count(edit, freezing)
    assert_same(run(), expected)
    compiled = counter.frame_count
    assert compiled >= (1 if freezing else 2)
    assert_same(run(), expected)
    assert counter.frame_count == compiled


def test_half_precision_after_compiling(pipe):
    compile_and_count(pipe)
    draw(pipe)
    pipe.to(torch.bfloat16)
    twin = make_pipeline().to(torch.bfloat16)
    assert torch.equal(draw(pipe, top_k=1).codes, draw(twin, top_k=1).codes)
    assert {layer.keys.dtype for layer in kept_cache(pipe).layers} == {torch.bfloat16}


def test_onednn_is_chosen_for_the_time_of_a_call(pipe):
    setting, seen = torch.backends.mkldnn.matmul, []

    def note(pipe, step, timestep, tensors):
        seen.append(setting.fp32_precision)
        return {}

    def fail(*_):
        raise RuntimeError("stopped by the callback")

    before = setting.fp32_precision
    expected = draw(pipe, callback_on_step_end=note)
    assert set(seen) == {before}
    pipe.enable_onednn_matmul()
    seen.clear()
    output = draw(pipe, callback_on_step_end=note)
    assert set(seen) == {"bf16"} != {before}
    assert setting.fp32_precision == before
    assert_same(output, expected)
    with pytest.raises(RuntimeError, match="stopped"):
        draw(pipe, callback_on_step_end=fail)
    assert setting.fp32_precision == before
    pipe.disable_onednn_matmul()
    seen.clear()
    draw(pipe, callback_on_step_end=note)
    assert set(seen) == {before}


@pytest.mark.parametrize(
    ("exact", "width", "prefers", "expected"),
    [
        (True, 8, None, True),
        (True, 9, None, False),
        (False, 8, None, False),
        (True, 8, False, False),
        (False, 9, True, True),
    ],
)
def test_onednn_is_the_default_where_it_rounds_nothing_and_gains_time(
    pipe, monkeypatch, exact, width, prefers, expected
):
    monkeypatch.setattr(base, "is_onednn_exact", lambda: exact)
    monkeypatch.setattr(type(pipe), "_onednn_width", pipe.transformer.config.hidden_size + width - 8)
    if prefers is not None:
        (pipe.enable_onednn_matmul if prefers else pipe.disable_onednn_matmul)()
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision == "bf16")
        return {}

    draw(pipe, callback_on_step_end=note)
    assert set(seen) == {expected}


@either_way
def test_a_call_within_a_call_draws_as_it_would_alone(pipe, freezing):
    expected = draw(pipe)
    compile_and_count(pipe, freezing)
    draw(pipe)
    inner = []

    def draw_again(pipe, step, timestep, tensors):
        if step == 0 and not inner:
            inner.append(None)
            inner.append(draw(pipe))
        return tensors

    assert_same(draw(pipe, callback_on_step_end=draw_again), expected)
    assert_same(inner[1], expected)


@either_way
def test_calls_in_two_threads_do_not_share_their_cache(pipe, freezing):
    expected = draw(pipe)
    compile_and_count(pipe, freezing)
    with ThreadPoolExecutor(2) as threads:
        for output in threads.map(lambda _: draw(pipe), range(8)):
            assert torch.equal(output.codes, expected.codes)


def test_a_first_call_that_fails_leaves_nothing_behind(pipe):
    expected = draw(pipe)
    compile_and_count(pipe)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = pipe.transformer.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(pipe)
    handle.remove()
    torch.compiler.reset()
    assert_same(draw(pipe), expected)
    assert kept_cache(pipe).batch_size == 6


@either_way
def test_a_copy_has_models_of_its_own(pipe, freezing):
    # A counter cannot be pickled.
    pipe.compile(freezing=freezing, backend="eager")
    expected = draw(pipe)
    twin = copy.deepcopy(pipe)
    assert type(twin._compiled) is type(pipe._compiled)
    assert twin._compiled.transformer is twin.transformer is not pipe.transformer
    with torch.no_grad():
        twin.vqvae.decoder.conv_out.weight.zero_()
        twin.vqvae.decoder.conv_out.bias.zero_()
    assert (draw(twin).images == 0.5).all()
    twin.transformer.load_state_dict(make_transformer(seed=5).state_dict())
    assert_same(draw(twin), draw(make_copy(twin)))
    assert_same(draw(pipe), expected)
    assert_same(draw(pickle.loads(pickle.dumps(pipe))), expected)


@either_way
def test_after_inference_mode_comes_an_ordinary_call(pipe, freezing):
    expected = draw(pipe)
    compile_and_count(pipe, freezing)
    with torch.inference_mode():
        assert_same(draw(pipe), expected)
    assert_same(draw(pipe), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_replayed_graphs_draw_the_same(settings):
    pipe = make_pipeline().to(torch.accelerator.current_accelerator())
    labels = ([0, 1, None], [2, 3, 4], [0, 1, None], [2])
    expected = [draw(pipe, labels=classes, **settings) for classes in labels]
    pipe.compile()
    # Graphs are recorded in the second call and replayed from the third one on.
    for _ in range(2):
        for classes, images in zip(labels, expected, strict=True):
            output = draw(pipe, labels=classes, **settings)
            assert torch.equal(output.codes, images.codes)
            torch.testing.assert_close(output.images, images.images, rtol=0, atol=1e-4)
