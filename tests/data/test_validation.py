# SPDX-License-Identifier: Apache-2.0
"""Validation: every image once, however many processes share the work."""

import pytest

from hf_var.data import ValidationBatches, image_rows

from .samples import image_rows_of, make_arguments, numbered_contents, numbers_in


def numbers_of(validation: ValidationBatches) -> list[list[int]]:
    return [numbers_in(batch) for batch in validation]


def make_validation(
    length: int, streaming: bool, workers: int = 0, shards: int = 4, max_images: int | None = None, **shares
) -> ValidationBatches:
    dataset = image_rows_of(numbered_contents(length))
    if streaming:
        dataset = dataset.to_iterable_dataset(num_shards=shards)
    args = make_arguments(
        streaming=streaming, dataloader_num_workers=workers, train_batch_size=4, validation_images=max_images
    )
    return ValidationBatches(dataset, image_rows(args, None, dataset, (8, 8), 1), args, **shares)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_once_and_in_order_as_often_as_asked(streaming: bool) -> None:
    validation = make_validation(10, streaming)
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert numbers_of(validation) == numbers_of(validation) == expected
    assert numbers_of(make_validation(10, streaming, max_images=6)) == [[0, 1, 2, 3], [4, 5]]
    assert numbers_of(make_validation(10, streaming, max_images=60)) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("num_processes", "workers"), [(2, 0), (3, 0), (2, 2), (6, 0)])
@pytest.mark.parametrize("max_images", [None, 13])
def test_processes_share_the_rows(streaming: bool, num_processes: int, workers: int, max_images: int | None) -> None:
    found = []
    for process in range(num_processes):
        shares = {"process_index": process, "num_processes": num_processes, "max_images": max_images}
        found += sum(numbers_of(make_validation(23, streaming, workers, **shares)), [])
    assert sorted(found) == list(range(max_images or 23))


def test_validation_images_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`validation_images` must be at least 1, got 0"):
        make_validation(3, False, max_images=0)
