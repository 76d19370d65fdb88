# SPDX-License-Identifier: Apache-2.0
"""Official checkpoints as folders."""

import argparse
import json
from pathlib import Path
from textwrap import shorten

from transformers import PreTrainedModel

from .. import VARPipeline
from ..conversion import (
    load_official_var,
    load_official_vqvae,
    load_pixelcnn,
    load_pixelsnail,
    load_rq_transformer,
    load_rqvae,
    load_taming_gpt,
    load_taming_vqgan,
    load_vqvae2,
)
from .common import check_output


# Bounds the copy in memory while the weights are written.
MAX_SHARD_SIZE = "2GB"
# Models that are converted alone.
LOADERS = {
    "vqvae2": load_vqvae2,
    "pixelsnail": load_pixelsnail,
    "pixelcnn": load_pixelcnn,
    "taming_vqgan": load_taming_vqgan,
    "taming_gpt": load_taming_gpt,
    "rqvae": load_rqvae,
    "rq_transformer": load_rq_transformer,
}


def add_convert(commands) -> None:
    """Add the command `convert`."""
    parser = commands.add_parser(
        "convert",
        help="turn checkpoints of other code into a folder",
        description="Convert checkpoints of the official VAR code: with --vqvae and --var the output is a VARPipeline "
        "folder, with one of them the folder of that model. Models of other public code are converted alone.",
        epilog="example: hf-var convert --vqvae vae_ch160v4096z32.pth --var var_d16.pth --output var-d16-256",
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("--vqvae", type=Path, metavar="FILE", help="tokenizer, .pth or .safetensors")
    parser.add_argument("--var", type=Path, metavar="FILE", help="transformer, .pth or .safetensors")
    parser.add_argument("--vqvae2", type=Path, metavar="FILE", help="VQ-VAE-2, or one level, of vq-vae-2-pytorch")
    parser.add_argument("--pixelsnail", type=Path, metavar="FILE", help="PixelSNAIL of vq-vae-2-pytorch")
    parser.add_argument("--pixelcnn", type=Path, metavar="FILE", help="gated PixelCNN of pytorch-vqvae")
    parser.add_argument("--taming-vqgan", type=Path, metavar="FILE", help="VQGAN's tokenizer of taming-transformers")
    parser.add_argument("--taming-gpt", type=Path, metavar="FILE", help="GPT of taming-transformers (VQGAN)")
    parser.add_argument("--rqvae", type=Path, metavar="FILE", help="RQ-VAE of rq-vae-transformer")
    parser.add_argument("--rq-transformer", type=Path, metavar="FILE", help="RQ-Transformer of rq-vae-transformer")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
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
    unknown.add_argument("--id2label", type=Path, metavar="FILE", help="JSON file with the label names, in order")


def _convert(options: argparse.Namespace) -> None:
    check_output(options.output, is_folder=True)
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
    alone = [name for name in LOADERS if getattr(options, name) is not None]
    num_files = len(alone) + (options.vqvae is not None or options.var is not None)
    if num_files != 1:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in LOADERS)
        raise ValueError(f"pass --vqvae, --var or both, or one of {flags}.")
    fields = {} if options.id2label is None else {"id2label": _read_label_names(options.id2label)}
    if alone:
        for name in ("patch_nums", "map_size", "image_size", "section", "num_attention_heads"):
            value = getattr(options, name)
            if value is not None:
                fields[name] = value[0] if name == "image_size" and len(value) == 1 else value
        return LOADERS[alone[0]](getattr(options, alone[0]), **fields)
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
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        pairs = enumerate(names) if isinstance(names, list) else names.items()
        id2label = {int(label): name for label, name in pairs}
    # No JSON, no UTF-8, other keys than numbers, or neither a list nor an object.
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"--id2label {str(path)!r} must be a JSON list of names, or names by id: {error}.") from error
    if not id2label or not all(isinstance(name, str) for name in id2label.values()):
        raise ValueError(f"--id2label {str(path)!r} must hold names, got {shorten(str(names), 80)}.")
    return id2label
