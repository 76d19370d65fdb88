# SPDX-License-Identifier: Apache-2.0
"""Images and masks as users pass them, checked and as tensors of the tokenizer's size."""

from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch.nn import functional
from transformers.utils import logging

from ..autoencoders import VQVAEConfig
from ..image_decoding import PIL_MODES, decode_class_map, decode_picture
from .checks import as_tensor, check_flag, is_number


logger = logging.get_logger(__name__)

# Scales of at most this many tokens are always kept, as in the official code: each token spans most of the image.
MAX_ALWAYS_GIVEN = 3


def image_pixels(image: PipelineImageInput, config: VQVAEConfig, name: str = "image") -> torch.Tensor:
    """
    Images, the argument `name`, as the tokenizer reads them: `(batch, channels, height, width)` in [-1, 1], or the ids
    of class maps, int64 `(batch, height, width)`.
    """
    if config.num_pixel_classes is not None:
        return _class_maps(name, image, config.num_pixel_classes, config.image_size)
    processor = make_processor(config)
    height, width = config.image_size
    images = _single_images(name, image, config.in_channels)
    return torch.cat([processor.preprocess(single, height=height, width=width) for single in images])


class ClassMapProcessor(VaeImageProcessor):
    """Conversion of the logits of class maps `(batch, classes, height, width)` to what a pipeline returns."""

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: Any = None) -> Any:
        if output_type == "pil":
            ids = image.argmax(dim=1).cpu().numpy()
            depth = np.uint8 if image.shape[1] <= 256 else np.uint16
            return [PIL.Image.fromarray(single.astype(depth)) for single in ids]
        # Each class is learned on its own, by its binary cross-entropy.
        probabilities = image.float().sigmoid()
        return self.pt_to_numpy(probabilities) if output_type == "np" else probabilities


def make_processor(config: VQVAEConfig, **options: Any) -> VaeImageProcessor:
    """diffusers' conversion of images from and to tensors of the tokenizer's size."""
    processor = VaeImageProcessor if config.num_pixel_classes is None else ClassMapProcessor
    # 0, because no image has 0 channels. Otherwise images of 4 channels (RGBA) would be taken for latents.
    return processor(vae_scale_factor=config.downsampling_factor, vae_latent_channels=0, **options)


def mask_pixels(mask_image: PipelineImageInput, config: VQVAEConfig) -> torch.Tensor:
    """Masks of the images' size, `(batch, 1, height, width)`: 1 where the image is repainted, 0 where it is kept."""
    height, width = config.image_size
    masks = _single_images("mask_image", mask_image, 1, may_be_bool=True)
    if not all(_is_binary(mask) for mask in masks):
        logger.warning(
            "`mask_image` is not black and white: where it is at least half as bright as white, the image is repainted."
        )
    processor = make_processor(config, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    return torch.cat([processor.preprocess(mask, height=height, width=width) for mask in masks])


def given_tokens(mask: torch.Tensor, config: VQVAEConfig) -> torch.Tensor:
    """
    Which tokens `(batch, length)` are the image's own, by the rule of the official code: the mask is reduced to the finest
    token map, there cut off at one half, and brought from there to the size of each scale by bilinear interpolation.
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


def check_pasting(paste_original: bool, feather_width: int | None, output_type: str, config: VQVAEConfig) -> int:
    """The width over which the original fades out; a `ValueError` if the arguments of pasting contradict each other."""
    check_flag("paste_original", paste_original)
    if feather_width is not None and not paste_original:
        raise ValueError(f"`feather_width` = {feather_width!r} needs `paste_original=True`.")
    if paste_original and output_type == "latent":
        raise ValueError("`paste_original` needs images, got output_type='latent'.")
    if paste_original and config.num_pixel_classes is not None:
        raise ValueError("`paste_original` needs images, but the tokenizer codes class maps.")
    if paste_original and config.in_channels != config.num_output_channels:
        raise ValueError(
            f"`paste_original` needs a tokenizer that returns the {config.in_channels} channels which it reads, got "
            f"{config.num_output_channels}."
        )
    if feather_width is None:
        return config.downsampling_factor // 2
    if not is_number(feather_width, Integral) or feather_width < 0:
        raise ValueError(f"`feather_width` must be an integer of at least 0, got {feather_width!r}.")
    return feather_width


def paste_kept(sample: torch.Tensor, original: torch.Tensor, mask: torch.Tensor, feather_width: int) -> torch.Tensor:
    """Put the original's pixels where the mask is black; inside of the white they fade over `feather_width` pixels."""
    # In fp32, since half precision would round the pixels.
    share = reached = 1 - mask
    for _ in range(feather_width):
        reached = functional.max_pool2d(reached, kernel_size=3, stride=1, padding=1)
        share = share + reached
    return torch.lerp(sample.float(), original, share / (feather_width + 1))


def _single_images(
    name: str, images: PipelineImageInput, channels: int, may_be_bool: bool = False
) -> list[PIL.Image.Image | torch.Tensor]:
    """PIL images with this number of channels, and tensors `(1, channels, height, width)` in [0, 1], one for each image."""
    singles = []
    for part in images if isinstance(images, (list, tuple)) else [images]:
        if isinstance(part, PIL.Image.Image):
            if 0 in part.size:
                raise ValueError(f"`{name}` must have pixels, got a picture of the size {part.size}.")
            if channels not in PIL_MODES:
                raise ValueError(f"`{name}` must be arrays or tensors for {channels} channels, got a picture.")
            singles.append(_mask(part) if may_be_bool else decode_picture(part, channels, name=f"`{name}`"))
        elif isinstance(part, (np.ndarray, torch.Tensor)):
            singles += _as_batch(name, part, channels, may_be_bool).split(1)
        else:
            raise ValueError(
                f"`{name}` must be a picture, an array, a tensor or a list of these, got {type(part).__name__}."
            )
    if not singles:
        raise ValueError(f"`{name}` must be at least one image, got none.")
    return singles


def _class_maps(name: str, maps: Any, num_classes: int, size: tuple[int, int]) -> torch.Tensor:
    """Pictures, arrays and tensors of class ids as `(batch, *size)`, resized with nearest neighbours."""
    singles = []
    for part in maps if isinstance(maps, (list, tuple)) else [maps]:
        if not isinstance(part, (PIL.Image.Image, np.ndarray, torch.Tensor)):
            raise ValueError(
                f"`{name}` must be class ids as a picture, an array, a tensor or a list of these, got "
                f"{type(part).__name__}."
            )
        is_batch = not isinstance(part, PIL.Image.Image) and part.ndim == 3
        parts: Any = part if is_batch else [part]
        singles += [decode_class_map(single, num_classes, name=f"`{name}`") for single in parts]
    if not singles:
        raise ValueError(f"`{name}` must be at least one class map, got none.")
    # Floats are exact for as many classes.
    resized = [functional.interpolate(ids[None, None].float(), size=size, mode="nearest-exact") for ids in singles]
    return torch.cat(resized)[:, 0].long()


def _mask(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A mask in 8 bits. What is transparent is black, since masks are painted on empty layers; values above 255 are white."""
    if picture.has_transparency_data:
        black = PIL.Image.new("RGBA", picture.size, "black")
        picture = PIL.Image.alpha_composite(black, picture.convert("RGBA"))
    return picture.convert("L")


def _as_batch(name: str, image: np.ndarray | torch.Tensor, channels: int, may_be_bool: bool) -> torch.Tensor:
    is_array = isinstance(image, np.ndarray)
    # torch does not accept reversed views.
    batch = as_tensor(np.ascontiguousarray(image)) if is_array else image.detach().cpu()
    if batch is None:
        raise ValueError(f"`{name}` must be numbers in [0, 1], got an array of {image.dtype}.")
    is_known_layout = not is_array
    if is_array and batch.ndim > 2 and batch.shape[-1] == channels:
        batch, is_known_layout = batch.movedim(-1, -3), True
    elif channels == 1 and batch.ndim in (2, 3):
        # Without the dimension of the only channel, as diffusers reads masks.
        batch, is_known_layout = batch.unsqueeze(-3), True
    batch = batch[None] if batch.ndim == 3 else batch
    if not is_known_layout or batch.ndim != 4 or batch.shape[1] != channels or batch.numel() == 0:
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
