# SPDX-License-Identifier: Apache-2.0
"""Images of every kind become inputs of every number of channels."""

import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_var.data import ImageTransform, ValidationBatches, image_rows
from hf_var.image_decoding import decode_picture, with_channels

from .samples import Arguments, encoded, image_rows_of, make_arguments


RED, WHITE = (255, 0, 0), (255, 255, 255)


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


def test_16_bits_keep_their_range() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = ImageTransform(make_arguments(), None, (8, 8), 1)(Image.fromarray(levels))
    assert torch.allclose(pixels[0], torch.from_numpy(levels.astype(np.float32) / 32767.5 - 1), atol=1 / 255)


# --------------------------------------------------------------------------------------------------------------------
# Sizes and augmentation


def make_transform(args: Arguments, image_size: tuple[int, int], num_channels: int) -> ImageTransform:
    """A transform that augments."""
    return ImageTransform(args, args, image_size, num_channels)


def test_transform_covers_cuts_and_scales() -> None:
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, 15:25] = 255
    transform = ImageTransform(make_arguments(), None, (10, 10), 1)
    assert torch.equal(transform(Image.fromarray(pixels)), torch.ones(1, 10, 10))
    black = ImageTransform(make_arguments(), None, (6, 8), 4)(Image.new("RGBA", (3, 5)))
    assert torch.equal(black, torch.full((4, 6, 8), -1.0))


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (5, 20)])
@pytest.mark.parametrize("augment", [False, True])
def test_size_is_height_and_width(size: tuple[int, int], augment: bool) -> None:
    # A ramp to the right: columns differ, rows do not, and the colours never repeat.
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (50, 1)))
    args = make_arguments(resize_ratio=1.125)
    transform = ImageTransform(args, args if augment else None, size, 1)
    pixels = transform(ramp, random.Random(0))
    assert pixels.shape == (1, *size)
    assert (pixels[0].diff(dim=1) > 0).all()
    assert pixels[0].diff(dim=0).abs().max() < 0.02
    # No more than the ratio is lost where the side that counts is cut.
    if size == (5, 20):
        assert pixels.max() - pixels.min() > 0.8 * 2 * 236 / 255


def test_a_larger_ratio_shows_less_at_random_places() -> None:
    image = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1)))
    spans, starts = [], set()
    for ratio in (1.0, 2.0):
        transform = make_transform(make_arguments(resize_ratio=ratio), (16, 16), 1)
        results = [transform(image, random.Random(seed)) for seed in range(20)]
        spans.append((results[0].max() - results[0].min()).item())
        starts = {result[0, 0, 0].item() for result in results}
    assert spans[1] == pytest.approx(spans[0] / 2, rel=0.1)
    assert len(starts) > 5
    centre = ImageTransform(make_arguments(resize_ratio=2.0), None, (16, 16), 1)(image)
    assert centre.mean() == pytest.approx(2 * 118 / 255 - 1, abs=0.02)


def test_augmentation_is_drawn_from_the_generator_and_off_by_default() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    plain = make_transform(make_arguments(), (8, 8), 1)
    assert torch.equal(plain(image, random.Random(0)), plain(image, random.Random(1)))
    amounts = {"augment_rotation": 20.0, "augment_shear": 20.0, "augment_translation": 0.4, "augment_zoom": 0.4}
    for name, amount in amounts.items():
        distorting = make_transform(make_arguments(**{name: amount}), (8, 8), 1)
        assert torch.equal(distorting(image, random.Random(0)), distorting(image, random.Random(0)))
        assert not torch.equal(distorting(image, random.Random(0)), distorting(image, random.Random(1))), name
        quiet = ImageTransform(make_arguments(**{name: amount}), None, (8, 8), 1)
        assert torch.equal(quiet(image), plain(image, random.Random(0)))
    flipping = make_transform(make_arguments(horizontal_flip=True), (8, 8), 1)
    results = [flipping(image, random.Random(seed)) for seed in range(40)]
    mirrored = sum(torch.equal(result, plain(image, random.Random(0)).flip(-1)) for result in results)
    assert 10 < mirrored < 30
    with pytest.raises(ValueError, match="generator"):
        flipping(image)


# --------------------------------------------------------------------------------------------------------------------
# Arrays


def array_rows(arrays: np.ndarray, dtype: str = "uint8") -> datasets.Dataset:
    features = datasets.Features({"spectrum": datasets.Array3D(arrays.shape[1:], dtype)})
    return datasets.Dataset.from_dict({"spectrum": list(arrays)}, features=features)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_arrays_have_as_many_channels_as_they_like(channels: int, streaming: bool) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (6, channels, 8, 10), dtype=np.uint8)
    dataset = array_rows(arrays)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    args = make_arguments()
    read_row = image_rows(args, None, dataset, (8, 10), channels)
    found = torch.cat([batch["pixel_values"] for batch in ValidationBatches(dataset, read_row, args)])
    assert torch.allclose(found, torch.from_numpy(arrays) / 127.5 - 1)


def test_arrays_are_resized_and_augmented_like_images() -> None:
    smooth = np.linspace(0, 255, 40, dtype=np.uint8)
    image = np.stack([np.tile(smooth, (20, 1))] * 3)  # (channels, height, width)
    args = make_arguments(interpolation="bicubic", resize_ratio=1.125)
    transform = ImageTransform(args, None, (8, 12), 3)
    from_array = transform.pixels(torch.from_numpy(image))
    from_image = transform.pixels(Image.fromarray(image.transpose(1, 2, 0)))
    assert from_array.shape == from_image.shape == (3, 8, 12)
    assert np.abs(from_array.astype(int) - from_image.astype(int)).max() <= 1

    args = make_arguments(horizontal_flip=True, resize_ratio=1.5, augment_rotation=20)
    transform = ImageTransform(args, args, (8, 12), 5)
    array = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 20, 20), dtype=np.uint8))
    results = [transform.pixels(array, random.Random(seed)) for seed in (0, 0, 1)]
    assert results[0].shape == (5, 8, 12)
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_what_cannot_become_an_input_is_refused() -> None:
    images = image_rows_of([])
    with pytest.raises(ValueError, match=r"in_channels.*\[1, 2, 3, 4\].*got 5.*Array3D"):
        image_rows(make_arguments(), None, images, (8, 8), 5)
    with pytest.raises(ValueError, match="interpolation.*lanczos.*got 'cubist'"):
        image_rows(make_arguments(interpolation="cubist"), None, images, (8, 8), 3)
    with pytest.raises(ValueError, match="resize_ratio.*got 0.5"):
        image_rows(make_arguments(resize_ratio=0.5), None, images, (8, 8), 3)
    with pytest.raises(ValueError, match="image_column` = 'label' must hold images"):
        image_rows(make_arguments(image_column="label"), None, images, (8, 8), 3)
    arrays = np.zeros((2, 5, 8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"shape \(3, height, width\).*\(5, 8, 8\)"):
        image_rows(make_arguments(), None, array_rows(arrays), (8, 8), 3)
    with pytest.raises(ValueError, match="arrays of bytes.*float32"):
        image_rows(make_arguments(), None, array_rows(arrays.astype(np.float32), "float32"), (8, 8), 5)
