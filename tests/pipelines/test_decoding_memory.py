# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's switches that save memory, in a pipeline."""

import torch

from pipelines.tiny import make_pipeline, seeded


def draw(pipe):
    return pipe([0, 1, None], generator=seeded(), output_type="pt")


def test_slicing_and_tiling_are_the_tokenizer_s():
    pipe = make_pipeline(vqvae={"channel_multipliers": (1, 2, 2)})
    expected = draw(pipe)
    sizes = []
    pipe.vqvae.decoder.levels[-1].register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))

    pipe.vqvae.enable_slicing()
    sliced = draw(pipe)
    assert torch.equal(sliced.codes, expected.codes)
    torch.testing.assert_close(sliced.images, expected.images, rtol=0, atol=1e-5)
    assert [size[0] for size in sizes] == [1, 1, 1]

    sizes.clear()
    pipe.vqvae.enable_tiling(tile_sample_min_size=12)
    tiled = draw(pipe)
    assert torch.equal(tiled.codes, expected.codes)
    # Two rows and two columns of tiles for each image, of 12 of its 16 pixels.
    assert [size[2:] for size in sizes] == [(12, 12)] * 12
    assert 0 < (tiled.images - expected.images).abs().mean() < 0.3 * expected.images.std()

    pipe.vqvae.disable_slicing()
    pipe.vqvae.disable_tiling()
    assert torch.equal(draw(pipe).images, expected.images)
