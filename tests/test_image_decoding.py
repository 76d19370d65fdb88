# SPDX-License-Identifier: Apache-2.0
"""Files, pictures and arrays of every kind become images of every number of channels."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var.image_decoding import BrokenImageError, decode_image, decode_picture, normalize_pixels, with_channels


RED = (255, 0, 0)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def channels_of(image: Image.Image, num_channels: int) -> list[int]:
    """The first pixel of an image that was stored as a file and read again."""
    pixels = np.asarray(decode_picture(encoded(image), num_channels))
    return pixels[0, 0].ravel().tolist()


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 0
    return image


def colour_with_transparent_colour() -> Image.Image:
    image = Image.new("RGB", (4, 4), RED)
    image.info["transparency"] = RED
    return image


# --------------------------------------------------------------------------------------------------------------------
# Channels


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 100), {1: [100], 2: [100, 255], 3: [100] * 3, 4: [100, 100, 100, 255]}),
        (Image.new("1", (4, 4), 1), {1: [255], 2: [255, 255], 3: [255] * 3, 4: [255] * 4}),
        (Image.new("RGB", (4, 4), RED), {1: [76], 2: [76, 255], 3: [255, 0, 0], 4: [255, 0, 0, 255]}),
        # Half transparent red is pink on white.
        (Image.new("RGBA", (4, 4), (*RED, 128)), {1: [165], 2: [76, 128], 3: [255, 127, 127], 4: [255, 0, 0, 128]}),
        (Image.new("RGBA", (4, 4), (*RED, 0)), {1: [255], 3: [255] * 3, 4: [255, 0, 0, 0]}),
        (Image.new("LA", (4, 4), (0, 0)), {1: [255], 2: [0, 0], 3: [255] * 3, 4: [0, 0, 0, 0]}),
        (palette_with_transparency(), {1: [255], 2: [76, 0], 3: [255] * 3, 4: [255, 0, 0, 0]}),
        (colour_with_transparent_colour(), {1: [255], 3: [255] * 3, 4: [255, 0, 0, 0]}),
        (Image.new("RGB", (4, 4), RED).convert("P"), {1: [76], 3: [255, 0, 0]}),
        # Half of 65535, which 8 bits cut off would show as white.
        (Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)), {1: [128], 2: [128, 255], 3: [128] * 3}),
    ],
    ids=["gray", "bits", "colour", "half", "transparent", "gray-alpha", "palette-alpha", "key", "palette", "16-bit"],
)
def test_every_mode_becomes_every_number_of_channels(image: Image.Image, expected: dict[int, list[int]]) -> None:
    for num_channels, pixel in expected.items():
        assert channels_of(image, num_channels) == pixel, num_channels


def test_modes_that_png_does_not_store() -> None:
    assert np.asarray(with_channels(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), 3))[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(with_channels(Image.new("I", (4, 4), 32896), 1))[0, 0] == 128
    assert np.asarray(with_channels(Image.new("I", (4, 4), 70000), 1))[0, 0] == 255
    with pytest.raises(ValueError, match="no known range"):
        with_channels(Image.new("F", (4, 4)), 1)


def test_files_pictures_and_arrays_give_the_same_tensor(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "image.png")
    expected = torch.from_numpy(pixels).movedim(-1, 0)
    path = tmp_path / "image.png"
    for image in (path, str(path), path.read_bytes(), picture, pixels, pixels[::-1][::-1], expected):
        decoded = decode_image(image, 3)
        assert decoded.dtype == torch.uint8
        assert torch.equal(decoded, expected)
    for image in (pixels / 255, torch.from_numpy(pixels / 255).movedim(-1, 0), (pixels.astype(np.uint16) * 257)):
        assert torch.allclose(normalize_pixels(decode_image(image, 3)), normalize_pixels(expected), atol=1e-6)
    assert decode_image(pixels[..., 0], 1).shape == (1, 5, 7)
    assert decode_image(pixels[..., 0] > 100, 1).unique().tolist() == [0, 255]


def test_pictures_are_turned_as_their_exif_data_say(tmp_path: Path) -> None:
    image = Image.new("L", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter to the right
    image.save(tmp_path / "image.png", exif=exif)
    assert decode_image(tmp_path / "image.png", 1).shape == (1, 8, 4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4)), r"an image: an array of shape \(4, 4, 4\) instead of \(height, width, 3\)"),
        (torch.zeros(4, 4, 4), r"an array of shape \(4, 4, 4\) instead of \(3, height, width\)"),
        (torch.zeros(3, 0, 4), r"shape \(3, 0, 4\)"),
        (np.full((4, 4, 3), 1.5), r"must be in \[0, 1\], got values from 1.5 to 1.5"),
        (np.full((4, 4, 3), np.nan), r"must be in \[0, 1\], got values from nan"),
        (np.zeros((4, 4, 3), dtype=np.int64), "must be uint8 or uint16, or have a known range, got torch.int64"),
        (np.full((4, 4, 3), "a"), "an array of <U1 instead of numbers"),
        (b"no image", "an image without a name: UnidentifiedImageError"),
        (Path("nowhere.png"), "nowhere.png: FileNotFoundError"),
    ],
)
def test_what_is_no_image_is_broken(image: object, message: str) -> None:
    with pytest.raises(BrokenImageError, match=message):
        decode_image(image, 3)
    with pytest.raises(ValueError, match=r"`num_channels` must be one of \[1, 2, 3, 4\] for pictures, got 5"):
        decode_image(Image.new("L", (4, 4)), 5)


# --------------------------------------------------------------------------------------------------------------------
# Ranges and sizes


def test_a_range_that_is_not_that_of_the_type() -> None:
    levels = np.array([[0, 2048, 4095]], dtype=np.uint16)
    for image in (levels, encoded(Image.fromarray(levels)), levels.astype(np.float32), levels.astype(np.int64)):
        decoded = decode_image(image, 1, value_range=(0, 4095))
        pixels = normalize_pixels(decoded)
        assert torch.allclose(pixels, torch.tensor([[[-1.0, 0.0002, 1.0]]]), atol=1 / 127)
    negative = Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32))
    assert decode_image(negative, 1, value_range=(-1000, 1000)).tolist() == [[[0, 128, 255]]]
    floats = Image.fromarray(np.array([[-0.5, 0.0, 0.5]], dtype=np.float32))
    assert decode_image(floats, 1, value_range=(-0.5, 0.5)).tolist() == [[[0, 128, 255]]]
    assert decode_image(Image.new("RGB", (1, 1), (0, 5, 10)), 3, value_range=(0, 10)).ravel().tolist() == [0, 128, 255]
    with pytest.raises(BrokenImageError, match="`image_range` is for gray and for colour without transparency"):
        decode_image(Image.new("RGBA", (2, 2)), 3, value_range=(0, 10))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (np.array([[0, 4095]], dtype=np.uint16), "no value above 4095 .* 12 bits, set `image_range` to 0 and 4095"),
        (np.array([[0, 1000]], dtype=np.uint16), "no value above 1023 .* 10 bits"),
        (np.array([[-5, 70]], dtype=np.int32), "values below 0 or above 65535, which are cut off"),
        (np.array([[0, 70_000]], dtype=np.int32), "values below 0 or above 65535"),
    ],
)
def test_suspicious_ranges_are_warned_of(levels: np.ndarray, message: str) -> None:
    image = Image.fromarray(levels)
    with pytest.warns(UserWarning, match=message):
        decode_picture(image, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_picture(image, 1, value_range=(0, 4095))
        decode_picture(Image.fromarray(np.array([[0, 40_000]], dtype=np.uint16)), 1)
        decode_picture(Image.fromarray(np.zeros((2, 2), dtype=np.uint16)), 1)


def test_large_files_are_refused_before_they_are_decompressed(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(BrokenImageError, match=r"bomb.png: DecompressionBombError: .*200000000 pixels"):
        decode_image(tmp_path / "bomb.png", 1)
    Image.new("L", (20, 10)).save(tmp_path / "small.png")
    with pytest.raises(
        BrokenImageError, match=r"small.png: .*it has 20x10 pixels, more than `max_image_pixels` = 199"
    ):
        decode_image(tmp_path / "small.png", 1, max_pixels=199)
    assert decode_image(tmp_path / "small.png", 1, max_pixels=200).shape == (1, 10, 20)
