# SPDX-License-Identifier: Apache-2.0
"""Opening of pipelines, and reading and writing of images, for several commands."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import load_image
from PIL import Image

from ..pipelines.base import load_pipeline
from ..pipelines.image_grids import image_grid, save_progress_gif
from ..plain_options import PLAIN_OPTIONS
from .flags import NO_LABELS, label


def _device(name: str | None) -> torch.device:
    """The device that `--device` names, or the fastest one; a `ValueError` if there is none."""
    try:
        device = torch.device(_fastest_device() if name is None else name)
        torch.zeros(1, device=device).item()
    # torch says it in many ways: no such name, not compiled for it, no driver, no such number.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {name!r} cannot be used on this machine: {str(error).partition('.')[0]}."
        ) from error
    return device


def open_pipeline(options: argparse.Namespace, load: Callable[..., Any] | None = None) -> Any:
    """The pipeline of `--model`, on its device: of the class that it was saved as, unless `load` makes another one."""
    device = _device(options.device)
    index = Path(options.model) / "model_index.json"
    if index.is_file() and not isinstance(json.loads(index.read_text(encoding="utf-8")), dict):
        raise ValueError(f"--model {options.model!r} is no pipeline: its model_index.json holds no object.")
    load = load_pipeline if load is None else load
    pipe = load(options.model, dtype=getattr(torch, options.dtype), revision=options.revision, variant=options.variant)
    return pipe.to(device)


def sampling_arguments(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call that `add_sampling` and `add_labels` gave."""
    if not -(2**63) <= options.seed < 2**64:
        raise ValueError(f"--seed must be an integer of 64 bits, got {options.seed}.")
    sampling = {name: getattr(options, name) for name in PLAIN_OPTIONS}
    for name in sampling.keys() - pipe.call_options:
        if sampling.pop(name):
            raise ValueError(f"--{name.replace('_', '-')} is not an option of a {type(pipe).__name__}.")
    arguments = {"generator": torch.Generator().manual_seed(options.seed), **sampling}
    if "num_images_per_label" not in pipe.call_options:
        if options.class_labels != NO_LABELS:
            raise ValueError(f"--class-labels is not an option of a {type(pipe).__name__}.")
        return {"num_images_per_prompt": options.num_images_per_label, **arguments}
    if options.class_labels != NO_LABELS:
        arguments["class_labels"] = [label(text) for text in options.class_labels]
    return {"num_images_per_label": options.num_images_per_label, **arguments}


def read_images(paths: Sequence[str]) -> list[Image.Image]:
    """Pictures from files or addresses, each with its own channels."""
    images = []
    for path in paths:
        try:
            images.append(load_image(path, convert_method=lambda image: image))
            images[-1].load()
        # Damaged files make Pillow raise almost anything.
        except Exception as error:
            raise ValueError(f"{path!r} cannot be read as a picture: {error}") from error
    return images


def save_result(
    pipe: Any, images: list[Image.Image], codes: torch.Tensor, options: argparse.Namespace, columns: int | None = None
) -> None:
    """Write images side by side, or those of `codes` as an animation from the first scale to the last."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.suffix.lower() == ".gif":
        progress = pipe.decode_progress(codes)
        save_progress_gif([_resized(images, options.resize, pipe) for images in progress], options.output)
    else:
        width = options.columns or columns or len(images)
        image_grid(_resized(images, options.resize, pipe), width).save(options.output)
    print(f"wrote {options.output}")


def _resized(images: list[Image.Image], side: int | None, pipe: Any) -> list[Image.Image]:
    """Images with this side, if there is one. Between ids of classes there is nothing."""
    is_map = pipe.vqvae.config.num_pixel_classes is not None
    kind = Image.Resampling.NEAREST if is_map else Image.Resampling.LANCZOS
    return images if side is None else [image.resize((side, side), kind) for image in images]


def _fastest_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type
