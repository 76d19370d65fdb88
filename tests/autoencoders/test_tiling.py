# SPDX-License-Identifier: Apache-2.0
"""Slicing leaves the results alone, tiling as far as it can."""

import pytest
import torch
from torch import nn

from hf_var.autoencoders.tiling import map_tiles


def sizes_seen(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what `module` is called with from now on."""
    sizes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    return sizes


@torch.no_grad()
def test_slices_give_what_the_batch_gives(make_vqvae, make_images):
    model = make_vqvae()
    images = make_images(model, batch_size=4)
    encoded = model.encode(images)
    sample = model.decode(encoded.codes).sample
    encoder_sizes, decoder_sizes = sizes_seen(model.encoder), sizes_seen(model.decoder)

    model.enable_slicing()
    sliced = model.encode(images)
    assert torch.equal(sliced.codes, encoded.codes)
    torch.testing.assert_close(sliced.features, encoded.features, rtol=0, atol=1e-5)
    torch.testing.assert_close(sliced.latents, encoded.latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(encoded.codes).sample, sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents=encoded.latents).sample, sample, rtol=0, atol=1e-5)
    assert {size[0] for size in encoder_sizes + decoder_sizes} == {1}
    assert len(encoder_sizes) == 4

    model.disable_slicing()
    assert torch.equal(model.decode(encoded.codes).sample, sample)
    assert decoder_sizes[-1][0] == 4


@torch.no_grad()
def test_images_that_fit_a_tile_are_decoded_as_a_whole(make_vqvae, codes):
    model = make_vqvae()
    sample = model.decode(codes).sample
    model.enable_tiling()
    assert torch.equal(model.decode(codes).sample, sample)
    model.enable_tiling(tile_sample_min_size=8)
    assert torch.equal(model.decode(codes).sample, sample)


@pytest.fixture(scope="module")
def large(make_vqvae):
    """Images of 64x96 pixels, 4 times larger than their latents."""
    return make_vqvae(patch_nums=(1, (4, 6), (16, 24)), channel_multipliers=(1, 2, 2))


@torch.no_grad()
def test_tiles_are_close_to_the_whole_image_and_their_seams_are_smooth(large, make_images):
    codes = large.encode(make_images(large, batch_size=2)).codes
    whole = large.decode(codes).sample
    try:
        large.enable_tiling(tile_sample_min_size=48, tile_overlap_factor=0.25)
        tiled = large.decode(codes).sample
        large.enable_tiling(tile_sample_min_size=64)
        error_of_larger_tiles = (large.decode(codes).sample - whole).abs().mean()
    finally:
        large.disable_tiling()
    assert torch.equal(large.decode(codes).sample, whole)
    assert tiled.shape == whole.shape
    error, contrast = (tiled - whole).abs(), whole.std()
    assert contrast > 0.2
    # A tile normalises over itself alone.
    assert 0 < error_of_larger_tiles < 0.1 * contrast
    assert error_of_larger_tiles < error.mean() < 0.2 * contrast
    # From a pixel to the next one, the error changes by as little at the tiles' edges as elsewhere.
    steps = (tiled - whole).diff(dim=-1).abs().mean(dim=(0, 1, 2))  # (width - 1,)
    assert steps.max() < 4 * steps.mean()


@torch.no_grad()
def test_only_the_finer_levels_work_on_tiles(make_vqvae, make_images):
    model = make_vqvae(patch_nums=(1, (4, 6), (16, 24)), channel_multipliers=(1, 2, 2))
    codes = model.encode(make_images(model, batch_size=2)).codes
    coarse, fine = (sizes_seen(model.decoder.levels[index]) for index in (0, 1))
    encoder = sizes_seen(model.encoder)
    model.enable_tiling(tile_sample_min_size=32)
    model.enable_slicing()
    model.decode(codes)
    assert {size[-2:] for size in coarse} == {(16, 24)}
    assert {(size[0], *size[-2:]) for size in fine} == {(1, 16, 16)}  # positions of two pixels each
    assert len(fine) == 2 * 3 * 4
    model.encode(make_images(model, batch_size=2))
    assert {size[-2:] for size in encoder} == {(64, 96)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention_levels", "whole", "tiles"), [((), 1, 2), ((2,), 1, 2), ((1,), 2, 1), ((0,), 3, 0), ((1, 2), 2, 1)]
)
def test_levels_up_to_the_last_attention_are_decoded_whole(make_vqvae, make_images, attention_levels, whole, tiles):
    model = make_vqvae(patch_nums=(16,), channel_multipliers=(1, 2, 2), attention_levels=attention_levels)
    codes = model.encode(make_images(model, batch_size=2)).codes
    expected = model.decode(codes).sample
    seen = [sizes_seen(level) for level in model.decoder.levels]
    conv_out = sizes_seen(model.decoder.conv_out)
    model.enable_tiling(tile_sample_min_size=32)
    tiled = model.decode(codes).sample
    full = [(16, 16), (32, 32), (64, 64)]
    for index in range(whole):
        assert {size[-2:] for size in seen[index]} == {full[index]}
    for index in range(whole, whole + tiles):
        assert all(size[-1] < full[index][-1] for size in seen[index])
    assert {size[-2:] for size in conv_out} == {(32, 32)}
    assert tiled.shape == expected.shape
    assert 0 < (tiled - expected).abs().mean() < 0.3 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_in_half_precision(make_vqvae, make_images, dtype):
    model = make_vqvae(patch_nums=(1, 8)).to(dtype)
    codes = model.encode(make_images(model)).codes
    whole = model.decode(codes).sample
    model.enable_tiling(tile_sample_min_size=12)
    tiled = model.decode(codes).sample
    assert tiled.dtype == dtype
    assert 0 < (tiled - whole).abs().mean() < 0.2 * whole.float().std()


@torch.no_grad()
@pytest.mark.parametrize(("tile_size", "overlap"), [(4, 0), (4, 1), (5, 2), (6, 3), (7, 1)])
def test_tiles_of_a_function_that_sees_one_position_are_exact(tile_size, overlap):
    maps = torch.randn(2, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    enlarge = nn.Upsample(scale_factor=2)
    tiled = map_tiles(lambda tile: enlarge(tile).square(), maps, 2, tile_size, overlap)
    torch.testing.assert_close(tiled, enlarge(maps).square(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_seam_is_a_ramp():
    # Tiles that know nothing of each other but their mean.
    maps = torch.arange(12.0).expand(1, 1, 4, 12)
    tiled = map_tiles(lambda tile: torch.full_like(tile, tile.mean().item()), maps, 1, tile_size=8, overlap=4)
    row = tiled[0, 0, 0]
    assert row[:4].tolist() == [3.5] * 4
    assert row[8:].tolist() == [7.5] * 4
    torch.testing.assert_close(row[4:8], torch.tensor([4.0, 5.0, 6.0, 7.0]))


def test_a_model_of_one_level(make_vqvae, make_images):
    model = make_vqvae(channel_multipliers=(1,), patch_nums=(1, 8))
    with torch.no_grad():
        codes = model.encode(make_images(model)).codes
        whole = model.decode(codes).sample
        model.enable_tiling(tile_sample_min_size=6)
        assert 0 < (model.decode(codes).sample - whole).abs().mean() < 0.2 * whole.std()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_sample_min_size": 0}, "`tile_sample_min_size` must be at least 1, got 0"),
        ({"tile_sample_min_size": "64"}, "`tile_sample_min_size` must be an integer, at least 1, got '64'"),
        ({"tile_sample_min_size": 64.0}, "`tile_sample_min_size` must be an integer, at least 1, got 64.0"),
        ({"tile_sample_min_size": True}, "`tile_sample_min_size` must be an integer, at least 1, got True"),
        ({"tile_overlap_factor": "0.5"}, "`tile_overlap_factor` must be a number, from 0 to 0.5, got '0.5'"),
        ({"tile_overlap_factor": float("nan")}, "`tile_overlap_factor` must be a number, from 0 to 0.5, got nan"),
        ({"tile_overlap_factor": 0.6}, "`tile_overlap_factor` must be from 0 to 0.5, got 0.6"),
        ({"tile_overlap_factor": -0.1}, "`tile_overlap_factor` must be from 0 to 0.5, got -0.1"),
    ],
)
def test_bad_arguments(make_vqvae, arguments, message):
    model = make_vqvae()
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(**arguments)
    assert not model.use_tiling


@torch.no_grad()
def test_inference_is_channels_last_inside_and_contiguous_outside(make_vqvae, make_images):
    model = make_vqvae()
    seen = []
    for layer in (model.encoder.levels[-1].resnets[0].conv1, model.decoder.conv_out):
        layer.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    output = model.encode(make_images(model))
    sample = model.decode(output.codes).sample
    assert seen == [True, True]
    assert output.features.is_contiguous()
    assert output.latents.is_contiguous()
    assert sample.is_contiguous()
    whole = model(make_images(model))
    assert all(values.is_contiguous() for values in (whole.sample, whole.features, whole.latents))
    # A trainer chooses for itself.
    model.train()(make_images(model))
    assert seen[4:] == [False, False]


def test_sums_in_place_change_nothing_that_is_kept(make_vqvae, make_images):
    """Without gradients blocks reuse memory, but never that of their inputs."""
    model = make_vqvae()
    images = make_images(model)
    kept = images.clone()
    expected = model.encode(images).features
    with torch.no_grad():
        features = model.encode(images).features
        latents = features.clone()
        model.decode(latents=latents)
        for block in (model.encoder.levels[0].resnets[0], model.decoder.levels[0].attentions[0]):
            channels = block.conv1.in_channels if hasattr(block, "conv1") else block.proj_out.in_channels
            hidden_states = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))
            before = hidden_states.clone()
            block(hidden_states)
            assert torch.equal(hidden_states, before)
    assert torch.equal(features, expected.detach())
    assert torch.equal(images, kept)
    assert torch.equal(latents, features)
