# SPDX-License-Identifier: Apache-2.0
"""Data sets of class maps: ids are read, cut and distorted as images are, and stay ids."""

import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.data import ImageTransform, TrainingBatches, ValidationBatches, collate, image_rows, tokenizer_fingerprint
from hf_var.data.tokenization import CropTransform, TokenizationConfig

from .samples import encoded, image_rows_of, make_arguments


NUM_CLASSES = 7
DISTORTIONS = {
    "augment_rotation": 20.0,
    "augment_shear": 10.0,
    "augment_translation": 0.2,
    "augment_zoom": 0.3,
    "horizontal_flip": True,
}


def random_ids(shape=(8, 8), seed: int = 0, num_classes: int = NUM_CLASSES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_classes, shape)


def transform_of(args, augment: bool = False, size=(8, 8), num_classes: int = NUM_CLASSES) -> ImageTransform:
    return ImageTransform(args, args if augment else None, size, num_classes, num_classes)


def picture(ids: np.ndarray) -> Image.Image:
    return Image.fromarray(ids.astype(np.uint8 if ids.max() < 256 else np.uint16))


# Of these no centre of a pixel lies between two others, where rounding decides.
@pytest.mark.parametrize("size", [(8, 8), (12, 16), (16, 16), (4, 2)])
@pytest.mark.parametrize("num_classes", [NUM_CLASSES, 300, 40_000])
def test_sizes_change_by_nearest_neighbours(size: tuple[int, int], num_classes: int) -> None:
    ids = random_ids(num_classes=num_classes)
    found = transform_of(make_arguments(), size=size, num_classes=num_classes)(picture(ids))
    assert found.dtype == torch.int64
    assert found.shape == size
    assert set(found.unique().tolist()) <= set(ids.flatten().tolist())
    # As Pillow resizes to the covering size, of which the middle is cut.
    ratio = max(size[0] / 8, size[1] / 8)
    covering = [max(side, round(8 * ratio)) for side in size]
    whole = np.array(picture(ids).resize(covering[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    top, left = (round((whole.shape[axis] - size[axis]) / 2) for axis in (0, 1))
    assert np.array_equal(found.numpy(), whole[top : top + size[0], left : left + size[1]])


def test_a_strip_is_not_enlarged_as_a_whole() -> None:
    ids = np.arange(1, 2000)[None] % NUM_CLASSES
    found = transform_of(make_arguments(), size=(16, 16))(picture(ids))
    assert found.shape == (16, 16)
    assert (found == found[0]).all()
    assert found[0, 8] == ids[0, 999]


@pytest.mark.parametrize("seed", range(5))
def test_a_map_is_cut_and_distorted_as_its_image(seed: int) -> None:
    """Both see the same random numbers: of an image of two flat areas the map of these follows the edge."""
    args = make_arguments(resize_ratio=1.5, **DISTORTIONS)
    ids = np.zeros((40, 40), dtype=np.int64)
    ids[10:30, 10:34] = 1
    pixels = Image.fromarray((ids * 255).astype(np.uint8))
    image = ImageTransform(args, args, (32, 32), 1)(pixels, random.Random(seed))[0]
    found = transform_of(args, augment=True, size=(32, 32), num_classes=2)(picture(ids), random.Random(seed))
    agreement = ((image > 0).long() == found).float().mean()
    assert agreement > 0.97
    assert 0.2 < found.float().mean() < 0.8
    other = transform_of(args, augment=True, size=(32, 32), num_classes=2)(picture(ids), random.Random(seed + 1))
    assert not torch.equal(found, other)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distortions_make_no_new_ids(name: str) -> None:
    ids = np.where(random_ids((16, 16), num_classes=2) > 0, 6, 3)
    args = make_arguments(**{name: DISTORTIONS[name]})
    found = {
        tuple(transform_of(args, augment=True, size=(16, 16))(picture(ids), random.Random(seed)).flatten().tolist())
        for seed in range(6)
    }
    assert len(found) > 1
    # Zero is what a distortion leaves open.
    assert set().union(*found) <= {0, 3, 6}


def class_map_rows(contents: list[bytes | None], **values):
    args = make_arguments(**values)
    dataset = image_rows_of(contents)
    return args, dataset, image_rows(args, None, dataset, (8, 8), NUM_CLASSES, num_classes=NUM_CLASSES)


def test_batches_hold_ids(tmp_path: Path) -> None:
    maps = [random_ids(seed=seed) for seed in range(6)]
    args, dataset, read_row = class_map_rows([encoded(picture(ids)) for ids in maps])
    batches = list(ValidationBatches(dataset, read_row, args))
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 2]
    found = torch.cat([batch["pixel_values"] for batch in batches])
    assert found.dtype == torch.int16
    assert np.array_equal(found.numpy(), np.stack(maps))
    first = next(iter(TrainingBatches(dataset, read_row, args)))
    assert first["pixel_values"].shape == (4, 8, 8)
    # Without a size they keep theirs.
    as_they_are = image_rows(args, None, dataset, None, NUM_CLASSES, num_classes=NUM_CLASSES)
    item = as_they_are(as_they_are.prepare(dataset)[0], random.Random(0))
    assert np.array_equal(item["pixel_values"], maps[0])


def test_many_classes_fit_their_type() -> None:
    assert collate([{"pixel_values": np.full((2, 2), 40_000, dtype=np.int32)}])["pixel_values"].max() == 40_000
    found = transform_of(make_arguments(), num_classes=40_000).pixels(torch.full((1, 8, 8), 39_999, dtype=torch.int32))
    assert found.dtype == np.int32


@pytest.mark.parametrize(
    ("feature", "make"),
    [
        (datasets.Array2D((8, 8), "int32"), lambda ids: ids),
        (datasets.Array2D((8, 8), "uint8"), lambda ids: ids),
        (datasets.Array3D((1, 8, 8), "uint16"), lambda ids: ids[None]),
    ],
    ids=["int32", "uint8", "channel"],
)
def test_columns_of_arrays(feature, make) -> None:
    maps = [random_ids(seed=seed) for seed in range(3)]
    features = datasets.Features({"ids": feature})
    dataset = datasets.Dataset.from_dict({"ids": [make(ids).tolist() for ids in maps]}, features=features)
    read_row = image_rows(make_arguments(), None, dataset, (8, 8), NUM_CLASSES, num_classes=NUM_CLASSES)
    rows = read_row.prepare(dataset)
    for row, ids in zip(rows, maps, strict=True):
        assert np.array_equal(read_row(row, random.Random(0))["pixel_values"], ids)


def test_ids_out_of_range_and_colours_are_broken_images() -> None:
    contents = [encoded(picture(random_ids(seed=seed))) for seed in range(3)]
    colours = encoded(Image.new("RGB", (8, 8)))
    args, dataset, read_row = class_map_rows([*contents, encoded(picture(np.full((8, 8), 7))), colours])
    batches = ValidationBatches(dataset, read_row, args)
    assert sum(len(batch["pixel_values"]) for batch in batches) == 3
    assert batches.broken_images == 2
    with pytest.raises(ValueError, match="class ids must be from 0 to 6, got 7"):
        read_row(read_row.prepare(dataset)[3], random.Random(0))
    with pytest.raises(ValueError, match="class ids have no colours or transparency, got a picture of the mode RGB"):
        read_row(read_row.prepare(dataset)[4], random.Random(0))


@pytest.mark.parametrize(
    ("feature", "rows", "values", "message"),
    [
        (datasets.Value("float32"), [1.0], {}, "`image_column` = 'ids' must hold images or arrays of class ids, got"),
        (
            datasets.Array2D((2, 2), "float32"),
            [[[1.0, 0.0], [0.0, 1.0]]],
            {},
            r"must hold integers of shape \(height, width\).*got float32 of shape \(2, 2\)",
        ),
        (
            datasets.Array3D((3, 1, 1), "uint8"),
            [[[[1]], [[2]], [[3]]]],
            {},
            r"must hold integers of shape \(height, width\).*got uint8 of shape \(3, 1, 1\)",
        ),
        (
            datasets.Array2D((1, 1), "uint8"),
            [[[1]]],
            {"image_range": [0, 9]},
            r"`image_range` is for images, but the tokenizer reads class ids, got \[0, 9\]",
        ),
    ],
    ids=str,
)
def test_columns_that_hold_no_maps(feature, rows, values, message) -> None:
    dataset = datasets.Dataset.from_dict({"ids": rows}, features=datasets.Features({"ids": feature}))
    with pytest.raises(ValueError, match=message):
        image_rows(make_arguments(image_column="ids", **values), None, dataset, (8, 8), 3, num_classes=3)


def test_crops_of_a_tokenization() -> None:
    config = TokenizationConfig(data="", vqvae="", output_dir="", num_crops=3, horizontal_flip=True, resize_ratio=2.0)
    transform = CropTransform(config, (8, 8), NUM_CLASSES, NUM_CLASSES)
    ids = torch.from_numpy(random_ids((16, 16))).to(torch.int16)[None]
    crops = transform.pixels(ids, random.Random(0))
    assert crops.shape == (6, 8, 8)
    assert crops.dtype == np.int16
    assert np.array_equal(crops[1], crops[0][:, ::-1])
    assert not np.array_equal(crops[0], crops[2])


def test_codes_of_other_kinds_of_pixels_have_another_fingerprint() -> None:
    sizes = {"base_channels": 4, "channel_multipliers": (1,), "num_res_blocks": 1, "norm_num_groups": 2}
    fields = {"in_channels": 3, "latent_channels": 2, "codebook_size": 4, "patch_nums": (2,)}
    images = VQVAEModel(VQVAEConfig(**sizes, **fields))
    maps = VQVAEModel(VQVAEConfig(**sizes, **fields, sample_type="class_map"))
    maps.load_state_dict(images.state_dict())
    assert tokenizer_fingerprint(maps) != tokenizer_fingerprint(images)
    averaged = VQVAEModel(VQVAEConfig(**sizes, **fields, codebook_averages=True))
    averaged.load_state_dict(images.state_dict(), strict=False)
    assert tokenizer_fingerprint(averaged) == tokenizer_fingerprint(images)
