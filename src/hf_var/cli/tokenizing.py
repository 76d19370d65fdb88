# SPDX-License-Identifier: Apache-2.0
"""What goes before a training."""

import argparse


def add_tokenize(commands) -> None:
    """Add the command `tokenize`."""
    parser = commands.add_parser(
        "tokenize",
        help="turn a data set of images into codes",
        description="Encode the images of a data set once, into parquet files of codes for the training of a "
        "transformer. Killed and given again, the command goes on where it was. Needs the extra `train`; "
        "examples/tokenize_dataset.py does the same in several processes.",
        epilog="example: hf-var tokenize --data user/images --vqvae user/vqvae --horizontal-flip --output codes",
    )
    parser.set_defaults(run=_tokenize)
    parser.add_argument(
        "--data", required=True, help="Hub data set, folder of class folders, or glob of parquet or tar files"
    )
    parser.add_argument("--vqvae", required=True, metavar="REPO", help="tokenizer, a folder or Hub repo")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Hub data set, such as user/codes")
    parser.add_argument("--license", metavar="NAME", help="licence of the images, for the data set card")
    source = parser.add_argument_group("data")
    source.add_argument("--split", metavar="NAME", help="train, or the only split")
    source.add_argument("--image-column", metavar="NAME", help="the only column with images")
    source.add_argument("--label-column", metavar="NAME", help="label, cls or the only column of labels")
    source.add_argument("--num-labels", type=int, metavar="N", help="0 leaves labels out (as many as the data names)")
    source.add_argument("--streaming", action="store_true", help="read the data as it comes, without an index")
    source.add_argument(
        "--max-broken-share", type=float, metavar="X", help="stop above this share of broken images (0.01)"
    )
    crops = parser.add_argument_group("crops")
    crops.add_argument("--num-crops", type=int, metavar="N", help="random crops of each image (1: the centre)")
    crops.add_argument("--horizontal-flip", action="store_true", help="add the mirror image of every crop")
    crops.add_argument(
        "--resize-ratio", type=float, metavar="X", help="images cover X times the size they are cut to (1.125)"
    )
    crops.add_argument("--interpolation", metavar="NAME", help="lanczos, bicubic, bilinear, hamming or box (lanczos)")
    crops.add_argument("--seed", type=int, help="seed of the draws (0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--rows-per-shard", type=int, metavar="N", help="images that become one file (10000)")
    machine.add_argument("--batch-size", type=int, metavar="N", help="crops per forward pass (64)")
    machine.add_argument("--dataloader-num-workers", type=int, metavar="N", help="processes that load images (0)")
    machine.add_argument("--mixed-precision", metavar="NAME", help="no, fp16 or bf16 (no)")


def _tokenize(options: argparse.Namespace) -> None:
    # What it needs comes with an extra.
    from accelerate import Accelerator

    from ..data.tokenization import TokenizationConfig, tokenize_dataset

    # The defaults are those of the script.
    given = {name: value for name, value in vars(options).items() if value is not None}
    del given["run"], given["command"]
    given["output_dir"] = given.pop("output")
    if options.push_to_hub is not None:
        given |= {"push_to_hub": True, "hub_dataset_id": options.push_to_hub}
    args = TokenizationConfig(**given)
    count = tokenize_dataset(args, Accelerator(mixed_precision=args.mixed_precision))
    print(f"wrote {count.rows} rows of codes from {count.images - count.broken_images} images to {options.output}")
    if options.push_to_hub is not None:
        print(f"pushed to {options.push_to_hub}")
