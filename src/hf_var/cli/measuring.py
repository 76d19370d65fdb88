# SPDX-License-Identifier: Apache-2.0
"""Commands that measure images: `score` and `reconstruct`."""

import argparse
import math
from typing import Any

from PIL import Image

from .flags import add_model, add_picture, check_picture, choose_model, label


def add_score(commands) -> None:
    """Add the command `score`."""
    parser = commands.add_parser(
        "score",
        help="how likely images are, or which classes they show",
        description="Print how likely a model finds images of a class or of a text, in bits per token, for all tokens and "
        "for each scale; or, with --classify, which classes it takes them for, or which texts of --prompt.",
        epilog="example: hf-var score --images a.png b.png --classify 3 --model REPO",
    )
    parser.set_defaults(check=_check_score, run=_score)
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="pictures, or their addresses")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--class-label", default="none", metavar="LABEL", help="id or name (none: unconditional)")
    parser.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="one text for all images or one for each, or those to choose from"
    )
    task.add_argument("--classify", type=int, metavar="N", help="print the N most probable classes instead")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once (32)")
    add_model(parser)
    parser.set_defaults(model=None)


def _check_score(options: argparse.Namespace) -> None:
    if options.classify is not None and options.classify < 1:
        raise ValueError(f"--classify must be at least 1, got {options.classify}.")


def _score(options: argparse.Namespace) -> None:
    from ..scoring import classify, log_likelihood
    from .common import open_pipeline, read_images

    images = read_images(options.images)
    choose_model(options)
    pipe = open_pipeline(options)
    condition: Any = {} if options.prompt is None else {"prompt": options.prompt}
    if options.classify is not None:
        names = options.prompt or pipe.id2label
        posterior = classify(pipe, images, batch_size=options.batch_size, **condition).posterior
        best = posterior.sort(dim=1, descending=True)
        for path, shares, ids in zip(options.images, best.values.tolist(), best.indices.tolist(), strict=True):
            found = [f"{names[label_id]} {share:.3f}" for share, label_id in zip(shares, ids, strict=True)]
            print(f"{path}: {', '.join(found[: options.classify])}")
        return
    found = log_likelihood(pipe, images, label(options.class_label), batch_size=options.batch_size, **condition)
    lengths = pipe.vqvae.config.scale_lengths
    for path, total, scales in zip(options.images, found.total.tolist(), found.per_scale.tolist(), strict=True):
        bits = [-value / length / math.log(2) for value, length in zip(scales, lengths, strict=True)]
        parts = " ".join(f"{value:.2f}" for value in bits)
        print(f"{path}: {-total / sum(lengths) / math.log(2):.3f} bits per token; by scale: {parts}")


def add_reconstruct(commands) -> None:
    """Add the command `reconstruct`."""
    parser = commands.add_parser(
        "reconstruct",
        help="send images through the tokenizer",
        description="Encode images and decode them again, to see what the tokenizer keeps: originals above, "
        "reconstructions below.",
        epilog="example: hf-var reconstruct --images a.png b.png --model REPO --output reconstructions.png",
    )
    parser.set_defaults(check=check_picture, run=_reconstruct)
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="pictures, or their addresses")
    add_picture(parser)
    add_model(parser)


def _reconstruct(options: argparse.Namespace) -> None:
    from .common import open_pipeline, read_images, save_result

    images = read_images(options.images)
    pipe = open_pipeline(options)
    codes = pipe.encode_images(images)
    found = pipe.decode_progress(codes)[-1]
    save_result(pipe, _originals(images, found[0], pipe) + found, codes, options, columns=len(images))


def _originals(images: list[Image.Image], found: Image.Image, pipe: Any) -> list[Image.Image]:
    """What the tokenizer read, of the size and mode of a reconstruction."""
    import numpy as np

    from ..image_decoding import decode_picture
    from ..pipelines.images import image_pixels

    config = pipe.vqvae.config
    if config.num_pixel_classes is not None:
        ids = image_pixels(images, config).numpy()  # pyright: ignore[reportArgumentType]
        return [Image.fromarray(single.astype(np.asarray(found).dtype)) for single in ids]
    return [decode_picture(image, config.in_channels).convert(found.mode).resize(found.size) for image in images]
