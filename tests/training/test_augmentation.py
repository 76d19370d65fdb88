# SPDX-License-Identifier: Apache-2.0
"""Differentiable augmentation."""

import pytest
import torch

from hf_var.training.augmentation import (
    change_brightness,
    change_contrast,
    change_saturation,
    cut_out,
    diff_augment,
    translate,
)


ALL = ("color", "translation", "cutout")


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(batch_size: int = 6, channels: int = 3, size: tuple[int, int] = (8, 16)) -> torch.Tensor:
    return torch.rand(batch_size, channels, *size, generator=make_generator(9)) * 1.8 - 0.9


def test_no_policy_no_change() -> None:
    images = make_images()
    generator = make_generator()
    state = generator.get_state()
    assert diff_augment(images, (), generator) is images
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("policy", ALL)
def test_all_randomness_is_from_the_generator(policy) -> None:
    images = make_images()
    before = images.clone()
    state = torch.get_rng_state()
    first, again, other = (diff_augment(images, (policy,), make_generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    # Every image is changed in its own way.
    differences = (diff_augment(images[:1].repeat(6, 1, 1, 1), (policy,), make_generator())).flatten(1)
    assert len(differences.unique(dim=0)) > 3


@pytest.mark.parametrize("policies", [("color",), ("translation",), ("cutout",), ALL])
def test_gradients(policies) -> None:
    images = make_images(2, 2, (5, 4)).double().requires_grad_()

    def augment(images: torch.Tensor) -> torch.Tensor:
        return diff_augment(images, policies, make_generator(3))

    assert torch.autograd.gradcheck(augment, images)
    assert torch.autograd.gradgradcheck(augment, images)


def test_brightness_adds_one_number_per_image() -> None:
    images = make_images()
    change = change_brightness(images, make_generator()) - images
    expected = torch.rand(6, 1, 1, 1, generator=make_generator()) - 0.5
    torch.testing.assert_close(change, expected.expand_as(images))


def test_saturation_scales_the_distance_from_grey() -> None:
    images = make_images()
    changed = change_saturation(images, make_generator())
    factor = 2 * torch.rand(6, 1, 1, 1, generator=make_generator())
    torch.testing.assert_close(changed.mean(dim=1), images.mean(dim=1))
    torch.testing.assert_close(changed.std(dim=1, keepdim=True), factor * images.std(dim=1, keepdim=True))
    grey = make_images(channels=1)
    assert torch.equal(change_saturation(grey, make_generator()), grey)


def test_contrast_scales_the_distance_from_the_mean() -> None:
    images = make_images()
    changed = change_contrast(images, make_generator()).flatten(1)
    factor = 0.5 + torch.rand(6, generator=make_generator())
    torch.testing.assert_close(changed.mean(dim=1), images.flatten(1).mean(dim=1))
    torch.testing.assert_close(changed.std(dim=1), factor * images.flatten(1).std(dim=1))


def test_translation_moves_by_up_to_an_eighth() -> None:
    # One bright pixel in the middle of black, two channels alike.
    images = torch.zeros(200, 2, 16, 32)
    images[:, :, 8, 16] = 1
    moved = translate(images, make_generator())
    assert torch.equal(moved[:, 0], moved[:, 1])
    image, row, column = moved[:, 0].nonzero().unbind(dim=1)
    assert image.tolist() == list(range(200))
    assert set((row - 8).tolist()) == set(range(-2, 3))
    assert set((column - 16).tolist()) == set(range(-4, 5))


def test_translation_fills_with_zeros() -> None:
    moved = translate(torch.ones(50, 1, 8, 8), make_generator())
    # By a pixel at most in each direction: a border of zeros at one side or none.
    rows, columns = moved[:, 0].amax(dim=2), moved[:, 0].amax(dim=1)
    for lines in (rows, columns):
        assert set(lines.sum(dim=1).tolist()) == {7, 8}
        assert bool((lines[:, 1:-1] == 1).all())
    assert torch.equal(moved[:, 0], rows[:, :, None] * columns[:, None, :])


def test_cutout_greys_out_a_rectangle() -> None:
    images = torch.ones(300, 2, 8, 16)
    cut = cut_out(images, make_generator())
    assert torch.equal(cut[:, 0], cut[:, 1])
    assert set(cut.unique().tolist()) == {0, 1}
    hidden = 1 - cut[:, 0]
    rows, columns = hidden.amax(dim=2), hidden.amax(dim=1)
    assert torch.equal(hidden, rows[:, :, None] * columns[:, None, :])
    for lines, extent in ((rows, 4), (columns, 8)):
        lengths = lines.sum(dim=1)
        # Whole, or cut off by the border.
        assert lengths.max() == extent
        assert lengths.min() >= extent / 2
        changes = lines.diff(dim=1).abs().sum(dim=1)
        assert changes.max() <= 2  # in one piece
    # Every pixel is hidden now and then.
    assert hidden.mean(dim=0).min() > 0.02


@pytest.mark.gpu
def test_a_gpu_draws_the_same() -> None:
    images = make_images()
    expected = diff_augment(images, ALL, make_generator())
    torch.testing.assert_close(diff_augment(images.cuda(), ALL, make_generator()).cpu(), expected)
