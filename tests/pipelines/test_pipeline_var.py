# SPDX-License-Identifier: Apache-2.0
"""What users of any diffusers pipeline expect of a call: its outputs, its randomness, its precision."""

import inspect
import json
import random

import numpy
import PIL.Image
import pytest
import torch

from hf_var import VARPipeline, VARPipelineOutput
from pipelines.tiny import make_pipeline, make_transformer, make_vqvae, seeded


LABELS = [0, 1, None, 3]


def test_signature():
    parameters = inspect.signature(VARPipeline.__call__).parameters
    assert {name: parameter.default for name, parameter in parameters.items() if name != "self"} == {
        "class_labels": None,
        "prompt": None,
        "guidance_scale": None,
        "top_k": None,
        "top_p": None,
        "temperature": None,
        "smooth": False,
        "num_images_per_label": 1,
        "num_images_per_prompt": 1,
        "generator": None,
        "output_type": "pil",
        "return_dict": True,
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ("latents",),
        "class_embeds": None,
        "logits_processor": None,
        "refiner": None,
        "refiner_start": None,
        "layer_hooks": None,
        "num_candidates": 1,
        "score_fn": None,
    }


def test_defaults_draw_one_unconditional_picture(pipe):
    output = pipe()
    assert isinstance(output, VARPipelineOutput)
    assert len(output.images) == 1
    assert isinstance(output.images[0], PIL.Image.Image)
    assert output.codes.shape == (1, 21)
    assert output.codes.dtype == torch.int64


def test_settings_of_the_checkpoint_are_the_defaults(pipe):
    assert (pipe.config.guidance_scale, pipe.config.top_p, pipe.config.temperature) == (2.5, 0.96, 1.0)
    own = {"guidance_scale": numpy.float32(6.0), "top_p": 0.5, "temperature": 2}
    other = VARPipeline(**pipe.components, **own)
    other.set_progress_bar_config(disable=True)
    assert json.loads(other.to_json_string()).items() >= own.items()
    assert other.guidance_scale == 6
    codes = {}
    for name, settings in {"none": {}, **{name: {name: value} for name, value in own.items()}, "all": own}.items():
        codes[name] = pipe(LABELS, generator=seeded(), output_type="latent", **settings).codes.tolist()
    assert len({str(drawn) for drawn in codes.values()}) == 5, "some of the settings change nothing here"
    assert other(LABELS, generator=seeded(), output_type="latent").codes.tolist() == codes["all"]
    defaults = {"guidance_scale": 2.5, "top_p": 0.96, "temperature": 1.0}
    overridden = other(LABELS, generator=seeded(), output_type="latent", **defaults).codes.tolist()
    assert overridden == codes["none"]


def test_output_types_show_the_same_images(pipe):
    pil, array, tensor, latents = (
        pipe(LABELS, generator=seeded(), output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    )
    assert tensor.shape == (4, 3, 8, 8)
    assert 0 <= tensor.min() < 0.2
    assert 0.8 < tensor.max() <= 1
    assert tensor.std(dim=(1, 2, 3)).min() > 0.1, "the images have no contrast"
    assert array.shape == (4, 8, 8, 3)
    numpy.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in pil] == ["RGB"] * 4
    numpy.testing.assert_array_equal(numpy.stack(pil), (array * 255).round().astype("uint8"))
    assert latents.shape == (4, 4, 4, 4)
    with torch.no_grad():
        decoded = pipe.vqvae.decode(latents=latents).sample
    assert torch.equal(decoded / 2 + 0.5, tensor)


def test_codes_decode_to_the_images(pipe):
    output = pipe(LABELS, generator=seeded(), output_type="pt")
    with torch.no_grad():
        decoded = pipe.vqvae.decode(output.codes).sample
    torch.testing.assert_close(decoded / 2 + 0.5, output.images)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_tuple_holds_what_the_dictionary_holds(pipe, output_type):
    output = pipe(LABELS, generator=seeded(), output_type=output_type)
    images, codes = pipe(LABELS, generator=seeded(), output_type=output_type, return_dict=False)
    assert torch.equal(codes, output.codes)
    assert type(images) is type(output.images)
    numpy.testing.assert_array_equal(numpy.stack(images), numpy.stack(output.images))
    assert torch.equal(output["codes"], output[1])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_have_the_mode_of_their_channels(channels, mode):
    pipe = make_pipeline(vqvae={"in_channels": channels})
    images = pipe([0, 1], generator=seeded()).images
    assert [(image.mode, image.size) for image in images] == [(mode, (8, 8))] * 2


def test_other_channels_come_as_arrays():
    pipe = make_pipeline(vqvae={"in_channels": 3, "out_channels": 2})
    assert pipe(0, output_type="np").images.shape == (1, 8, 8, 2)
    with pytest.raises(ValueError, match="`output_type` must be 'np', 'pt' or 'latent' for images of 2 channels"):
        pipe(0)


@pytest.mark.parametrize("patch_nums", [(4,), (1,), (4, 4, 4), ((1, 1), (1, 2), (2, 5))])
@pytest.mark.parametrize("smooth", [False, True])
def test_schedules(patch_nums, smooth):
    pipe = make_pipeline(patch_nums=patch_nums)
    output = pipe([0, 1], smooth=smooth, generator=seeded(), output_type="pt")
    height, width = pipe.vqvae.config.image_size
    assert output.images.shape == (2, 3, height, width)
    assert output.codes.shape == (2, pipe.transformer.config.length)
    assert pipe.num_timesteps == len(patch_nums)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_batch_equals_its_images_one_by_one(pipe, smooth, guidance_scale):
    settings = {"guidance_scale": guidance_scale, "smooth": smooth, "output_type": "pt"}
    together = pipe(LABELS, generator=[seeded(seed) for seed in range(4)], **settings)
    for seed, label in enumerate(LABELS):
        for generator in (seeded(seed), [seeded(seed)]):
            alone = pipe(label, generator=generator, **settings)
            assert torch.equal(alone.codes[0], together.codes[seed])
            torch.testing.assert_close(alone.images[0], together.images[seed], rtol=0, atol=1e-4)


@pytest.mark.parametrize("smooth", [False, True])
def test_generator_decides_the_images(pipe, smooth):
    first, again, other = (
        pipe([0] * 4, smooth=smooth, generator=seeded(seed), output_type="pt") for seed in (0, 0, 1)
    )
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, other.codes)
    assert len(first.codes.unique(dim=0)) > 1  # images of the same label in one batch differ


def test_generator_goes_on_from_call_to_call(pipe):
    generator = seeded()
    first, second = (pipe([0] * 4, generator=generator, output_type="latent").codes for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_global_random_state_is_untouched(pipe, smooth, as_list):
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    pipe([0, 1], smooth=smooth, generator=[seeded(0), seeded(1)] if as_list else seeded())
    assert torch.equal(torch.get_rng_state(), before[0])
    numpy.testing.assert_array_equal(numpy.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_without_a_generator_the_global_one_is_used(pipe):
    codes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        codes.append(pipe([0] * 4, output_type="latent").codes)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_images_of_a_label_stand_next_to_each_other(pipe):
    generators = [seeded(seed) for seed in range(6)]
    several = pipe([3, None], num_images_per_label=3, generator=generators, output_type="pt")
    generators = [seeded(seed) for seed in range(6)]
    spelled_out = pipe([3, 3, 3, None, None, None], generator=generators, output_type="pt")
    assert torch.equal(several.codes, spelled_out.codes)
    assert torch.equal(several.images, spelled_out.images)
    assert len(pipe(3, num_images_per_label=numpy.int64(2)).images) == 2


def test_labels_decide_the_images(pipe):
    codes = pipe([0, 1, 2, 3, 4, None], top_k=1, output_type="latent").codes
    assert len(codes.unique(dim=0)) == 6


def test_top_k_defaults_to_900_or_the_whole_codebook(pipe):
    settings = {"top_p": 0.0, "output_type": "latent"}
    default = pipe([0] * 8, generator=seeded(), **settings).codes
    everything = pipe([0] * 8, top_k=0, generator=seeded(), **settings).codes
    narrow = pipe([0] * 8, top_k=3, generator=seeded(), **settings).codes
    assert torch.equal(default, everything)
    assert not torch.equal(default, narrow)

    # Nearly uniform, so that the hundred codes left out would be drawn.
    large, settings = make_pipeline(codebook_size=1000), {**settings, "temperature": 20.0}
    default, expected, everything = (
        large([0] * 8, top_k=top_k, generator=seeded(), **settings).codes for top_k in (None, 900, 0)
    )
    assert torch.equal(default, expected)
    assert not torch.equal(default, everything)


def test_narrow_filters_and_low_temperature_are_greedy(pipe):
    greedy, *others = (
        pipe([0, 1, 2], generator=seeded(seed), output_type="latent", **settings).codes
        for seed, settings in enumerate(({"top_k": 1}, {"top_k": 0, "top_p": 1e-6}, {"temperature": 1e-6}))
    )
    assert all(torch.equal(greedy, other) for other in others)


def test_attention_implementations_draw_the_same(pipe):
    expected = pipe(LABELS, top_k=1, output_type="pt")
    assert pipe.transformer.config._attn_implementation == "sdpa"
    pipe.transformer.set_attn_implementation("eager")
    output = pipe(LABELS, top_k=1, output_type="pt")
    assert torch.equal(output.codes, expected.codes)
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-4)


def test_temperature_spreads_the_draws(pipe):
    used = [
        len(pipe([0] * 16, temperature=temperature, generator=seeded(), output_type="latent").codes.unique())
        for temperature in (0.05, 1.0, 3.0)
    ]
    assert used[0] < used[1] < used[2]


def test_calls_leave_no_trace(pipe):
    states = [
        {name: value.clone() for name, value in model.state_dict().items()} for model in pipe.components.values()
    ]
    expected = pipe(LABELS, generator=seeded(), output_type="pt").images
    pipe([0], guidance_scale=1.0, smooth=True, num_images_per_label=2)
    assert torch.equal(pipe(LABELS, generator=seeded(), output_type="pt").images, expected)
    for state, model in zip(states, pipe.components.values(), strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())


def test_no_gradients(pipe):
    output = pipe(0, output_type="latent")
    assert not output.images.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"smooth": True}])
def test_a_decoder_in_half_precision_changes_no_code(dtype, options):
    pipe = make_pipeline()
    expected = pipe([0, 1, None], generator=seeded(), output_type="pt", **options)
    pipe.vqvae.to(dtype)
    found = pipe([0, 1, None], generator=seeded(), output_type="pt", **options)
    assert found.images.dtype == dtype
    assert torch.equal(found.codes, expected.codes)
    assert not torch.equal(found.images.float(), expected.images)
    torch.testing.assert_close(found.images.float(), expected.images, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    settings = {"top_k": 1, "output_type": "pt"}
    expected = pipe([0, 1, 2, 3], **settings)
    pipe.to(dtype)
    assert pipe.dtype == dtype
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {dtype}
    assert {parameter.dtype for parameter in pipe.vqvae.quantizer.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in pipe.vqvae.decoder.parameters()} == {dtype}
    output = pipe([0, 1, 2, 3], **settings)
    assert output.images.dtype == dtype
    assert (output.codes == expected.codes).float().mean() > 0.8
    same = (output.codes == expected.codes).all(dim=1)
    assert same.any()
    torch.testing.assert_close(output.images[same].float(), expected.images[same], rtol=0, atol=0.05)
    # The running reconstruction adds up over the scales, so it stays in fp32.
    assert pipe(0, output_type="latent").images.dtype == torch.float32
    assert pipe(0).images[0].size == (8, 8)
    assert pipe(0, output_type="np", smooth=True).images.dtype == numpy.float32


def test_progress_bar_counts_the_scales(pipe, capfd):
    pipe(0)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(desc="drawing")
    pipe(0)
    shown = capfd.readouterr().err
    assert "drawing" in shown
    assert "3/3" in shown


def test_components_make_further_pipelines(pipe):
    expected = pipe(LABELS, generator=seeded(), output_type="pt").images
    assert pipe.components.keys() == {"transformer", "vqvae"}
    for other in (VARPipeline(**pipe.components), VARPipeline.from_pipe(pipe)):
        other.set_progress_bar_config(disable=True)
        assert other.transformer is pipe.transformer
        assert other.vqvae is pipe.vqvae
        assert torch.equal(other(LABELS, generator=seeded(), output_type="pt").images, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_generator_on_the_cpu_with_a_model_elsewhere(smooth, as_list):
    accelerator = torch.accelerator.current_accelerator()
    pipe = VARPipeline(make_transformer(), make_vqvae())
    settings = {"smooth": smooth, "output_type": "pt"}

    def generators():
        return [seeded(seed) for seed in range(4)] if as_list else seeded()

    expected = pipe(LABELS, generator=generators(), **settings)
    pipe.to(accelerator)
    output = pipe(LABELS, generator=generators(), **settings)
    assert output.images.device.type == output.codes.device.type == accelerator.type
    assert (output.codes.cpu() == expected.codes).float().mean() > 0.9
    there = torch.Generator(accelerator).manual_seed(0)
    assert len(pipe(LABELS, generator=there).images) == 4


def test_models_in_training_draw_as_in_evaluation_and_keep_their_mode():
    pipe = VARPipeline(transformer=make_transformer(class_dropout_prob=0.9, drop_path_rate=0.9), vqvae=make_vqvae())
    pipe.set_progress_bar_config(disable=True)
    for component in (pipe.transformer, pipe.vqvae):
        component.eval()
    expected = pipe(LABELS, generator=seeded(), output_type="pt")
    pipe.transformer.train()
    pipe.transformer.layers[0].eval()
    modes = {name: module.training for name, module in pipe.transformer.named_modules()}

    def fail(*_):
        raise RuntimeError("stopped by the callback")

    output = pipe(LABELS, generator=seeded(), output_type="pt")
    with pytest.raises(RuntimeError, match="stopped"):
        pipe(LABELS, callback_on_step_end=fail)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)
    assert {name: module.training for name, module in pipe.transformer.named_modules()} == modes
