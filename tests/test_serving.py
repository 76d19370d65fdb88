# SPDX-License-Identifier: Apache-2.0
"""Pipelines in servers: what vLLM-Omni's diffusers adapter, the real file of its wheel, draws with them."""

import importlib
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from hf_var import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT, VARPipeline, VARTextToImagePipeline
from hf_var.serving import WITHOUT_TRIAL_RUN, register_in_vllm_omni
from omni_wheel import ADAPTER, configuration, importable, request, unpack_wheel
from pipelines import tiny_ar
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline, seeded


GROUP = "vllm_omni.general_plugins"
IMAGE = PIL.Image.linear_gradient("L").convert("RGB")
CAPTIONS = ["a red heart", "a green book"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's files can be imported."""
    with importable(unpack_wheel(tmp_path_factory.mktemp("vllm_omni"))):
        yield


@pytest.fixture(scope="module")
def load(server):
    """What loads a pipeline as the server does."""

    def load_adapter(model, **changes):
        adapter = importlib.import_module(ADAPTER).DiffusersAdapterPipeline(
            od_config=configuration(str(model), **changes), device=torch.device("cpu")
        )
        adapter.load_weights()
        adapter._pipeline.set_progress_bar_config(disable=True)
        return adapter

    return load_adapter


@pytest.fixture(scope="module")
def digits(load):
    return load(DIGITS_CHECKPOINT)


@pytest.fixture(scope="module")
def emoji(load):
    return load(EMOJI_CHECKPOINT)


@pytest.fixture(scope="module")
def own_digits():
    return VARPipeline.from_pretrained(DIGITS_CHECKPOINT)


def assert_same(images, others):
    assert len(images) == len(others)
    assert all(np.array_equal(image, other) for image, other in zip(images, others, strict=True))


def test_the_entry_point_is_installed():
    found = [entry for entry in entry_points(group=GROUP) if entry.name == "hf_var"]
    assert found, "install the package again: its metadata has no entry point for vLLM-Omni"
    assert found[0].load() is register_in_vllm_omni


def test_without_the_server_nothing_happens(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_omni.diffusion.registry", None)
    register_in_vllm_omni()
    assert diffusers.VARPipeline is VARPipeline


def test_the_server_loads_the_plugin_and_skips_its_trial_run(server):
    importlib.import_module("vllm_omni.plugins").load_omni_general_plugins()
    trial_frames = importlib.import_module("vllm_omni.diffusion.io_support").get_dummy_run_num_frames
    assert {trial_frames(made.__name__, False) for made in WITHOUT_TRIAL_RUN} == {0}
    # A text of any words is a caption.
    assert trial_frames("VARTextToImagePipeline", False) == 1


@pytest.mark.parametrize(
    "prompt", ["3", {"prompt": "3"}, "id:3", {"prompt": "3", "negative_prompt": "blurred"}], ids=repr
)
def test_a_request_is_a_call(digits, own_digits, prompt):
    sent = request(prompt, seed=5, guidance_scale=2.5, height=512, width=512, num_inference_steps=2)
    expected = own_digits(3, generator=seeded(5), guidance_scale=2.5).images
    assert_same(digits.forward(sent).output, expected)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_several_outputs_of_a_prompt(digits, own_digits, number):
    expected = own_digits(3, generator=seeded(5), guidance_scale=1.0, num_images_per_label=number).images
    assert len(expected) == number
    assert_same(digits.forward(request("3", seed=5, num_outputs_per_prompt=number)).output, expected)


@pytest.mark.parametrize("labels", [[3], [3, 1], [0, 9, 3, 3, 7]], ids=len)
def test_batches(digits, own_digits, labels):
    generators = [seeded(seed) for seed in range(len(labels))]
    images = digits.forward(request(*map(str, labels), generator=generators)).output
    for seed, (image, label) in enumerate(zip(images, labels, strict=True)):
        assert_same([image], own_digits(label, generator=[seeded(seed)], guidance_scale=1.0).images)


def test_an_unknown_label_is_refused(digits):
    with pytest.raises(ValueError, match="`prompt` has the unknown name 'a cat'; the names are in `pipe.id2label`"):
        digits.forward(request("a cat", seed=0))
    with pytest.raises(ValueError, match=r"`prompt` must be in \[0, 10\).*got 12"):
        digits.forward(request("3", "12", seed=0))


def test_captions(emoji):
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    sent = [{"prompt": caption, "negative_prompt": "blue"} for caption in CAPTIONS]
    images = emoji.forward(request(*sent, seed=5, guidance_scale=3.0, num_outputs_per_prompt=2)).output
    expected = {"negative_prompt": ["blue", "blue"], "guidance_scale": 3.0, "num_images_per_prompt": 2}
    assert_same(images, pipe(CAPTIONS, generator=seeded(5), **expected).images)
    # The trial run.
    trial = request("dummy run", seed=0, guidance_scale=0.0, height=512, width=512, num_inference_steps=2)
    assert len(emoji.forward(trial).output) == 1


@pytest.mark.parametrize(
    ("make", "edit", "prompt"),
    [(make_pipeline, "VARImg2ImgPipeline", "1"), (make_text_pipeline, "VARTextImg2ImgPipeline", "a red heart")],
)
def test_images_are_varied(load, tmp_path, make, edit, prompt):
    pipe = getattr(diffusers, edit).from_pipe(make())
    pipe.save_pretrained(tmp_path)
    arguments = {"prompt": prompt, "strength": 0.7, "guidance_scale": 1.0}
    sent = {"prompt": prompt, "multi_modal_data": {"image": IMAGE}}
    images = load(tmp_path).forward(request(sent, seed=5, strength=0.7)).output
    assert_same(images, pipe(image=IMAGE, generator=seeded(5), **arguments).images)


def test_priors_of_raster_order(load, tmp_path):
    pipe = tiny_ar.make_pipeline()
    pipe.save_pretrained(tmp_path)
    assert_same(load(tmp_path).forward(request("2", seed=5)).output, pipe(2, generator=seeded(5)).images)


@pytest.mark.parametrize(("backend", "implementation"), [(None, "sdpa"), ("TORCH_SDPA", "sdpa")])
def test_attention_backends(load, tmp_path, backend, implementation):
    make_pipeline().save_pretrained(tmp_path)
    attention = SimpleNamespace(default=None if backend is None else SimpleNamespace(backend=backend))
    adapter = load(tmp_path, diffusion_attention_config=attention)
    assert adapter._pipeline.transformer.config._attn_implementation == implementation


def test_arguments_of_the_servers_start(load, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    adapter = load(tmp_path, diffusers_call_kwargs={"top_k": 4, "smooth": True, "num_inference_steps": 3})
    images = adapter.forward(request("goldfish", seed=1)).output
    expected = {"top_k": 4, "smooth": True, "guidance_scale": 1.0}
    assert_same(images, pipe("goldfish", generator=seeded(1), **expected).images)
