# SPDX-License-Identifier: Apache-2.0
"""Official checkpoints as folders."""

import argparse
import json
from pathlib import Path

from transformers import PreTrainedModel

from .. import VARPipeline
from ..conversion import load_official_var, load_official_vqvae, load_pixelcnn, load_pixelsnail


# Bounds the copy in memory while the weights are written.
MAX_SHARD_SIZE = "2GB"
# Priors that are converted alone.
PIXEL_PRIORS = {"pixelcnn": load_pixelcnn, "pixelsnail": load_pixelsnail}


def add_convert(commands) -> None:
    """Add the command `convert`."""
    parser = commands.add_parser(
        "convert",
        help="turn official checkpoints into a pipeline folder",
        description="Convert checkpoints of the official VAR code. With both files the output is a VARPipeline folder, "
        "with one of them the folder of that model. A PixelCNN or PixelSNAIL of the public PyTorch code is converted alone.",
        epilog="example: hf-var convert --vqvae vae_ch160v4096z32.pth --var var_d16.pth --output var-d16-256",
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("--vqvae", type=Path, metavar="FILE", help="tokenizer, .pth or .safetensors")
    parser.add_argument("--var", type=Path, metavar="FILE", help="transformer, .pth or .safetensors")
    parser.add_argument("--pixelcnn", type=Path, metavar="FILE", help="gated PixelCNN of pytorch-vqvae")
    parser.add_argument("--pixelsnail", type=Path, metavar="FILE", help="PixelSNAIL of vq-vae-2-pytorch")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Hub repo, such as user/var-d16-256")
    parser.add_argument("--private", action="store_true", help="make a new Hub repo private")
    unknown = parser.add_argument_group("what a file may not tell")
    unknown.add_argument("--patch-nums", type=int, nargs="+", metavar="N", help="side of every token map")
    unknown.add_argument("--map-size", type=int, nargs=2, metavar="N", help="height and width of a PixelCNN's map")
    unknown.add_argument("--num-attention-heads", type=int, metavar="N", help="heads of a model without QK-norm")
    unknown.add_argument("--id2label", type=Path, metavar="FILE", help="JSON file with the label names, in order")


def _convert(options: argparse.Namespace) -> None:
    converted = _load(options)
    upload = {}
    if options.push_to_hub is not None:
        upload = {"push_to_hub": True, "repo_id": options.push_to_hub, "private": options.private or None}
    # A string: diffusers cannot split a path when it uploads.
    converted.save_pretrained(str(options.output), max_shard_size=MAX_SHARD_SIZE, **upload)
    print(f"wrote {options.output}")
    if options.push_to_hub is not None:
        print(f"pushed to {options.push_to_hub}")


def _load(options: argparse.Namespace) -> VARPipeline | PreTrainedModel:
    """The model or pipeline of the files that are given."""
    priors = [name for name in PIXEL_PRIORS if getattr(options, name) is not None]
    num_files = len(priors) + (options.vqvae is not None or options.var is not None)
    if num_files != 1:
        raise ValueError("pass --vqvae, --var or both, or one of --pixelcnn and --pixelsnail.")
    fields = {} if options.id2label is None else {"id2label": _read_label_names(options.id2label)}
    if priors:
        if options.map_size is not None:
            fields["map_size"] = options.map_size
        return PIXEL_PRIORS[priors[0]](getattr(options, priors[0]), **fields)
    shared = {} if options.patch_nums is None else {"patch_nums": options.patch_nums}
    models = {}
    if options.var is not None:
        if options.num_attention_heads is not None:
            fields["num_attention_heads"] = options.num_attention_heads
        models["transformer"] = load_official_var(options.var, **shared, **fields)
        # The transformer's file tells the schedule, the tokenizer's only how many scales it has.
        shared = {"patch_nums": models["transformer"].config.patch_nums}
    if options.vqvae is not None:
        models["vqvae"] = load_official_vqvae(options.vqvae, **shared)
    return VARPipeline(**models) if len(models) == 2 else next(iter(models.values()))


def _read_label_names(path: Path) -> dict[int, str]:
    names = json.loads(path.read_text(encoding="utf-8"))
    return dict(enumerate(names)) if isinstance(names, list) else {int(label): name for label, name in names.items()}
