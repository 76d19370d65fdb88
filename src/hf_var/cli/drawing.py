# SPDX-License-Identifier: Apache-2.0
"""Images from labels, and from images and labels."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from .flags import add_labels, add_model, add_picture, add_sampling, check_picture, choose_model


def add_generate(commands) -> None:
    """Add the command `generate`."""
    parser = commands.add_parser(
        "generate",
        help="sample images of classes, texts or other images",
        description="Sample one image per class label, prompt or condition and save them side by side. Without --model, "
        "the checkpoints that ship with the package sample emoji of prompts, and handwritten digits of class labels.",
        epilog='example: hf-var generate --prompt "a red heart" "a blue apple" --resize 128 --output emoji.png',
    )
    parser.set_defaults(check=check_picture, run=_generate)
    condition = parser.add_mutually_exclusive_group()
    condition.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="texts, for a model that is conditioned on them"
    )
    parser.add_argument(
        "--negative-prompt",
        nargs="+",
        metavar="TEXT",
        help="what guidance leads away from, one text or one per prompt",
    )
    condition.add_argument(
        "--condition-image",
        nargs="+",
        metavar="FILE",
        help="pictures or their addresses, for a model that is conditioned on images",
    )
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}", type=int, metavar="PIXELS", help=f"{side} of the images, above the model's own"
        )
    _add_shared(parser)
    parser.set_defaults(model=None)


def _generate(options: argparse.Namespace) -> None:
    choose_model(options)
    names = ("prompt", "negative_prompt", "condition_image", "height", "width")
    given = {name: getattr(options, name) for name in names}
    if given["negative_prompt"] is not None and len(given["negative_prompt"]) == 1:
        (given["negative_prompt"],) = given["negative_prompt"]
    _run(options, **{name: value for name, value in given.items() if value is not None})


def add_inpaint(commands) -> None:
    """Add the command `inpaint`."""
    parser = commands.add_parser(
        "inpaint",
        help="repaint a part of an image",
        description="Repaint the part of an image that is white in a mask as one of a class; a mask that is white around "
        "the middle extends the image.",
        epilog="example: hf-var inpaint --image dog.png --mask mask.png --class-labels cat --model REPO --output cat.png",
    )
    parser.set_defaults(check=_check_inpaint, run=_inpaint)
    parser.add_argument("--image", required=True, metavar="FILE", help="picture to edit, or its address")
    parser.add_argument("--mask", required=True, metavar="FILE", help="picture that is white where to repaint")
    parser.add_argument(
        "--paste-original", action="store_true", help="keep the pixels of the black part exactly as they are"
    )
    parser.add_argument("--feather-width", type=int, metavar="PIXELS", help="width of the seam of --paste-original")
    _add_shared(parser)


def _check_inpaint(options: argparse.Namespace) -> None:
    if options.feather_width is not None and not options.paste_original:
        raise ValueError(f"--feather-width {options.feather_width} needs --paste-original.")
    check_picture(options)


def _inpaint(options: argparse.Namespace) -> None:
    from .. import VARInpaintPipeline

    edits = {"paste_original": options.paste_original, "feather_width": options.feather_width}
    _run(options, VARInpaintPipeline.from_pretrained, image=options.image, mask_image=options.mask, **edits)


def add_vary(commands) -> None:
    """Add the command `vary`."""
    parser = commands.add_parser(
        "vary",
        help="sample variations of an image",
        description="Keep the coarse scales of an image and sample the fine ones anew, as those of a class. A small image "
        "becomes a large one in this way.",
        epilog="example: hf-var vary --image dog.png --strength 0.4 --class-labels dog --model REPO --output dogs.png",
    )
    parser.set_defaults(check=check_picture, run=_vary)
    parser.add_argument("--image", required=True, metavar="FILE", help="picture to vary, or its address")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--strength", type=float, metavar="X", help="share of the scales that are sampled (0.5)")
    amount.add_argument("--num-kept-scales", type=int, metavar="N", help="scales that are kept")
    _add_shared(parser)


def _vary(options: argparse.Namespace) -> None:
    from .. import VARImg2ImgPipeline

    kept = {"strength": options.strength, "num_kept_scales": options.num_kept_scales}
    _run(options, VARImg2ImgPipeline.from_pretrained, image=options.image, **kept)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    for add in (add_labels, add_picture, add_sampling, add_model):
        add(parser)


def _run(options: argparse.Namespace, load: Callable[..., Any] | None = None, **arguments: Any) -> None:
    """Call a pipeline with the shared arguments and its own; those that name images are read first."""
    from .common import open_pipeline, read_images, sampling_arguments, save_result

    for name in arguments.keys() & {"image", "mask_image"}:
        (arguments[name],) = read_images([arguments[name]])
    if "condition_image" in arguments:
        arguments["condition_image"] = read_images(arguments["condition_image"])
    pipe = open_pipeline(options, load)
    unknown = [name for name in arguments if name not in inspect.signature(type(pipe).__call__).parameters]
    if unknown:
        raise ValueError(f"--{unknown[0].replace('_', '-')} is not an option of a {type(pipe).__name__}.")
    output = pipe(**arguments, **sampling_arguments(pipe, options))
    save_result(pipe, output.images, output.codes, options)
