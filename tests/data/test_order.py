# SPDX-License-Identifier: Apache-2.0
"""The order of the data, and that a resumed run continues it exactly."""

import functools
import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.checkpointing import load_custom_state, save_custom_state

from hf_var.data import AnyDataset, LabelCondition, TrainingBatches, image_rows, load_source

from .samples import (
    Arguments,
    image_rows_of,
    make_arguments,
    numbered_contents,
    numbers_in,
    write_folder,
    write_parquet,
    write_webdataset,
)


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    from datasets import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """30 numbered images in four files, as folder, parquet and tar."""
    contents = numbered_contents(30)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("parquet", "tar", "folder")}
    return {
        "parquet": write_parquet(folders["parquet"], contents, shards=4),
        "tar": write_webdataset(folders["tar"], contents, shards=4),
        "folder": write_folder(folders["folder"], contents),
    }


@functools.cache
def load(source: str, streaming: bool) -> AnyDataset:
    return load_source("train_data", source, None, ["train"], streaming)


def make_batches(source: str, args: Arguments, process_index: int = 0, num_processes: int = 1) -> TrainingBatches:
    dataset = load(source, args.streaming)
    read_row = image_rows(args, args, dataset, (8, 8), 1, LabelCondition("cls" if "tar" in source else "label"))
    return TrainingBatches(dataset, read_row, args, args.seed, process_index, num_processes)


def take(batches: TrainingBatches, number: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(batches, number))


def equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "streaming"),
    [("parquet", False), ("parquet", True), ("tar", True), ("folder", True)],
)
def test_resumed_batches_equal_uninterrupted_ones(
    sources: dict[str, str], kind: str, streaming: bool, workers: int, num_processes: int
) -> None:
    # Blocks of 5 rows, row groups of 3, batches of 4 and epochs of 30: every cut falls elsewhere.
    args = make_arguments(
        streaming=streaming,
        shuffle_buffer_size=5,
        dataloader_num_workers=workers,
        horizontal_flip=True,
        augment_rotation=20,
    )
    process = num_processes - 1
    whole = take(make_batches(sources[kind], args, process, num_processes), 12)
    assert len({batch["pixel_values"].sum().item() for batch in whole}) == 12
    cuts = [0, 1, 2, 3, 5, 8, 11] if workers == 0 else [1, 4]
    for cut in cuts:
        killed = make_batches(sources[kind], args, process, num_processes)
        iterator = iter(killed)
        assert equal(list(itertools.islice(iterator, cut)), whole[:cut])
        state = pickle.dumps(killed.state_dict())
        # What the killed run did beyond its checkpoint leaves no trace.
        next(iterator)
        resumed = make_batches(sources[kind], args, process, num_processes)
        resumed.load_state_dict(pickle.loads(state))
        assert equal(take(resumed, 12 - cut), whole[cut:]), cut


def test_a_state_is_small_and_plain(sources: dict[str, str], tmp_path: Path) -> None:
    PartialState()  # for Accelerate's logging
    for streaming in (False, True):
        args = make_arguments(streaming=streaming, shuffle_buffer_size=5)
        batches = make_batches(sources["parquet"], args)
        take(batches, 3)
        state = json.dumps(batches.state_dict())
        assert len(state) < 2000
        # As Accelerate keeps registered objects.
        save_custom_state(batches, str(tmp_path))
        resumed = make_batches(sources["parquet"], args)
        load_custom_state(resumed, str(tmp_path))
        assert json.dumps(resumed.state_dict()) == state


@pytest.mark.parametrize("streaming", [False, True])
def test_a_second_iterator_continues_the_first(sources: dict[str, str], streaming: bool) -> None:
    args = make_arguments(streaming=streaming, shuffle_buffer_size=5)
    whole = take(make_batches(sources["parquet"], args), 6)
    batches = make_batches(sources["parquet"], args)
    assert equal(take(batches, 2) + take(batches, 4), whole)


@pytest.mark.parametrize("kind", ["parquet", "tar", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_epoch_has_every_image_once_in_another_order(
    sources: dict[str, str], kind: str, streaming: bool
) -> None:
    args = make_arguments(streaming=streaming, shuffle_buffer_size=7, train_batch_size=5)
    numbers = [number for batch in take(make_batches(sources[kind], args), 18) for number in numbers_in(batch)]
    epochs = [numbers[first : first + 30] for first in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, sorted(numbers[:30])]}) == 4


def test_labels_belong_to_their_images(sources: dict[str, str]) -> None:
    for kind, streaming in itertools.product(sources, (False, True)):
        args = make_arguments(streaming=streaming, shuffle_buffer_size=7)
        for batch in take(make_batches(sources[kind], args), 3):
            assert batch["class_labels"].tolist() == [number % 3 for number in numbers_in(batch)]


def test_shards_come_in_another_order_every_epoch(sources: dict[str, str]) -> None:
    # With blocks of one row only the shards are shuffled.
    args = make_arguments(streaming=True, shuffle_buffer_size=1, train_batch_size=30)
    epochs = [numbers_in(batch) for batch in take(make_batches(sources["parquet"], args), 6)]
    assert len({tuple(epoch) for epoch in epochs}) > 2
    for epoch in epochs:
        assert sum(after != before + 1 for before, after in itertools.pairwise(epoch)) <= 3


def test_seed_decides_order_and_augmentation(sources: dict[str, str]) -> None:
    for streaming in (False, True):
        values = {"streaming": streaming, "shuffle_buffer_size": 30, "train_batch_size": 30}
        plain = [take(make_batches(sources["parquet"], make_arguments(seed=seed, **values)), 1)[0] for seed in (0, 1)]
        assert numbers_in(plain[0]) != numbers_in(plain[1])
        flipped = [
            take(make_batches(sources["parquet"], make_arguments(seed=seed, horizontal_flip=True, **values)), 1)[0]
            for seed in (0, 1)
        ]
        mirrored = [batch["pixel_values"][:, 0, 7, 0] > -0.5 for batch in flipped]
        assert numbers_in(flipped[0]) == numbers_in(plain[0])
        assert all(5 < flips.sum() < 25 for flips in mirrored)
        assert not torch.equal(*mirrored)


def test_loading_leaves_the_global_generators_alone(sources: dict[str, str]) -> None:
    for streaming in (False, True):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        args = make_arguments(streaming=streaming, horizontal_flip=True, augment_zoom=0.1)
        take(make_batches(sources["parquet"], args), 2)
        assert torch.equal(torch.rand(3), expected)


# --------------------------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_equal_two_accumulated_batches(sources: dict[str, str]) -> None:
    args = make_arguments(horizontal_flip=True)
    alone = take(make_batches(sources["parquet"], args), 10)
    together = [take(make_batches(sources["parquet"], args, process, 2), 5) for process in (0, 1)]
    assert equal([batch for pair in zip(*together, strict=True) for batch in pair], alone)


@pytest.mark.parametrize(("num_processes", "workers"), [(2, 0), (2, 2), (3, 0), (5, 0)])
def test_processes_divide_a_stream_among_them(sources: dict[str, str], num_processes: int, workers: int) -> None:
    # Four shards: twice as many as readers, as many, one more, one less.
    args = make_arguments(streaming=True, shuffle_buffer_size=5, train_batch_size=1, dataloader_num_workers=workers)
    parts = []
    for process in range(num_processes):
        batches = make_batches(sources["tar"], args, process, num_processes)
        parts.append([])
        for batch in batches:
            (state,) = batches.state_dict()["processes"]
            epochs = [reader["epoch"] for reader in state["readers"]]
            if min(epochs) > 0:
                break
            if epochs[state["next_worker"] - 1] == 0:
                parts[-1] += numbers_in(batch)
    assert Counter(number for part in parts for number in part) == Counter(range(30))
    assert all(parts)


def test_processes_draw_their_own_augmentation(sources: dict[str, str]) -> None:
    args = make_arguments(streaming=True, horizontal_flip=True, train_batch_size=15)
    drawn = []
    for process in (0, 1):
        (batch,) = take(make_batches(sources["parquet"], args, process, 2), 1)
        drawn.append((batch["pixel_values"][:, 0, 7, 0] > -0.5).tolist())
    assert all(2 < sum(flips) < 13 for flips in drawn)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_state_of_one_process_is_found_among_all(sources: dict[str, str], streaming: bool) -> None:
    args = make_arguments(streaming=streaming, shuffle_buffer_size=5)
    whole, states = [], []
    for process in (0, 1):
        batches = make_batches(sources["parquet"], args, process, 2)
        whole.append(take(batches, 3))
        states += batches.state_dict()["processes"]
        whole[-1] += take(batches, 2)
    for process in (0, 1):
        resumed = make_batches(sources["parquet"], args, process, 2)
        resumed.load_state_dict({"processes": states})
        assert equal(take(resumed, 2), whole[process][3:])


def test_numbers_of_processes_and_workers_may_change_with_an_index(sources: dict[str, str]) -> None:
    alone = take(make_batches(sources["parquet"], make_arguments()), 8)
    batches = make_batches(sources["parquet"], make_arguments())
    take(batches, 4)
    changed = make_batches(sources["parquet"], make_arguments(dataloader_num_workers=2), 1, 2)
    changed.load_state_dict(batches.state_dict())
    assert equal(take(changed, 2), alone[5::2])
    smaller = make_batches(sources["parquet"], make_arguments(train_batch_size=3))
    with pytest.raises(ValueError, match="after 16 images.*= 3"):
        smaller.load_state_dict(batches.state_dict())


@pytest.mark.parametrize(
    ("changed", "num_processes", "message"),
    [
        ({}, 2, "num_processes 1, got 2"),
        ({"dataloader_num_workers": 2}, 1, "dataloader_num_workers 1, got 2"),
        ({"shuffle_buffer_size": 6}, 1, "shuffle_buffer_size 5, got 6"),
        ({"streaming": False}, 1, "`streaming` must be True"),
    ],
)
def test_a_stream_is_resumed_as_it_was_begun(
    sources: dict[str, str], changed: dict, num_processes: int, message: str
) -> None:
    values = {"streaming": True, "shuffle_buffer_size": 5}
    batches = make_batches(sources["parquet"], make_arguments(**values))
    take(batches, 1)
    resumed = make_batches(sources["parquet"], make_arguments(**(values | changed)), 0, num_processes)
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict(batches.state_dict())


def test_there_are_no_more_workers_than_shards(sources: dict[str, str]) -> None:
    args = make_arguments(streaming=True, dataloader_num_workers=3, shuffle_buffer_size=5)
    batches = make_batches(sources["tar"], args, 0, 2)
    assert len(take(batches, 5)) == 5
    assert len(batches.state_dict()["processes"][0]["readers"]) == 2
    # Parquet files are split into row groups, of which there are enough.
    batches = make_batches(sources["parquet"], args, 0, 2)
    assert len(batches.state_dict()["processes"][0]["readers"]) == 3


def test_a_process_without_rows_is_told() -> None:
    stream = image_rows_of(numbered_contents(2)).to_iterable_dataset()
    args = make_arguments(streaming=True)
    read_row = image_rows(args, args, stream, (8, 8), 1)
    assert len(take(TrainingBatches(stream, read_row, args, 0, 1, 2), 2)) == 2
    with pytest.raises(ValueError, match="no rows for process 2 of 3"):
        take(TrainingBatches(stream, read_row, args, 0, 2, 3), 1)


# --------------------------------------------------------------------------------------------------------------------
# The first images


@pytest.mark.parametrize("streaming", [False, True])
def test_first_items_are_those_of_training_and_move_nothing(sources: dict[str, str], streaming: bool) -> None:
    args = make_arguments(streaming=streaming, shuffle_buffer_size=5, horizontal_flip=True)
    whole = take(make_batches(sources["parquet"], args), 4)
    batches = make_batches(sources["parquet"], args)
    iterator = iter(batches)
    found = [next(iterator), next(iterator)]
    first = batches.first_items(10)
    assert torch.equal(first["pixel_values"], torch.cat([batch["pixel_values"] for batch in whole])[:10])
    assert equal([*found, next(iterator), next(iterator)], whole)
    other = make_batches(sources["parquet"], args, 1, 2).first_items(10)
    assert torch.equal(other["pixel_values"], first["pixel_values"])
