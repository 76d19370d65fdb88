# SPDX-License-Identifier: Apache-2.0
"""Proposed schedules: the released ones where there are any, and what holds for all."""

import math

import pytest

from hf_var import VARConfig, VQVAEConfig
from hf_var.schedules import RELEASED_PATCH_NUMS, propose_schedules


@pytest.mark.parametrize("image_size", RELEASED_PATCH_NUMS)
def test_released_schedules_are_proposed_for_their_sizes(image_size):
    for size in (image_size, (image_size, image_size)):
        assert propose_schedules(size, 16)[0].patch_nums == list(RELEASED_PATCH_NUMS[image_size])
    # The grid counts, not the pixels.
    assert propose_schedules(image_size // 2, 8) == propose_schedules(image_size, 16)
    assert [len(RELEASED_PATCH_NUMS[256]), propose_schedules(256)[0].num_tokens] == [10, 680]


@pytest.mark.parametrize(
    ("image_size", "downsampling", "patch_nums", "num_tokens"),
    [
        (1, 1, [1], 1),
        (8, 4, [1, 2], 5),
        (16, 4, [1, 2, 3, 4], 30),
        # As the recipes of CIFAR-10 and of emoji have it.
        (32, 4, [1, 2, 3, 4, 6, 8], 130),
        # Factors (20 / 4)^(1/6) = 1.308: 5.23, 6.84, 8.95, 11.70, 15.30.
        (320, 16, [1, 2, 3, 4, 5, 7, 9, 12, 15, 20], 954),
        # The square of this area has the side 14.70, and sqrt(12 / 18) = 0.816: for the side 2, 1.63 x 2.45; for 3, 2.45 x 3.67;
        # then 3.27 x 4.90, and by factors of (14.70 / 4)^(1/5) = 1.297 4.24 x 6.36, 5.49 x 8.24, 7.13 x 10.69, 9.25 x 13.87.
        ((192, 288), 16, [1, 2, [2, 4], [3, 5], [4, 6], [5, 8], [7, 11], [9, 14], [12, 18]], 511),
        ((288, 192), 16, [1, 2, [4, 2], [5, 3], [6, 4], [8, 5], [11, 7], [14, 9], [18, 12]], 511),
        # The sides released for the square of this area, 16: halved and doubled.
        ((128, 512), 16, [1, [1, 4], [2, 6], [2, 8], [3, 10], [3, 12], [4, 16], [5, 20], [7, 26], [8, 32]], 701),
        # Lines, of 4, 9 and 16 positions and by factors of 2^(1/3) of the side more.
        ((16, 1024), 16, [1, [1, 4], [1, 9], [1, 16], [1, 32], [1, 64]], 126),
    ],
)
def test_schedules_by_hand(image_size, downsampling, patch_nums, num_tokens):
    schedule = propose_schedules(image_size, downsampling)[0]
    assert (schedule.patch_nums, schedule.num_tokens) == (patch_nums, num_tokens)
    assert sum(schedule.scale_lengths) == num_tokens


@pytest.mark.parametrize("height", [1, 2, 3, 5, 7, 8, 12, 17, 24, 33, 64])
def test_what_holds_for_every_proposal(height):
    for width in (1, 2, 3, 4, 6, 9, 16, 24, 31, 48, 100):
        proposals = propose_schedules((16 * height, 16 * width), 16)
        tokens = [schedule.num_tokens for schedule in proposals]
        assert len(set(tokens)) == len(tokens) <= 3
        for schedule in proposals:
            config = VARConfig(patch_nums=schedule.patch_nums)
            # As the models take it, and as a configuration gives it back.
            assert VQVAEConfig(patch_nums=schedule.patch_nums).image_size == (16 * height, 16 * width)
            assert (config.patch_nums, config.scale_lengths) == (schedule.patch_nums, schedule.scale_lengths)
            sizes = config.scale_sizes
            assert (sizes[0], sizes[-1]) == ((1, 1), (height, width))
            for before, after in zip(sizes[:-1], sizes[1:], strict=True):
                assert before[0] <= after[0]
                assert before[1] <= after[1]
                assert math.prod(before) < math.prod(after)
        turned = propose_schedules((16 * width, 16 * height), 16)
        assert [schedule.scale_lengths for schedule in turned] == [schedule.scale_lengths for schedule in proposals]


def test_proposals_grow_as_the_released_schedules_do():
    for side in range(8, 129):
        schedule = propose_schedules(side, 1)[0]
        ratio = schedule.num_tokens / side**2
        assert 1.9 < ratio < 2.8
        num_steps = len(schedule.patch_nums) - 4
        assert 1.2 <= (side / 4) ** (1 / num_steps) <= 1.5


def test_a_budget_of_tokens_is_kept():
    usual, fewer, more = propose_schedules(256)
    assert fewer.num_tokens < usual.num_tokens < more.num_tokens
    for budget in range(341, 800, 3):
        proposals = propose_schedules(256, max_tokens=budget)
        assert all(schedule.num_tokens <= budget for schedule in proposals)
        assert (proposals[0] == usual) is (budget >= usual.num_tokens)
        if budget < usual.num_tokens:
            assert proposals[0].num_tokens == max(schedule.num_tokens for schedule in proposals)
    assert propose_schedules(256, max_tokens=341)[0].patch_nums == [1, 2, 4, 8, 16]
    with pytest.raises(ValueError, match="`max_tokens` must be at least 341 for a grid of 16x16, .* got 340"):
        propose_schedules(256, max_tokens=340)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`image_size` must be a positive integer or a .* got 0"),
        ((-16,), "`image_size` must be .* got -16"),
        ((256.0,), "`image_size` must be .* got 256.0"),
        (((16, 16, 16),), "`image_size` must be"),
        (("256",), "`image_size` must be"),
        (
            ((200, 288),),
            "`image_size` must be a multiple of downsampling=16 .* such as 192x288 or 208x288, got 200x288",
        ),
        ((8,), "such as 16x16, got 8x8"),
        ((32, 0), "`downsampling` must be at least 1, got 0"),
        ((32, -4), "`downsampling` must be at least 1, got -4"),
        ((36, 12), "`downsampling` must be a power of 2, .* got 12"),
        ((32, True), "`downsampling` must be"),
        ((16384, 16), "`image_size` must be at most 178956970 pixels, got 16384x16384"),
        ((2048, 1), "`image_size` must give a grid of at most 1048576 positions, got 2048x2048"),
        ((256, 16, 0), "`max_tokens` must be at least 1, got 0"),
        ((256, 16, 1000.0), "`max_tokens` must be an integer"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        propose_schedules(*arguments)
