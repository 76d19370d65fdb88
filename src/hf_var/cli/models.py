# SPDX-License-Identifier: Apache-2.0
"""Official checkpoints as folders."""

import argparse
import json
from pathlib import Path
from typing import Any

from .. import VARPipeline
from ..conversion import load_official_var, load_official_vqvae, load_vqvae2


# Bounds the copy in memory while the weights are written.
MAX_SHARD_SIZE = "2GB"


def add_convert(commands) -> None:
    """Add the command `convert`."""
    parser = commands.add_parser(
        "convert",
        help="turn checkpoints of other code into a folder",
        description="Convert checkpoints of the official VAR code, or of rosinality/vq-vae-2-pytorch. With --vqvae and "
        "--var the output is a VARPipeline folder, with one file the folder of that model.",
        epilog="example: hf-var convert --vqvae vae_ch160v4096z32.pth --var var_d16.pth --output var-d16-256",
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("--vqvae", type=Path, metavar="FILE", help="tokenizer, .pth or .safetensors")
    parser.add_argument("--var", type=Path, metavar="FILE", help="transformer, .pth or .safetensors")
    parser.add_argument(
        "--vqvae2", type=Path, metavar="FILE", help="VQ-VAE-2, or VQ-VAE of one level, .pt or .safetensors"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Hub repo, such as user/var-d16-256")
    parser.add_argument("--private", action="store_true", help="make a new Hub repo private")
    unknown = parser.add_argument_group("what a file may not tell")
    unknown.add_argument("--patch-nums", type=int, nargs="+", metavar="N", help="side of every token map")
    unknown.add_argument(
        "--image-size", type=int, nargs="+", metavar="N", help="side, or height and width, of --vqvae2 (256)"
    )
    unknown.add_argument("--num-attention-heads", type=int, metavar="N", help="heads of a model without QK-norm")
    unknown.add_argument("--id2label", type=Path, metavar="FILE", help="JSON file with the label names, in order")


def _convert(options: argparse.Namespace) -> None:
    if options.vqvae2 is not None:
        if options.vqvae is not None or options.var is not None:
            raise ValueError("--vqvae2 cannot go with --vqvae or --var.")
        size = options.image_size or [256]
        _save(load_vqvae2(options.vqvae2, image_size=size[0] if len(size) == 1 else size), options)
        return
    if options.vqvae is None and options.var is None:
        raise ValueError("pass --vqvae, --var or both, or --vqvae2.")
    shared = {} if options.patch_nums is None else {"patch_nums": options.patch_nums}
    models = {}
    if options.var is not None:
        fields = dict(shared)
        if options.num_attention_heads is not None:
            fields["num_attention_heads"] = options.num_attention_heads
        if options.id2label is not None:
            fields["id2label"] = _read_label_names(options.id2label)
        models["transformer"] = load_official_var(options.var, **fields)
        # The transformer's file tells the schedule, the tokenizer's only how many scales it has.
        shared = {"patch_nums": models["transformer"].config.patch_nums}
    if options.vqvae is not None:
        models["vqvae"] = load_official_vqvae(options.vqvae, **shared)
    _save(VARPipeline(**models) if len(models) == 2 else next(iter(models.values())), options)


def _save(converted: Any, options: argparse.Namespace) -> None:
    """Write a pipeline or a model, and upload it if that was asked for."""
    upload = {}
    if options.push_to_hub is not None:
        upload = {"push_to_hub": True, "repo_id": options.push_to_hub, "private": options.private or None}
    # A string: diffusers cannot split a path when it uploads.
    converted.save_pretrained(str(options.output), max_shard_size=MAX_SHARD_SIZE, **upload)
    print(f"wrote {options.output}")
    if options.push_to_hub is not None:
        print(f"pushed to {options.push_to_hub}")


def _read_label_names(path: Path) -> dict[int, str]:
    names = json.loads(path.read_text(encoding="utf-8"))
    return dict(enumerate(names)) if isinstance(names, list) else {int(label): name for label, name in names.items()}
