# SPDX-License-Identifier: Apache-2.0
"""Interpolation and mixing of images, and the assignment of inputs to the images of a call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..autoencoders import VQVAEModel
from .checks import check_generator, check_num_scales, checked_codes, is_number
from .conditions import Condition
from .sampling import Generators


# Share of the scales that a variation samples.
DEFAULT_STRENGTH = 0.5


def interpolated_latents(
    vqvae: VQVAEModel, codes: torch.Tensor, other_codes: torch.Tensor, weights: Sequence[float], device: torch.device
) -> list[torch.Tensor]:
    """For each weight the latents at this share of the way, see [`~VARPipeline.interpolate`]."""
    is_list = isinstance(weights, (Sequence, np.ndarray)) and np.ndim(weights) == 1 and len(weights) > 0
    if not is_list:
        raise ValueError(f"`weights` must be a list of finite numbers, got {weights!r}.")
    for weight in weights:
        if not is_number(weight):
            raise ValueError(f"`weights` must be finite numbers, got {weight!r} in {weights!r}.")
    codes, other_codes = _checked_pair(vqvae, codes, other_codes, device)
    ends = (vqvae.latents(codes), vqvae.latents(other_codes))
    return [torch.lerp(*ends, float(weight)) for weight in weights]


def mixed_latents(
    vqvae: VQVAEModel, codes: torch.Tensor, other_codes: torch.Tensor, num_scales: int, device: torch.device
) -> torch.Tensor:
    """The latents of the first scales of `codes` and the others of `other_codes`, see [`~VARPipeline.mix_scales`]."""
    lengths = vqvae.config.scale_lengths
    check_num_scales("num_scales", num_scales, len(lengths))
    codes, other_codes = _checked_pair(vqvae, codes, other_codes, device)
    end = sum(lengths[:num_scales])
    return vqvae.latents(torch.cat([codes[:, :end], other_codes[:, end:]], dim=1))


def known_latents(vqvae: Any, codes: torch.Tensor, known: torch.Tensor) -> Any:
    """The latents of `codes` `(batch, length)` of which some are `known` `(length,)`; the vectors of others are zeros."""
    vectors = vqvae.code_vectors(codes) * known[:, None]
    levels = vectors.split(vqvae.config.scale_lengths, dim=1)
    if not isinstance(vqvae, VQVAEModel):
        sizes = vqvae.config.scale_sizes
        return tuple(level.transpose(1, 2).unflatten(2, size) for level, size in zip(levels, sizes, strict=True))
    latents = None
    for k, level in enumerate(levels):
        latents, _ = vqvae.next_scale(latents, level, k)
    return latents


def first_sampled_scale(strength: float | None, num_kept_scales: int | None, num_scales: int) -> int:
    """The number of scales that an image keeps, by one of the two arguments of [`VARImg2ImgPipeline`]."""
    if num_kept_scales is not None:
        if strength is not None:
            raise ValueError(
                f"Pass one of `strength` and `num_kept_scales`, got {strength!r} and {num_kept_scales!r}."
            )
        check_num_scales("num_kept_scales", num_kept_scales, num_scales)
        return num_kept_scales
    strength = DEFAULT_STRENGTH if strength is None else strength
    if not is_number(strength) or not 0 <= strength <= 1:
        raise ValueError(f"`strength` must be in [0, 1], got {strength!r}.")
    return num_scales - int(num_scales * strength)


def match_inputs(num_images: int, **sizes: int) -> dict[str, list[int]]:
    """
    For every image of a call, the item of each input that it is made from: `num_images` next to each other for each item,
    where a single item serves all images. A `ValueError` if inputs above one item differ in their `sizes`.
    """
    number = max(sizes.values())
    if any(size not in (1, number) for size in sizes.values()):
        names = " and ".join(f"`{name}`" for name in sizes)
        raise ValueError(f"{names} must be as many, or one for all, got {' and '.join(map(str, sizes.values()))}.")
    return {name: [item % size for item in range(number) for _ in range(num_images)] for name, size in sizes.items()}


def match_condition(
    condition: Condition, num_images: int, generator: Generators, **sizes: int
) -> tuple[Condition, dict[str, list[int]]]:
    """The condition of every image of a call, and its items of the other inputs, see [`match_inputs`]."""
    items = match_inputs(num_images, **sizes, **{condition.name: len(condition)})
    condition = condition.select(items.pop(condition.name))
    check_generator(generator, len(condition))
    return condition, items


def _checked_pair(
    vqvae: VQVAEModel, codes: torch.Tensor, other_codes: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, other_codes = (
        checked_codes(name, value, vqvae.config) for name, value in (("codes", codes), ("other_codes", other_codes))
    )
    if len(codes) != len(other_codes):
        raise ValueError(
            f"`other_codes` must be those of as many images as `codes`, {len(codes)}, got {len(other_codes)}."
        )
    return codes.to(device), other_codes.to(device)
