# SPDX-License-Identifier: Apache-2.0
"""
DiffAugment (Zhao et al. 2020): augmentation of all that a discriminator sees, images and reconstructions alike, through
which the generator's gradient flows. It keeps the discriminator from memorising the images.
"""

from collections.abc import Callable, Sequence

import torch


Transform = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def diff_augment(images: torch.Tensor, policies: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """
    Augment each image of a batch in [-1, 1], which the results may leave, with random numbers of its own, drawn on the
    CPU so that every device has the same. The `policies` apply in order: `color` changes brightness, saturation
    (nothing for a single channel) and contrast, `translation` moves by up to an eighth of the size and fills with
    grey, `cutout` greys out a rectangle of half the height and width.
    """
    for policy in policies:
        for transform in POLICIES[policy]:
            images = transform(images, generator)
    return images


def change_brightness(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images + (_draw(images, generator) - 0.5)


def change_saturation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    grey = images.mean(dim=1, keepdim=True)
    return grey + (images - grey) * (2 * _draw(images, generator))


def change_contrast(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + _draw(images, generator))


def translate(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    for dimension in (2, 3):
        size = images.shape[dimension]
        limit = round(size / 8)
        shifts = torch.randint(-limit, limit + 1, (len(images), 1), generator=generator)
        sources = torch.arange(size) - shifts  # (batch, size)
        inside = _along((sources >= 0) & (sources < size), dimension, images)
        sources = _along(sources.clamp(0, size - 1), dimension, images).expand_as(images)
        # Zeros instead of the border's pixels, also in the backward pass, where they would be added up.
        images = images.gather(dimension, sources) * inside
    return images


def cut_out(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    cut = torch.ones((), dtype=torch.bool, device=images.device)
    for dimension in (2, 3):
        size = images.shape[dimension]
        extent = round(size / 2)
        # The middle lies anywhere in the image, so that a pixel of the border is hidden less often, but all are.
        middles = torch.randint(0, size, (len(images), 1), generator=generator)
        offsets = torch.arange(size) - (middles - extent // 2)  # (batch, size)
        cut = cut & _along((offsets >= 0) & (offsets < extent), dimension, images)
    return images * ~cut


POLICIES: dict[str, tuple[Transform, ...]] = {
    "color": (change_brightness, change_saturation, change_contrast),
    "translation": (translate,),
    "cutout": (cut_out,),
}


def _draw(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A number in [0, 1) per image, `(batch, 1, 1, 1)`."""
    return torch.rand(len(images), 1, 1, 1, generator=generator).to(images)


def _along(values: torch.Tensor, dimension: int, images: torch.Tensor) -> torch.Tensor:
    """`values` of shape `(batch, size)` as `(batch, 1, size, 1)` or `(batch, 1, 1, size)`, on the images' device."""
    shape = [len(values), 1, 1, 1]
    shape[dimension] = -1
    return values.view(shape).to(images.device)
