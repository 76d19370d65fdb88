# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share, and checks of these, without torch: help and mistakes must not wait for it."""

import argparse
import os
from pathlib import Path

from PIL import Image

from .. import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT
from ..plain_options import PLAIN_OPTIONS


NO_LABELS = ["none"]
# As transformers' parser of dataclasses reads them.
TRUTH_VALUES: dict[str, bool] = {
    **dict.fromkeys(["true", "t", "yes", "y", "1"], True),
    **dict.fromkeys(["false", "f", "no", "n", "0"], False),
}
# Checkpoints that ship with the package, by names that work unless there is such a folder.
EMBEDDED = {"digits": DIGITS_CHECKPOINT, "emoji": EMOJI_CHECKPOINT}
# Names of torch.
DTYPES = ("float32", "bfloat16", "float16")


def _model(text: str) -> str:
    return text if Path(text).exists() else EMBEDDED.get(text, text)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    text = f"pipeline folder or Hub repo, or {' or '.join(EMBEDDED)}, which ship with the package"
    parser.add_argument("--model", type=_model, default=DIGITS_CHECKPOINT, metavar="REPO", help=text)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub repo")
    parser.add_argument("--variant", metavar="NAME", help="load the weights of this variant, such as fp16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    add_source(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps, ... (the fastest there is)")
    machine.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights (float32)")


def choose_model(options: argparse.Namespace) -> None:
    """Without `--model`, one of the embedded checkpoints: that of texts if there is a prompt."""
    if options.model is None:
        options.model = DIGITS_CHECKPOINT if options.prompt is None else EMOJI_CHECKPOINT


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


def label(text: str) -> str | None:
    """A label as the pipelines take it: they read names and ids from the same text."""
    return None if text.lower() == "none" else text


def load_library() -> None:
    """Import and register the models and pipelines, which takes seconds, unless the process has them."""
    from .. import register

    register()
