# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share, and reading and writing of images."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import load_image
from PIL import Image

from .. import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT
from ..pipelines.base import load_pipeline
from ..pipelines.image_grids import image_grid, save_progress_gif
from ..pipelines.options import PLAIN_OPTIONS


NO_LABELS = ["none"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    parser.add_argument("--model", default=DIGITS_CHECKPOINT, metavar="REPO", help="pipeline folder or Hub repo")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps, ... (the fastest there is)")
    machine.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights (float32)")
    machine.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub repo")
    machine.add_argument("--variant", metavar="NAME", help="load the weights of this variant, such as fp16")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How codes are sampled: a flag for each plain option of the pipelines."""
    parser.add_argument(
        "--num-images-per-label", type=int, default=1, metavar="N", help="images of each label or prompt (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    sampling = parser.add_argument_group("sampling")
    for name, (kind, text) in PLAIN_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            sampling.add_argument(flag, action="store_true", help=text)
        else:
            sampling.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)


def add_picture(parser: argparse.ArgumentParser) -> None:
    """What the picture of the result looks like."""
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="picture to write, such as out.png; out.gif shows the images coarse to fine",
    )
    parser.add_argument("--columns", type=int, metavar="N", help="images in a row (all)")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="height and width of each image in the picture")


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Of which classes."""
    parser.add_argument(
        "--class-labels", nargs="+", default=NO_LABELS, metavar="LABEL", help="ids or names, 'none' for unconditional"
    )


def check_picture(options: argparse.Namespace) -> None:
    """Raise a `ValueError` if the picture could not be written, before anything is computed."""
    if Image.registered_extensions().get(options.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output must be a picture file such as out.png, got {str(options.output)!r}.")
    check_output(options.output)
    for name in ("columns", "resize"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")


def check_output(path: Path, is_folder: bool = False) -> None:
    """Raise a `ValueError` if nothing can be written there; folders that do not exist are made."""
    if path.exists() and path.is_dir() != is_folder:
        raise ValueError(f"--output must be a {'folder' if is_folder else 'file'}, got {str(path)!r}.")
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    folder = there if is_folder or there != path.absolute() else there.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--output {str(path)!r} cannot be written: {str(folder)!r} is no folder that allows it.")


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


def choose_model(options: argparse.Namespace) -> None:
    """Without `--model`, one of the embedded checkpoints: that of texts if there is a prompt."""
    if options.model is None:
        options.model = DIGITS_CHECKPOINT if options.prompt is None else EMOJI_CHECKPOINT


def open_pipeline(options: argparse.Namespace, load: Callable[..., Any] = load_pipeline) -> Any:
    """The pipeline of `--model`, on its device: of the class that it was saved as, unless `load` makes another one."""
    device = _device(options.device)
    index = Path(options.model) / "model_index.json"
    if index.is_file() and not isinstance(json.loads(index.read_text(encoding="utf-8")), dict):
        raise ValueError(f"--model {options.model!r} is no pipeline: its model_index.json holds no object.")
    pipe = load(options.model, dtype=DTYPES[options.dtype], revision=options.revision, variant=options.variant)
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
    if "num_images_per_prompt" in pipe.call_options:
        if options.class_labels != NO_LABELS:
            raise ValueError(f"--class-labels is not an option of a {type(pipe).__name__}.")
        return {"num_images_per_prompt": options.num_images_per_label, **arguments}
    labels = [label(text) for text in options.class_labels]
    return {"class_labels": labels, "num_images_per_label": options.num_images_per_label, **arguments}


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


def label(text: str) -> str | None:
    """A label as the pipelines take it: they read names and ids from the same text."""
    return None if text.lower() == "none" else text


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
