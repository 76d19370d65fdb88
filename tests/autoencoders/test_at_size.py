# SPDX-License-Identifier: Apache-2.0
"""A tokenizer at another size of images: the same weights, and the results of a model that was made for that size."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from hf_var import VQVAEModel
from hf_var.conversion import load_rqvae, load_taming_vqgan
from parity import load_lineage_case


@pytest.fixture(scope="module")
def plain(make_vqvae):
    return make_vqvae(patch_nums=[4, 4])


@pytest.fixture(scope="module")
def wide_images():
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"patch_nums": [4]},
        {"patch_nums": [4, 4], "refinement_ratio": 0.0},
        {"patch_nums": [(2, 4)] * 3, "num_refinement_convs": 0},
        {"patch_nums": [4], "attention_levels": (0,), "encoder_out_channels": 12},
    ],
    ids=str,
)
def test_it_is_the_model_of_that_size(make_vqvae, wide_images, fields):
    model = make_vqvae(**fields)
    number = len(model.config.patch_nums)
    expected = make_vqvae(**{**fields, "patch_nums": [(4, 6)] * number})
    resized = model.at_size(8, 12)
    assert resized.config.to_dict() == expected.config.to_dict()
    encoded, other = resized.encode(wide_images), expected.encode(wide_images)
    assert torch.equal(encoded.codes, other.codes)
    assert torch.equal(encoded.features, other.features)
    codes = encoded.codes
    assert codes.shape == (2, number * 24)
    assert torch.equal(resized.decode(codes).sample, expected.decode(codes).sample)
    assert torch.equal(resized.latents(codes), expected.latents(codes))
    assert torch.equal(resized.code_vectors(codes), expected.code_vectors(codes))
    assert torch.equal(resized(wide_images).sample, expected(wide_images).sample)
    assert torch.equal(resized.teacher_forcing(codes), expected.teacher_forcing(codes))
    assert torch.equal(resized.soft_codes(encoded.features, stochastic=False)[0], codes)


def test_nothing_is_copied_and_the_original_stays(plain, make_images):
    images = make_images(plain)
    with torch.no_grad():
        before = plain.encode(images).codes
        fields = plain.config.to_dict()
        resized = plain.at_size(16, 8)
        assert torch.equal(plain.encode(images).codes, before)
    assert plain.config.to_dict() == fields
    weights, others = plain.state_dict(keep_vars=True), resized.state_dict(keep_vars=True)
    assert list(weights) == list(others)
    assert all(weights[name] is others[name] for name in weights)
    with pytest.raises(ValueError, match=r"`pixel_values`.*\(batch, 3, 16, 8\)"):
        resized.encode(images)
    # Back again.
    again = resized.at_size(8, 8)
    assert again.config.to_dict() == fields
    assert torch.equal(again.encode(images).codes, before)


@torch.no_grad()
def test_mode_dtype_and_options_come_along(make_vqvae, wide_images):
    model = make_vqvae(patch_nums=[4]).to(torch.bfloat16)
    model.enable_slicing()
    model.enable_tiling(tile_sample_min_size=6, tile_overlap_factor=0.5)
    resized = model.at_size(8, 12)
    assert resized.dtype == torch.bfloat16
    assert (resized.use_slicing, resized.use_tiling) == (True, True)
    assert (resized.tile_sample_min_size, resized.tile_overlap_factor) == (6, 0.5)
    assert not resized.training
    assert not any(module.training for module in resized.modules())
    assert resized.decode(resized.encode(wide_images).codes).sample.dtype == torch.bfloat16
    assert model.train().at_size(8, 12).training
    # What happens to the weights later happens to both.
    model.float()
    assert resized.dtype == torch.float32


def test_gradients_reach_the_shared_weights(make_vqvae, wide_images):
    model = make_vqvae(patch_nums=[4], num_refinement_convs=1).train()
    output = model.at_size(8, 12)(wide_images)
    (output.loss + output.sample.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.ndim > 1)


def test_it_is_saved_with_its_size(plain, tmp_path):
    plain.at_size(8, 12).save_pretrained(tmp_path)
    loaded = VQVAEModel.from_pretrained(tmp_path)
    assert loaded.config.image_size == (8, 12)
    assert torch.equal(loaded.codebook.weight, plain.codebook.weight)


@torch.no_grad()
def test_offloaded_weights_are_brought_back(make_vqvae, wide_images, tmp_path):
    expected = make_vqvae(patch_nums=[4]).at_size(8, 12)
    codes = expected.encode(wide_images).codes
    sample = expected.decode(codes).sample

    model = make_vqvae(patch_nums=[4])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    resized = model.at_size(8, 12)
    assert torch.equal(resized.encode(wide_images).codes, codes)
    assert torch.equal(resized.decode(codes).sample, sample)

    model = make_vqvae(patch_nums=[4])
    model, _ = accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    resized = model.at_size(8, 12)
    assert torch.equal(resized.encode(wide_images).codes, codes)
    assert resized._hf_hook is model._hf_hook

    for number, offload_type in enumerate(("leaf_level", "block_level")):
        model = make_vqvae(patch_nums=[4])
        settings = {"onload_device": "cpu", "offload_device": "cpu", "num_blocks_per_group": 1}
        apply_group_offloading(
            model, offload_type=offload_type, offload_to_disk_path=str(tmp_path / str(number)), **settings
        )
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        resized = model.at_size(8, 12)
        assert torch.equal(resized.encode(wide_images).codes, codes)
        assert torch.equal(resized.decode(codes).sample, sample)
        assert torch.equal(resized.latents(codes), expected.latents(codes))


@pytest.mark.parity
@torch.no_grad()
def test_converted_models_at_their_images_size():
    case = load_lineage_case("vqgan", "plain")
    encoded = (
        load_taming_vqgan(case.weights)
        .at_size(*case.manifest["image_sizes"]["plain"])
        .encode(case.inputs["plain/pixels"])
    )
    case.assert_close("plain/codes", encoded.codes)
    case = load_lineage_case("rqvae", "rqvae")
    model = load_rqvae(case.weights).at_size(*case.inputs["pixels"].shape[-2:])
    case.assert_close("feat", model.encode(case.inputs["pixels"]).features)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 9), "`width` must be a multiple of 2, the downsampling factor, got 9"),
        ((7, 8), "`height` must be a multiple of 2, the downsampling factor, got 7"),
        ((0, 8), "`height` must be at least 1, got 0"),
        ((8.0, 8), "`height` must be an integer, at least 1, got 8.0"),
        ((8, True), "`width` must be an integer, at least 1, got True"),
    ],
)
def test_wrong_sizes(plain, size, message):
    with pytest.raises(ValueError, match=message):
        plain.at_size(*size)


def test_growing_maps_have_one_size(vqvae):
    with pytest.raises(ValueError, match=r"`patch_nums` must be maps of one size for `at_size`, got \[1, 2, 4\]"):
        vqvae.at_size(8, 8)
