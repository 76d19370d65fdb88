# SPDX-License-Identifier: Apache-2.0
"""Images as users pass them are read as a training reads them."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var.image_decoding import decode_image, normalize_pixels
from hf_var.pipelines.images import image_pixels, mask_pixels
from pipelines.tiny import make_vqvae


def picture(mode):
    values = np.random.default_rng(0).integers(256, size=(8, 8, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(values[..., 0].astype(np.int32) * 257)
    return Image.fromarray(values).convert(mode) if mode != "RGBA" else Image.fromarray(values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_of_a_training(mode, channels):
    config = make_vqvae(in_channels=channels).config
    image = picture(mode)
    expected = normalize_pixels(decode_image(image, channels))[None]
    torch.testing.assert_close(image_pixels(image, config), expected, rtol=0, atol=1e-6)


def test_16_bits_keep_their_range():
    config = make_vqvae(in_channels=1).config
    pixels = image_pixels(Image.fromarray(np.full((8, 8), 20000, dtype=np.uint16)), config)
    assert ((pixels + 1) * 127.5).round().unique().tolist() == [78]


def test_what_is_transparent_is_white():
    config = make_vqvae(in_channels=1).config
    assert image_pixels(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), config).unique().tolist() == [1]


def painted(mode):
    """A mask whose left half is white, painted on an empty layer where there is one."""
    values = np.zeros((8, 8, 4), dtype=np.uint8)
    values[:, :4] = 255
    if mode == "RGBA":
        return Image.fromarray(values)
    if mode == "I":
        return Image.fromarray(values[..., 0].astype(np.int32))
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(values).convert(mode) if mode == "LA" else Image.fromarray(values[..., :3]).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"])
def test_masks_repaint_what_is_painted_white(mode):
    mask = mask_pixels(painted(mode), make_vqvae().config)
    assert torch.equal(mask[0, 0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8))
