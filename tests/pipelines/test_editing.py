# SPDX-License-Identifier: Apache-2.0
"""What in-painting and variations share with generation: outputs, randomness, precision, callbacks, offloading, files."""

import json
import random

import accelerate
import numpy
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback

from hf_var import VARImg2ImgPipeline, VARInpaintPipeline, VARPipeline, VARPipelineOutput
from pipelines.tiny import make_pipeline, make_transformer, make_vqvae, seeded


LABELS = [0, 1, None, 3]
IMAGES = torch.rand(4, 3, 8, 8, generator=seeded(3))
MASKS = torch.zeros(4, 8, 8)
MASKS[:2, :, 4:] = 1
MASKS[2:, 4:] = 1
KINDS = [VARInpaintPipeline, VARImg2ImgPipeline]
SMOOTH = pytest.mark.parametrize("smooth", [False, True])


@pytest.fixture(params=KINDS)
def pipe(request):
    return quiet(request.param(make_transformer(), make_vqvae()))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(pipe, chosen=slice(None)) -> list:
    return [IMAGES[chosen], MASKS[chosen]] if isinstance(pipe, VARInpaintPipeline) else [IMAGES[chosen]]


def draw(pipe, **settings):
    settings = {"generator": seeded(), "output_type": "pt", **settings}
    return pipe(*inputs(pipe), LABELS, **settings)


def assert_equal(output, expected):
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)


def test_output_types_show_the_same_images(pipe):
    pil, array, tensor, latents = (draw(pipe, output_type=kind).images for kind in ("pil", "np", "pt", "latent"))
    assert tensor.shape == (4, 3, 8, 8)
    numpy.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert isinstance(pil[0], PIL.Image.Image)
    numpy.testing.assert_array_equal(numpy.stack(pil), (array * 255).round().astype("uint8"))
    with torch.no_grad():
        assert torch.equal(pipe.vqvae.decode(latents=latents).sample / 2 + 0.5, tensor)
    assert not latents.requires_grad


def test_pictures_are_the_default(pipe):
    output = pipe(*inputs(pipe))
    assert isinstance(output, VARPipelineOutput)
    assert all(isinstance(image, PIL.Image.Image) for image in output.images)
    assert output.codes.shape == (4, 21)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_tuple_holds_what_the_dictionary_holds(pipe, output_type):
    output = draw(pipe, output_type=output_type)
    images, codes = draw(pipe, output_type=output_type, return_dict=False)
    assert torch.equal(codes, output.codes)
    numpy.testing.assert_array_equal(numpy.stack(images), numpy.stack(output.images))


@SMOOTH
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_batch_equals_its_images_one_by_one(pipe, smooth, guidance_scale):
    settings = {"guidance_scale": guidance_scale, "smooth": smooth, "output_type": "pt"}
    together = draw(pipe, generator=[seeded(seed) for seed in range(4)], **settings)
    for seed, label in enumerate(LABELS):
        for generator in (seeded(seed), [seeded(seed)]):
            alone = pipe(*inputs(pipe, slice(seed, seed + 1)), label, generator=generator, **settings)
            assert torch.equal(alone.codes[0], together.codes[seed])
            torch.testing.assert_close(alone.images[0], together.images[seed], rtol=0, atol=1e-4)


def test_images_of_a_label_stand_next_to_each_other(pipe):
    several = draw(pipe, num_images_per_label=2, generator=[seeded(seed) for seed in range(8)])
    twice = [value.repeat_interleave(2, dim=0) for value in inputs(pipe)]
    labels = [label for label in LABELS for _ in range(2)]
    generators = [seeded(seed) for seed in range(8)]
    spelled_out = pipe(*twice, labels, generator=generators, output_type="pt")
    assert_equal(several, spelled_out)
    assert not torch.equal(several.codes[0], several.codes[1])


@SMOOTH
@pytest.mark.parametrize("as_list", [False, True])
def test_global_random_state_is_untouched(pipe, smooth, as_list):
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    draw(pipe, smooth=smooth, generator=[seeded(seed) for seed in range(4)] if as_list else seeded())
    assert torch.equal(torch.get_rng_state(), before[0])
    numpy.testing.assert_array_equal(numpy.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_labels_decide_the_images(pipe):
    first, second = (pipe(*inputs(pipe), label, top_k=1, output_type="latent").codes for label in (0, 1))
    assert not (first == second).all(dim=1).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    expected = draw(pipe, top_k=1)
    pipe.to(dtype)
    output = draw(pipe, top_k=1)
    assert output.images.dtype == dtype
    assert output.images.isfinite().all()
    # Of the images, too, the codes differ where two were nearly as close.
    assert (output.codes == expected.codes).float().mean() > 0.5
    assert draw(pipe, top_k=1, output_type="latent").images.dtype == torch.float32
    assert pipe(*inputs(pipe))[0][0].size == (8, 8)


class Scaled(PipelineCallback):
    """Multiplies the latents after the first scale that is drawn."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == 0:
            callback_kwargs["latents"] = callback_kwargs["latents"] * -3
        return callback_kwargs


def test_callbacks(pipe):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, timestep))
        assert tensors["images"].shape == (4, 3, 8, 8)
        return {}

    expected = draw(pipe, top_k=1)
    names = ["latents", "images"]
    output = draw(pipe, top_k=1, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert_equal(output, expected)
    first = 3 - pipe.num_timesteps
    assert seen == [(step, first + step) for step in range(pipe.num_timesteps)]
    changed = draw(pipe, top_k=1, callback_on_step_end=Scaled())
    assert not torch.allclose(changed.images, expected.images, atol=0.1)


def test_exception_leaves_the_pipeline_as_it_was(pipe):
    def fail(pipe, step, timestep, tensors):
        tensors["latents"].zero_()
        raise RuntimeError("stop")

    expected = draw(pipe)
    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, callback_on_step_end=fail)
    assert_equal(draw(pipe), expected)


def devices(module: torch.nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


@SMOOTH
def test_sequential_offload(pipe, smooth):
    """Weights that are away are on the meta device: whoever computes around a module's hook fails."""
    expected = draw(pipe, smooth=smooth)
    for component in pipe.components.values():
        accelerate.cpu_offload(component, execution_device=torch.device("cpu"), offload_buffers=True)
    for _ in range(2):
        assert devices(pipe.transformer) == devices(pipe.vqvae) == {"meta"}
        assert_equal(draw(pipe, smooth=smooth), expected)


def test_model_offload(pipe):
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    before = {name: component._hf_hook for name, component in pipe.components.items()}
    assert_equal(draw(pipe), expected)
    # The end of a call sends everything away: diffusers does so by attaching new hooks.
    assert all(component._hf_hook is not before[name] for name, component in pipe.components.items())


def test_group_offload(pipe, tmp_path):
    expected = draw(pipe)
    settings = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **settings)

    def overwrite(*args):
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.fill_(float("nan"))

    overwrite()
    assert_equal(draw(pipe, callback_on_step_end=overwrite), expected)


def test_models_in_training_draw_as_in_evaluation(pipe):
    pipe = quiet(type(pipe)(make_transformer(class_dropout_prob=0.9, drop_path_rate=0.9), make_vqvae(dropout=0.5)))
    expected = draw(pipe)
    for model in pipe.components.values():
        model.train()
    assert_equal(draw(pipe), expected)
    assert all(module.training for model in pipe.components.values() for module in model.modules())


def test_pipelines_of_all_kinds_share_their_weights(pipe):
    own = {"guidance_scale": 3.0, "top_p": 0.5, "temperature": 1.5}
    start = VARPipeline(**pipe.components, **own)
    edit = type(pipe).from_pipe(start)
    back = VARPipeline.from_pipe(edit)
    for other in (edit, back):
        assert other.transformer is start.transformer
        assert other.vqvae is start.vqvae
        assert {name: other.config[name] for name in own} == own
    expected = start(LABELS, generator=seeded(), output_type="pt")
    assert_equal(quiet(back)(LABELS, generator=seeded(), output_type="pt"), expected)
    assert_equal(draw(quiet(edit)), draw(pipe, **own))
    assert type(pipe).from_pipe(start, top_p=0.7).config.top_p == 0.7
    other = make_transformer(seed=8)
    assert type(pipe).from_pipe(start, transformer=other).transformer is other
    with pytest.raises(TypeError, match="unknown"):
        type(pipe).from_pipe(start, unknown=1)


def test_sharing_leaves_the_precision_alone(pipe):
    """diffusers' own method turns shared models to fp32, and both pipelines with them."""
    start = VARPipeline(make_transformer().to(torch.bfloat16), make_vqvae())
    edit = type(pipe).from_pipe(start)
    assert {parameter.dtype for parameter in start.transformer.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in edit.vqvae.parameters()} == {torch.float32}
    half = type(pipe).from_pipe(start, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.transformer.parameters()} == {torch.float16}


def test_folders_of_generation_make_editors_and_the_reverse(pipe, tmp_path):
    expected = draw(pipe)
    settings = {"guidance_scale": 3.0, "top_p": 0.5, "temperature": 1.5}
    VARPipeline(**pipe.components, **settings).save_pretrained(tmp_path / "generation")
    loaded = quiet(type(pipe).from_pretrained(tmp_path / "generation"))
    assert type(loaded) is type(pipe)
    assert_equal(draw(loaded), draw(pipe, **settings))
    shared = type(pipe).from_pipe(VARPipeline.from_pretrained(tmp_path / "generation"))
    assert shared.name_or_path == tmp_path / "generation"

    pipe.save_pretrained(tmp_path / "editing")
    index = json.loads((tmp_path / "editing" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == type(pipe).__name__
    assert index["vqvae"] == ["hf_var", "VQVAEModel"]
    for loader in (DiffusionPipeline, type(pipe)):
        loaded = quiet(loader.from_pretrained(tmp_path / "editing"))
        assert type(loaded) is type(pipe)
        assert_equal(draw(loaded), expected)
    generation = quiet(VARPipeline.from_pretrained(tmp_path / "editing"))
    assert_equal(
        generation(LABELS, generator=seeded(), output_type="pt"),
        make_pipeline()(LABELS, generator=seeded(), output_type="pt"),
    )


@pytest.mark.gpu
@SMOOTH
def test_on_an_accelerator(pipe, smooth):
    expected = draw(pipe, smooth=smooth)
    pipe.to(torch.accelerator.current_accelerator())
    output = draw(pipe, smooth=smooth)
    assert (output.codes.cpu() == expected.codes).float().mean() > 0.9
    paste = {"paste_original": True} if isinstance(pipe, VARInpaintPipeline) else {}
    images = pipe(*(value.to(pipe.device) for value in inputs(pipe)), LABELS, output_type="pt", **paste).images
    assert images.device.type == pipe.device.type
