# SPDX-License-Identifier: Apache-2.0
"""What editing needs beside the loop over the scales: images as codes, masks as given tokens, mixtures of two images."""

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch.nn import functional
from transformers.utils import logging

from ..autoencoders import VQVAEConfig
from .evaluation_mode import in_evaluation_mode
from .labels import Labels
from .settings import check_count, check_output, is_number


logger = logging.get_logger(__name__)

# Scales of so few tokens are given whatever the mask says, as in the official code: each of them spans most of the image.
MAX_ALWAYS_GIVEN = 3

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class EditingMixin(DiffusionPipeline):
    """From one pipeline to another with the same models, from images to codes, and to images between two images."""

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs) -> Any:
        r"""
        A pipeline of this class with the models and the defaults of another one, see diffusers'
        `DiffusionPipeline.from_pipe`. The models keep their precision, which is the other pipeline's, too.
        """
        if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
            return super().from_pipe(pipeline, **kwargs)
        # diffusers' method would turn the models to fp32, for both pipelines.
        shared = {**pipeline.config, **pipeline.components}
        accepted = inspect.signature(cls.__init__).parameters
        made = cls(**{**{name: value for name, value in shared.items() if name in accepted}, **kwargs})
        if pipeline.config.get("_name_or_path") is not None:
            made.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return made

    @torch.no_grad()
    @in_evaluation_mode
    def encode_images(self, image: PipelineImageInput) -> torch.Tensor:
        r"""
        Codes of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                Pictures; arrays `(height, width, channels)` or `(batch, height, width, channels)` or tensors
                `(channels, height, width)` or `(batch, channels, height, width)` with values in [0, 1]. What has another
                size is resized to the tokenizer's, whatever its aspect: pictures by Lanczos' filter, arrays and tensors
                to nearest neighbours.

        Returns:
            `torch.LongTensor` of shape `(batch, length)`.

        Raises:
            `ValueError`: If these are no images, or their channels are not the tokenizer's.
        """
        codes = self._encode_pixels(image_pixels(image, self.vqvae.config, self.image_processor))
        self.maybe_free_model_hooks()
        return codes

    @torch.no_grad()
    @in_evaluation_mode
    def interpolate(
        self,
        codes: torch.Tensor,
        other_codes: torch.Tensor,
        weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        output_type: str = "pil",
    ) -> list:
        r"""
        The way from one image to another on the line between their latents.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`):
                Codes of whole images, such as a call or [`~VARPipeline.encode_images`] returns.
            other_codes (`torch.LongTensor` of shape `(batch, length)`): As many others.
            weights (`list[float]`, *optional*, defaults to `(0.0, 0.25, 0.5, 0.75, 1.0)`):
                Share of the others: 0 gives the images of `codes`, 1 those of `other_codes`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            `list`: For each weight the images of the batch, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If the codes are none of whole images, or not of as many, or a weight is no number.
        """
        check_output(output_type, self.vqvae.config.num_output_channels)
        for weight in weights:
            if not is_number(weight):
                raise ValueError(f"`weights` must be finite numbers, got {weight!r} in {weights!r}.")
        codes, other_codes = self._check_pair(codes, other_codes)
        ends = (self._latents(codes), self._latents(other_codes))
        images = [self._images(torch.lerp(*ends, float(weight)), output_type) for weight in weights]
        self.maybe_free_model_hooks()
        return images

    @torch.no_grad()
    @in_evaluation_mode
    def mix_scales(
        self, codes: torch.Tensor, other_codes: torch.Tensor, num_scales: int, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        r"""
        The coarse scales of one image with the fine scales of another.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Codes of whole images.
            other_codes (`torch.LongTensor` of shape `(batch, length)`): As many others.
            num_scales (`int`): So many of the first scales are those of `codes`, the rest those of `other_codes`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            The images, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If the codes are none of whole images, or not of as many, or there are not so many scales.
        """
        config = self.vqvae.config
        check_output(output_type, config.num_output_channels)
        check_num_scales("num_scales", num_scales, len(config.patch_nums))
        codes, other_codes = self._check_pair(codes, other_codes)
        end = sum(config.scale_lengths[:num_scales])
        images = self._images(self._latents(torch.cat([codes[:, :end], other_codes[:, end:]], dim=1)), output_type)
        self.maybe_free_model_hooks()
        return images

    def _match_inputs(
        self, class_labels: Labels, class_embeds: torch.Tensor | None, num_images_per_label: int, **sizes: int
    ) -> tuple[list[int] | None, torch.Tensor | None, dict[str, list[int]]]:
        """Ids or embeddings of all images of a call, and for each the items of the other inputs that it is made from."""
        ids, embeds, number = self._class_inputs(class_labels, class_embeds, 1)
        name = "class_labels" if embeds is None else "class_embeds"
        items = match_batches(num_images_per_label, **sizes, **{name: number})
        own = items.pop(name)
        return None if ids is None else [ids[item] for item in own], None if embeds is None else embeds[own], items

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vqvae.encode(pixels.to(self._execution_device)).codes

    def _latents(self, codes: torch.Tensor) -> torch.Tensor:
        latents = None
        for k, scale_codes in enumerate(codes.split(self.vqvae.config.scale_lengths, dim=1)):
            latents, _ = self.vqvae.next_scale(latents, scale_codes, k)
        return latents  # pyright: ignore[reportReturnType]

    def _check_pair(self, codes: torch.Tensor, other_codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = sum(self.vqvae.config.scale_lengths)
        for name, value in (("codes", codes), ("other_codes", other_codes)):
            if value.is_floating_point() or value.ndim != 2 or value.shape[1] != length:
                raise ValueError(
                    f"`{name}` must be integers of the shape (batch, {length}), got {value.dtype} of the shape "
                    f"{tuple(value.shape)}."
                )
        if len(codes) != len(other_codes):
            raise ValueError(
                f"`other_codes` must be those of as many images as `codes`, {len(codes)}, got {len(other_codes)}."
            )
        return codes.to(self._execution_device), other_codes.to(self._execution_device)


# --------------------------------------------------------------------------------------------------------------------
# Inputs


def image_pixels(
    image: PipelineImageInput, config: VQVAEConfig, processor: VaeImageProcessor, name: str = "image"
) -> torch.Tensor:
    """Images, the argument `name`, as the tokenizer reads them: `(batch, channels, height, width)` in [-1, 1]."""
    height, width = config.image_size
    images = _single_images(name, image, config.in_channels)
    return torch.cat([processor.preprocess(single, height=height, width=width) for single in images])


def mask_pixels(mask_image: PipelineImageInput, config: VQVAEConfig) -> torch.Tensor:
    """Masks of the images' size, `(batch, 1, height, width)`: 1 where the image is repainted, 0 where it is kept."""
    height, width = config.image_size
    masks = _single_images("mask_image", mask_image, 1, may_be_bool=True)
    if not all(_is_binary(mask) for mask in masks):
        logger.warning(
            "`mask_image` is not black and white: where it is at least half as bright as white, the image is repainted."
        )
    processor = VaeImageProcessor(
        vae_scale_factor=config.downsampling_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    return torch.cat([processor.preprocess(mask, height=height, width=width) for mask in masks])


def given_tokens(mask: torch.Tensor, config: VQVAEConfig) -> torch.Tensor:
    """
    Which tokens are the image's own, by the rule of the official code: the mask is reduced to the finest token map,
    there cut off at one half, and brought from there to the size of each scale by bilinear interpolation.

    Args:
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`): 1 where the image is repainted.
        config ([`VQVAEConfig`]): Sizes and schedule.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`.
    """
    repainted = functional.interpolate(mask, size=config.latent_size, mode="area")
    kept = (repainted < 0.5).to(mask)
    lost = mask.flatten(1).any(dim=1) & kept.flatten(1).all(dim=1)
    if lost.any():
        rows, columns = (size // count for size, count in zip(config.image_size, config.latent_size, strict=True))
        logger.warning(
            f"`mask_image` covers no token by half, so nothing is repainted: a token stands for {rows}x{columns} pixels."
        )
    given = []
    for height, width in config.scale_sizes:
        if height * width <= MAX_ALWAYS_GIVEN:
            given.append(torch.ones(len(mask), height * width, dtype=torch.bool, device=mask.device))
        else:
            given.append(functional.interpolate(kept, size=(height, width), mode="bilinear").flatten(1) > 0.5)
    return torch.cat(given, dim=1)


def paste_kept(sample: torch.Tensor, original: torch.Tensor, mask: torch.Tensor, feather_width: int) -> torch.Tensor:
    """
    Put the original's pixels where the mask is black; inside of the white they fade over `feather_width` pixels.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): What was drawn.
        original (`torch.Tensor` of the same shape): Images.
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`): 1 where they are repainted.
        feather_width (`int`): 0 for a hard edge.

    Returns:
        `torch.Tensor` in fp32, since half of that would round the pixels.
    """
    share = reached = 1 - mask
    for _ in range(feather_width):
        reached = functional.max_pool2d(reached, kernel_size=3, stride=1, padding=1)
        share = share + reached
    return torch.lerp(sample.float(), original, share / (feather_width + 1))


def match_batches(num_images_per_label: int, **sizes: int) -> dict[str, list[int]]:
    """
    For every image of a call, the item of each input that it is made from.

    Args:
        num_images_per_label (`int`): Images for each item, next to each other.
        sizes (`int`): Number of items of each input; a single one serves all images.

    Raises:
        `ValueError`: If there are inputs of different numbers above 1.
    """
    check_count("num_images_per_label", num_images_per_label)
    number = max(sizes.values())
    if any(size not in (1, number) for size in sizes.values()):
        names, found = (" and ".join(map(str, part)) for part in ([f"`{name}`" for name in sizes], sizes.values()))
        raise ValueError(f"{names} must be as many, or one for all, got {found}.")
    return {
        name: [item % size for item in range(number) for _ in range(num_images_per_label)]
        for name, size in sizes.items()
    }


def check_num_scales(name: str, value: int, num_scales: int) -> None:
    """Raise a `ValueError` that names the argument unless it is a number of scales."""
    if not is_number(value, Integral) or not 0 <= value <= num_scales:
        raise ValueError(f"`{name}` must be a number of scales from 0 to {num_scales}, got {value!r}.")


def _single_images(
    name: str, images: PipelineImageInput, channels: int, may_be_bool: bool = False
) -> list[PIL.Image.Image | torch.Tensor]:
    """Pictures of so many channels, and tensors `(1, channels, height, width)` in [0, 1], one for each image."""
    parts = images if isinstance(images, (list, tuple)) else [images]
    singles = []
    for part in parts:
        if isinstance(part, PIL.Image.Image):
            if channels not in PIL_MODES:
                raise ValueError(f"`{name}` must be arrays or tensors for {channels} channels, got a picture.")
            singles.append(part.convert(PIL_MODES[channels]))
        elif isinstance(part, (np.ndarray, torch.Tensor)):
            singles += _as_batch(name, part, channels, may_be_bool).split(1)
        else:
            raise ValueError(
                f"`{name}` must be a picture, an array, a tensor or a list of these, got {type(part).__name__}."
            )
    if not singles:
        raise ValueError(f"`{name}` must be at least one image, got none.")
    return singles


def _as_batch(name: str, image: np.ndarray | torch.Tensor, channels: int, may_be_bool: bool) -> torch.Tensor:
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype.kind not in "fbiu":
        raise ValueError(f"`{name}` must be numbers in [0, 1], got an array of {image.dtype}.")
    # Reversed views, for one, are no tensors.
    batch = torch.from_numpy(np.ascontiguousarray(image)) if is_array else image.detach().cpu()
    if batch.ndim == 2:
        batch = batch[None, :, :, None] if is_array else batch[None, None]
    elif batch.ndim == 3 and channels == 1 and not (is_array and batch.shape[-1] == 1):
        # A batch without the dimension of the only channel, as diffusers reads masks.
        batch = batch[..., None] if is_array else batch[:, None]
    elif batch.ndim == 3:
        batch = batch[None]
    if batch.ndim == 4 and is_array:
        batch = batch.permute(0, 3, 1, 2)
    if batch.ndim != 4 or batch.shape[1] != channels or batch.numel() == 0:
        layout = f"(batch, height, width, {channels})" if is_array else f"(batch, {channels}, height, width)"
        raise ValueError(f"`{name}` must have the shape {layout} or that of one image, got {tuple(image.shape)}.")
    if not batch.is_floating_point() and not (may_be_bool and batch.dtype == torch.bool):
        raise ValueError(f"`{name}` must be floating-point numbers in [0, 1], or a picture, got {batch.dtype}.")
    batch = batch.float()
    if not ((batch >= 0) & (batch <= 1)).all():
        raise ValueError(
            f"`{name}` must be in [0, 1], got values from {batch.min().item():g} to {batch.max().item():g}."
        )
    return batch


def _is_binary(mask: PIL.Image.Image | torch.Tensor) -> bool:
    if isinstance(mask, torch.Tensor):
        return bool(((mask == 0) | (mask == 1)).all())
    return {value for _, value in mask.getcolors()} <= {0, 255}  # pyright: ignore[reportOptionalIterable]
