# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other code as folders."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from .. import ARPipeline, RQTransformer, VARPipeline, VARTextToImagePipeline
from ..conversion import (
    ORIGINS,
    load_official_var,
    load_official_vqvae,
    load_pixelcnn,
    load_pixelsnail,
    load_rq_transformer,
    load_rqvae,
    load_switti,
    load_taming_gpt,
    load_taming_vqgan,
    load_vqvae2,
    tokenizer_sections,
)
from ..hub.cards import write_converted_card
from ..hub.push import push_result
from ..text_encoders import TEXT_ENCODERS, load_text_encoder
from .common import check_output


# Bounds the copy in memory while the weights are written.
MAX_SHARD_SIZE = "2GB"
# How each file is read.
LOADERS = {
    "vqvae": load_official_vqvae,
    "var": load_official_var,
    "vqvae2": load_vqvae2,
    "pixelsnail": load_pixelsnail,
    "pixelcnn": load_pixelcnn,
    "taming_vqgan": load_taming_vqgan,
    "taming_gpt": load_taming_gpt,
    "rqvae": load_rqvae,
    "rq_transformer": load_rq_transformer,
    "switti": load_switti,
}
# Priors that make a pipeline with the tokenizer of the same code.
TOKENIZERS = {"var": "vqvae", "taming_gpt": "taming_vqgan", "rq_transformer": "rqvae", "switti": "vqvae"}
FIELDS = ("patch_nums", "map_size", "image_size", "section", "num_attention_heads", "is_causal")


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
    parser.set_defaults(run=_convert)
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
    for name, text in zip(TEXT_ENCODERS, ("CLIP-L", "OpenCLIP-bigG"), strict=True):
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


def _convert(options: argparse.Namespace) -> None:
    check_output(options.output, is_folder=True)
    given = [name for name in LOADERS if getattr(options, name) is not None]
    converted = _load(options, given)
    converted.save_pretrained(str(options.output), max_shard_size=MAX_SHARD_SIZE)
    # Switti's tokenizer has VAR's keys, but weights of its own.
    origins = [asdict(ORIGINS[name]) for name in given if not (name == "vqvae" and "switti" in given)]
    origins = list({origin["name"]: origin for origin in origins}.values())
    write_converted_card(
        options.output, type(converted).__name__, origins, license=options.license, repo_id=options.push_to_hub
    )
    print(f"wrote {options.output}")
    if options.push_to_hub is not None:
        message = "Upload a converted checkpoint"
        push_result(options.output, options.push_to_hub, message, options.private or None)
        print(f"pushed to {options.push_to_hub}")


def _load(options: argparse.Namespace, given: list[str]) -> DiffusionPipeline | PreTrainedModel:
    """The model or pipeline of the files that are given."""
    prior = next((name for name in TOKENIZERS if name in given), None)
    if len(given) != 1 and not (prior is not None and set(given) == {prior, TOKENIZERS[prior]}):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in LOADERS)
        raise ValueError(f"pass one of {flags}, or a transformer with its tokenizer.")
    if any(getattr(options, name) is not None for name in TEXT_ENCODERS) and set(given) != {"switti", "vqvae"}:
        raise ValueError("--text-encoder and --text-encoder-2 go with --switti and --vqvae.")
    fields: dict[str, Any] = {} if options.id2label is None else {"id2label": _read_label_names(options.id2label)}
    for name in FIELDS:
        value = getattr(options, name)
        if value is not None:
            fields[name] = value[0] if name == "image_size" and len(value) == 1 else value
    if prior is None:
        return LOADERS[given[0]](getattr(options, given[0]), **fields)
    section = {"section": fields.pop("section")} if "section" in fields else {}
    transformer = LOADERS[prior](getattr(options, prior), **fields)
    # Its file tells the schedule, that of a tokenizer often nothing about it.
    shared: dict[str, Any] = {"patch_nums": transformer.config.patch_nums}
    tokenizer = TOKENIZERS[prior]
    if prior == "taming_gpt":
        return _taming_pipeline(options, transformer, section)
    if tokenizer not in given:
        return transformer
    vqvae = LOADERS[tokenizer](getattr(options, tokenizer), **shared)
    if prior == "switti":
        return VARTextToImagePipeline(transformer, vqvae, **_text_encoders(options))
    return VARPipeline(transformer, vqvae) if prior == "var" else ARPipeline(vqvae, transformer)


def _text_encoders(options: argparse.Namespace) -> dict[str, Any]:
    """Text encoders and their tokenizers, of those that are given."""
    parts: dict[str, Any] = {}
    for name in TEXT_ENCODERS:
        source = getattr(options, name)
        if source is not None:
            parts[name], tokenizer = load_text_encoder(source, f"--{name.replace('_', '-')}")
            parts[name.replace("text_encoder", "tokenizer")] = tokenizer
    return parts


def _taming_pipeline(
    options: argparse.Namespace, transformer: RQTransformer, section: dict[str, Any]
) -> ARPipeline | RQTransformer:
    """VQGAN's GPT with the tokenizers that another file, or its own, holds; alone if there is none."""
    config, sections = transformer.config, tokenizer_sections(options.taming_gpt)
    shared: dict[str, Any] = {"patch_nums": config.patch_nums}
    if options.taming_vqgan is not None:
        vqvae = load_taming_vqgan(options.taming_vqgan, **section, **shared)
    elif "first_stage_model" in sections:
        vqvae = load_taming_vqgan(options.taming_gpt, section="first_stage_model", **shared)
    else:
        return transformer
    condition_vqvae = None
    if "cond_stage_model" in sections:
        # A map of the same size before that of the image.
        same: dict[str, Any] = shared if config.condition_length == config.num_positions else {}
        condition_vqvae = load_taming_vqgan(options.taming_gpt, section="cond_stage_model", **same)
    return ARPipeline(vqvae, transformer, condition_vqvae=condition_vqvae)


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
