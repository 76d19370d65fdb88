# SPDX-License-Identifier: Apache-2.0
"""Images become model inputs of one size, with and without augmentation."""

import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_var.data import ImageTransform, OrderedImages, ValidationBatches, image_rows, images, load_source

from .samples import Arguments, encoded, image_rows_of, make_arguments, numbered_contents, numbers_in


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


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("fill", [0, 255, 100])
def test_what_a_distortion_leaves_open_is_filled(fill: int, channels: int) -> None:
    # What the picture itself covers is 200.
    image = Image.new({1: "L", 3: "RGB", 4: "RGBA"}[channels], (16, 16), (200,) * channels if channels > 1 else 200)
    distorting = make_transform(
        make_arguments(augment_rotation=45.0, augment_zoom=0.5, augment_fill=fill), (16, 16), channels
    )
    results = torch.stack([distorting(image, random.Random(seed)) for seed in range(20)])
    found = ((results + 1) * 127.5).round().int()
    corners = found[:, :, 0, 0]
    assert {fill, 200} <= set(corners.flatten().tolist())


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


def test_a_strip_is_resized_where_it_is_cut() -> None:
    # As a whole it would be enlarged to 288 x 2,880,000 pixels.
    strip = Image.fromarray(np.tile(np.arange(10_000).astype(np.uint8), (1, 1)))
    for image in (strip, torch.from_numpy(np.array(strip))[None]):
        middle = ImageTransform(make_arguments(), None, (256, 256), 1).pixels(image)
        assert middle.shape == (1, 256, 256)
        # The pixel in the middle and its neighbour fill the square.
        assert np.abs(middle.astype(int) - 5000 % 256).max() <= 1
        args = make_arguments(horizontal_flip=True)
        places = {make_transform(args, (256, 256), 1).pixels(image, random.Random(seed)).mean() for seed in range(5)}
        assert len(places) == 5


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_resizing_the_cut_alone_gives_the_cut_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 90, len(mode)), dtype=np.uint8)
    # Colours are rounded once more where there is transparency.
    pixels[..., 3:] = 255
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels)
    args = make_arguments(resize_ratio=1.3)
    for kind in ("lanczos", "bicubic", "bilinear"):
        args.interpolation = kind
        whole = make_transform(args, (16, 12), len(mode)).pixels(image, random.Random(1))
        with monkeypatch.context() as patch:
            patch.setattr(images, "MOST_ENLARGED", 1)
            part = make_transform(args, (16, 12), len(mode)).pixels(image, random.Random(1))
        assert np.abs(whole.astype(int) - part.astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_as_pandas_and_polars_store_them(kind: str, streaming: bool, tmp_path: Path) -> None:
    contents = numbered_contents(4)
    (tmp_path / "files").mkdir()
    for number, content in enumerate(contents):
        (tmp_path / "files" / str(number)).write_bytes(content)
    texts = {"binary": pa.string(), "large_binary": pa.large_string(), "binary_view": pa.string_view()}[kind]
    content_type = getattr(pa, kind)()
    structures = [{"bytes": content, "path": None} for content in contents]
    paths = [str(tmp_path / "files" / str(number)) for number in range(4)]
    columns = {
        "structure": pa.array(structures, pa.struct([("bytes", content_type), ("path", texts)])),
        "content": pa.array(contents, content_type),
        "path": pa.array(paths, texts),
    }
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    dataset = load_source("train_data", str(tmp_path / "0.parquet"), None, ["train"], streaming)
    for column in (None, "content", "path"):
        args = make_arguments(image_column=column)
        (batch,) = ValidationBatches(dataset, image_rows(args, None, dataset, (8, 8), 1), args)
        assert numbers_in(batch) == [0, 1, 2, 3]


def test_range_and_size_of_files_are_arguments() -> None:
    levels = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    dataset = image_rows_of([encoded(Image.fromarray(levels)), encoded(Image.new("L", (100, 100)))])
    args = make_arguments(image_range=[0, 4095], max_image_pixels=100, max_broken_share=1.0)
    validation = ValidationBatches(dataset, image_rows(args, None, dataset, (8, 8), 1), args)
    (batch,) = validation
    assert validation.broken_images == 1
    assert torch.allclose(batch["pixel_values"][0, 0], torch.from_numpy(levels / 2047.5 - 1).float(), atol=1 / 255)
    for wrong in ([0], [5, 5], [9, 1]):
        with pytest.raises(ValueError, match="`image_range` must be the values of black and white"):
            make_arguments(image_range=wrong)
    arrays = array_rows(np.zeros((2, 3, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="`image_range` is for image files"):
        image_rows(args, None, arrays, (8, 8), 3)


# --------------------------------------------------------------------------------------------------------------------
# All images in their order


@pytest.mark.parametrize("workers", [0, 1])
def test_images_in_any_ranges(workers: int) -> None:
    dataset = image_rows_of(numbered_contents(7))
    config = make_arguments(dataloader_num_workers=workers)
    images_in_order = OrderedImages("the set", dataset, None, 1, config)
    assert (images_in_order.num_images, images_in_order.image_size) == (7, (8, 8))
    pieces = [images_in_order.read(rows) for rows in (range(3), range(3, 4), range(5, 7))]
    assert [piece.dtype for piece in pieces] == [torch.uint8] * 3
    assert torch.cat(pieces)[:, 0, 0, 3].tolist() == [0, 1, 2, 3, 5, 6]
    resized = OrderedImages("the set", dataset, (4, 6), 3, config)
    assert resized.read(range(2)).shape == (2, 3, 4, 6)


def test_broken_images_and_other_sizes_are_refused_by_row() -> None:
    contents = [*numbered_contents(2), b"no image", encoded(Image.new("L", (4, 8)))]
    images_in_order = OrderedImages("the set", image_rows_of(contents), None, 1, make_arguments())
    with pytest.raises(ValueError, match="Row 2 of the set cannot be used: .*UnidentifiedImageError"):
        images_in_order.read(range(1, 3))
    with pytest.raises(ValueError, match="Row 3 of the set cannot be used: it has 8x4 pixels, the first image 8x8"):
        images_in_order.read(range(3, 4))
    with pytest.raises(ValueError, match="Row 0 of the set cannot be used"):
        OrderedImages("the set", image_rows_of([b""]), None, 1, make_arguments())
