# SPDX-License-Identifier: Apache-2.0
"""Columns, transforms and the order of the data."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from hf_var.training.arguments import TrainingArguments
from hf_var.training.data import (
    EndlessDataset,
    check_codes,
    find_image_column,
    find_label_column,
    image_transform,
    label_names,
    training_loader,
)


def make_arguments(**values) -> TrainingArguments:
    return TrainingArguments(train_data="", output_dir="", **values)


def numbers(length: int) -> Dataset:
    return Dataset.from_dict({"number": list(range(length))})


def with_noise(row: dict) -> dict:
    return {"number": row["number"], "noise": torch.rand(())}


def walk(dataset: EndlessDataset, first_step: int = 0, **values) -> list[list]:
    loader = training_loader(dataset, make_arguments(**values), num_processes=1, first_step=first_step)
    return [[batch["number"].tolist(), batch["noise"].tolist()] for batch in loader]


def test_every_epoch_is_a_new_permutation_and_steps_know_no_epochs() -> None:
    batches = walk(EndlessDataset(numbers(10), with_noise, seed=0), max_train_steps=5, train_batch_size=4)
    assert [len(rows) for rows, _ in batches] == [4] * 5
    rows = [row for batch, _ in batches for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert len({noise for _, batch in batches for noise in batch}) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_depend_on_seed_and_position_alone(workers: int) -> None:
    whole = walk(EndlessDataset(numbers(10), with_noise, seed=3), max_train_steps=6, train_batch_size=4)
    rest = walk(
        EndlessDataset(numbers(10), with_noise, seed=3),
        first_step=2,
        max_train_steps=6,
        train_batch_size=4,
        dataloader_num_workers=workers,
    )
    assert rest == whole[2:]
    assert walk(EndlessDataset(numbers(10), with_noise, seed=4), max_train_steps=6, train_batch_size=4) != whole


def test_loading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    walk(EndlessDataset(numbers(10), with_noise, seed=0), max_train_steps=2, train_batch_size=4)
    assert torch.equal(torch.rand(3), expected)


def test_transform_covers_cuts_and_scales() -> None:
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, 15:25] = 255
    transform = image_transform(make_arguments(resize_ratio=1.0), (10, 10), 1, augment=False)
    assert torch.equal(transform(Image.fromarray(pixels)), torch.ones(1, 10, 10))
    assert image_transform(make_arguments(), (6, 8), 3, augment=True)(Image.fromarray(pixels)).shape == (3, 6, 8)
    black = image_transform(make_arguments(), (6, 8), 4, augment=False)(Image.new("RGBA", (3, 5)))
    assert torch.equal(black, torch.full((4, 6, 8), -1.0))


def test_augmentation_is_random_and_off_by_default() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    plain = image_transform(make_arguments(resize_ratio=1.0), (8, 8), 1, augment=True)
    assert torch.equal(plain(image), plain(image))
    for name in ("augment_rotation", "augment_shear"):
        distorting = image_transform(make_arguments(resize_ratio=1.0, **{name: 20.0}), (8, 8), 1, augment=True)
        assert not torch.equal(distorting(image), distorting(image))
    for name in ("augment_translation", "augment_zoom"):
        distorting = image_transform(make_arguments(resize_ratio=1.0, **{name: 0.4}), (8, 8), 1, augment=True)
        assert not torch.equal(distorting(image), distorting(image))


def test_columns_are_found_or_named() -> None:
    features = Features({"picture": Value("string"), "kind": ClassLabel(names=["a", "b"]), "size": Value("int64")})
    dataset = Dataset.from_dict({"picture": ["x"], "kind": [1], "size": [4]}, features=features)
    assert find_label_column(dataset, None) == "kind"
    assert label_names(dataset, "kind") == {0: "a", 1: "b"}
    assert label_names(dataset, "size") == {label: str(label) for label in range(5)}
    with pytest.raises(ValueError, match=r"\['picture', 'kind', 'size'\].*image_column"):
        find_image_column(dataset, None)
    with pytest.raises(ValueError, match="label_column.*num_labels"):
        find_label_column(dataset.remove_columns("kind"), None)


@pytest.mark.parametrize(
    ("codes", "message"), [([[0, 1]], "3 integers"), ([[0, 1, 9]], "codes from 0 to 8"), ([[0.5] * 3], "3 integers")]
)
def test_codes_of_another_tokenizer_are_refused(codes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_codes(Dataset.from_dict({"codes": codes}), length=3, codebook_size=9)
