# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other code as folders."""

import argparse
from pathlib import Path

from .flags import check_output


# Options that name files, and priors that make a pipeline with the tokenizer of the same code.
FILES = (
    "vqvae",
    "var",
    "vqvae2",
    "pixelsnail",
    "pixelcnn",
    "taming_vqgan",
    "taming_gpt",
    "rqvae",
    "rq_transformer",
    "switti",
)
TOKENIZERS = {"var": "vqvae", "taming_gpt": "taming_vqgan", "rq_transformer": "rqvae", "switti": "vqvae"}
TEXT_ENCODERS = {"text_encoder": "CLIP-L", "text_encoder_2": "OpenCLIP-bigG"}


def add_convert(commands) -> None:
    """Add the command `convert`."""
    parser = commands.add_parser(
        "convert",
        help="turn checkpoints of other code into a folder",
        description="Convert checkpoints of other public code. The output is the folder of a model, or of a pipeline for a "
        "transformer and its tokenizer: --var with --vqvae, --taming-gpt with --taming-vqgan or the tokenizers in its own "
        "file, --rq-transformer with --rqvae, --switti with --vqvae.",
        epilog="example: hf-var convert --vqvae vae_ch160v4096z32.pth --var var_d16.pth --output var-d16-256",
    )
    parser.set_defaults(check=_check, run=_convert)
    parser.add_argument("--vqvae", type=Path, metavar="FILE", help="VAR's tokenizer, .pth or .safetensors")
    parser.add_argument("--var", type=Path, metavar="FILE", help="VAR's transformer, .pth or .safetensors")
    parser.add_argument("--vqvae2", type=Path, metavar="FILE", help="VQ-VAE-2, or one level, of vq-vae-2-pytorch")
    parser.add_argument("--pixelsnail", type=Path, metavar="FILE", help="PixelSNAIL of vq-vae-2-pytorch")
    parser.add_argument("--pixelcnn", type=Path, metavar="FILE", help="gated PixelCNN of pytorch-vqvae")
    parser.add_argument("--taming-vqgan", type=Path, metavar="FILE", help="VQGAN's tokenizer of taming-transformers")
    parser.add_argument("--taming-gpt", type=Path, metavar="FILE", help="GPT of taming-transformers (VQGAN)")
    parser.add_argument("--rqvae", type=Path, metavar="FILE", help="RQ-VAE of rq-vae-transformer")
    parser.add_argument("--rq-transformer", type=Path, metavar="FILE", help="RQ-Transformer of rq-vae-transformer")
    parser.add_argument("--switti", type=Path, metavar="FILE", help="Switti's transformer, .safetensors or .pth")
    for name, text in TEXT_ENCODERS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="REPO",
            help=f"folder or Hub repo of the {text} text encoder, with its tokenizer, for the pipeline of --switti",
        )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--license", metavar="NAME", help="licence for the card (that of the released weights)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Hub repo, such as user/var-d16-256")
    parser.add_argument("--private", action="store_true", help="make a new Hub repo private")
    unknown = parser.add_argument_group("what a file may not tell")
    unknown.add_argument("--patch-nums", type=int, nargs="+", metavar="N", help="side of every token map")
    unknown.add_argument("--map-size", type=int, nargs=2, metavar="N", help="height and width of a PixelCNN's map")
    unknown.add_argument(
        "--image-size", type=int, nargs="+", metavar="N", help="side, or height and width, of --vqvae2 (256)"
    )
    unknown.add_argument("--section", metavar="NAME", help="which tokenizer of a Net2NetTransformer --taming-vqgan is")
    unknown.add_argument("--num-attention-heads", type=int, metavar="N", help="attention heads of a transformer")
    unknown.add_argument(
        "--causal",
        dest="is_causal",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether the scales of --switti see earlier ones, `use_ar` in its config.json",
    )
    unknown.add_argument("--id2label", type=Path, metavar="FILE", help="JSON file with the label names, in order")


def given_files(options: argparse.Namespace) -> list[str]:
    """The options that name a file, of those that are given."""
    return [name for name in FILES if getattr(options, name) is not None]


def _check(options: argparse.Namespace) -> None:
    check_output(options.output, is_folder=True)
    given = given_files(options)
    prior = next((name for name in TOKENIZERS if name in given), None)
    if len(given) != 1 and not (prior is not None and set(given) == {prior, TOKENIZERS[prior]}):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in FILES)
        raise ValueError(f"pass one of {flags}, or a transformer with its tokenizer.")
    if any(getattr(options, name) is not None for name in TEXT_ENCODERS) and set(given) != {"switti", "vqvae"}:
        raise ValueError("--text-encoder and --text-encoder-2 go with --switti and --vqvae.")


def _convert(options: argparse.Namespace) -> None:
    from .converting import convert

    convert(options)
