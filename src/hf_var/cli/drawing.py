# SPDX-License-Identifier: Apache-2.0
"""Images from labels, and from images and labels."""

import argparse

from .. import VARImg2ImgPipeline, VARInpaintPipeline, VARPipeline
from .common import (
    add_labels,
    add_model,
    add_picture,
    add_sampling,
    check_picture,
    load_pipeline,
    read_images,
    sampling_arguments,
    save_result,
)


def add_generate(commands) -> None:
    """Add the command `generate`."""
    parser = commands.add_parser(
        "generate",
        help="draw images of classes",
        description="Draw one image per class label and save them side by side. Without --model, handwritten digits are "
        "drawn with the checkpoint that ships with the package.",
        epilog="example: hf-var generate --class-labels 3 1 4 1 5 --resize 128 --output digits.png",
    )
    parser.set_defaults(run=_generate)
    add_labels(parser)
    add_picture(parser)
    add_sampling(parser)
    add_model(parser)


def _generate(options: argparse.Namespace) -> None:
    check_picture(options)
    pipe = load_pipeline(VARPipeline, options)
    output = pipe(**sampling_arguments(options))
    save_result(pipe, output.images, output.codes, options)


def add_inpaint(commands) -> None:
    """Add the command `inpaint`."""
    parser = commands.add_parser(
        "inpaint",
        help="draw a part of an image anew",
        description="Draw the part of an image that is white in a mask anew, as one of a class; a mask that is white "
        "around the middle extends the image.",
        epilog="example: hf-var inpaint --image dog.png --mask mask.png --class-labels cat --model REPO --output cat.png",
    )
    parser.set_defaults(run=_inpaint)
    parser.add_argument("--image", required=True, metavar="FILE", help="picture to edit, or its address")
    parser.add_argument("--mask", required=True, metavar="FILE", help="picture that is white where to draw")
    parser.add_argument(
        "--paste-original", action="store_true", help="keep the pixels of the black part exactly as they are"
    )
    parser.add_argument("--feather-width", type=int, metavar="PIXELS", help="width of the seam of --paste-original")
    add_labels(parser)
    add_picture(parser)
    add_sampling(parser)
    add_model(parser)


def _inpaint(options: argparse.Namespace) -> None:
    check_picture(options)
    if options.feather_width is not None and not options.paste_original:
        raise ValueError(f"--feather-width {options.feather_width} needs --paste-original.")
    image, mask = read_images([options.image, options.mask])
    pipe = load_pipeline(VARInpaintPipeline, options)
    output = pipe(
        image,
        mask,
        **sampling_arguments(options),
        paste_original=options.paste_original,
        feather_width=options.feather_width,
    )
    save_result(pipe, output.images, output.codes, options)


def add_vary(commands) -> None:
    """Add the command `vary`."""
    parser = commands.add_parser(
        "vary",
        help="draw variations of an image",
        description="Keep the coarse scales of an image and draw the fine ones anew, as those of a class. A small image "
        "becomes a large one in this way.",
        epilog="example: hf-var vary --image dog.png --strength 0.4 --class-labels dog --model REPO --output dogs.png",
    )
    parser.set_defaults(run=_vary)
    parser.add_argument("--image", required=True, metavar="FILE", help="picture to vary, or its address")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--strength", type=float, metavar="X", help="share of the scales that are drawn (0.5)")
    amount.add_argument("--num-kept-scales", type=int, metavar="N", help="scales that are kept")
    add_labels(parser)
    add_picture(parser)
    add_sampling(parser)
    add_model(parser)


def _vary(options: argparse.Namespace) -> None:
    check_picture(options)
    (image,) = read_images([options.image])
    pipe = load_pipeline(VARImg2ImgPipeline, options)
    output = pipe(
        image, **sampling_arguments(options), strength=options.strength, num_kept_scales=options.num_kept_scales
    )
    save_result(pipe, output.images, output.codes, options)
