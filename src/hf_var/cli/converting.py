# SPDX-License-Identifier: Apache-2.0
"""What `hf-var convert` does: checkpoints of other code as folders."""

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
from .models import TOKENIZERS, given_files


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
FIELDS = ("patch_nums", "map_size", "image_size", "section", "num_attention_heads", "is_causal")


def convert(options: argparse.Namespace) -> None:
    """Write the folder of `hf-var convert`, and upload it if that is asked for."""
    given = given_files(options)
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
