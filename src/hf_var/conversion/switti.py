# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of Switti (Voronov et al. 2024) to our models and back.

A state dict does not tell whether tokens attend to earlier scales (`use_ar`): the keys are the same, and the mask that
it may hold is not always the model's, since the official trainer writes a block-causal one whenever it goes on at
another resolution. The `config.json` beside a released file says it. Rotary positions are taken from there as well, or
are the released models'.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..priors import TextVARConfig, TextVARTransformer
from ..ranges import NonNegativeInt, PositiveFloat, PositiveInt, checked
from ..schedules import RELEASED_PATCH_NUMS
from ..weight_files import StateDict, read_state_dict
from .common import (
    Names,
    Part,
    check_overrides,
    count,
    fill,
    official_weights,
    rename,
    require_keys,
    schedule_buffers,
    square_maps,
)


KIND = "Switti transformer"
# Buffers which follow from the configuration; files come with and without them.
DERIVED_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking")
# Arguments of the official class, and its defaults for those that a `config.json` lacks.
ARGUMENTS: dict[str, tuple[Any, Any]] = {
    "depth": (PositiveInt, 30),
    "rope": (bool, True),
    "rope_theta": (PositiveFloat, 10000),
    "rope_size": (PositiveFloat, 128),
    "use_swiglu_ffn": (bool, True),
    "use_ar": (bool, False),
    "use_crop_cond": (bool, True),
    "reso": (NonNegativeInt, 512),
}


def load_switti(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> TextVARTransformer:
    r"""
    Load a text-to-image transformer of the official code of Switti, such as `model.safetensors` of a released model.
    Beside a file, its `config.json` is read.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.safetensors` file, a `.pth` or `.pt` file, read with `weights_only=True` and memory-mapped, or a state
            dict.
        config_overrides:
            Fields of [`TextVARConfig`], in particular those which the weights do not contain: `is_causal` (the
            official `use_ar`), which must be given where there is no `config.json`; `num_attention_heads` where the
            width is not 64 per layer; `rope_theta` and `rope_size`; `patch_nums` where the level buffer is missing.

    Returns:
        [`TextVARTransformer`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read, is not such a model (the message lists the keys that are missing or
            left over), its `config.json` contradicts it, or leaves something open.
    """
    check_overrides(TextVARConfig, config_overrides)
    arguments = _read_arguments(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else {}
    state_dict = read_state_dict(checkpoint, section="switti")
    fields = _infer_fields(state_dict, arguments, config_overrides)
    config = TextVARConfig(**{**fields, **config_overrides})
    _check_schedule(state_dict, config)
    with torch.device("meta"):
        model = TextVARTransformer(config)
    weights = {name: tensor for name, tensor in state_dict.items() if not DERIVED_BUFFERS.fullmatch(name)}
    return fill(model, _switti_names(model), weights, KIND, view=_official_view)


def export_switti(model: TextVARTransformer) -> StateDict:
    """
    The official code's state dict of a [`TextVARTransformer`], equal to the one it was loaded from, with the buffers
    that the official class makes. Its `config.json` is not part of it: the official class needs
    `use_ar=model.config.is_causal`.

    Raises:
        `ValueError`: If maps are not square, the first one has several tokens, or the empty text is a learned vector,
            which the official code cannot.
    """
    config = model.config
    if config.scale_lengths[0] != 1 or any(height != width for height, width in config.scale_sizes):
        raise ValueError(
            f"`patch_nums` must be square maps and begin with 1 for the official code, got {config.patch_nums}."
        )
    if config.learned_empty_text:
        raise ValueError("`learned_empty_text` must be false for the official code, which encodes the empty text.")
    exported = official_weights(model, _switti_names(model), _official_view)
    return exported | schedule_buffers(config, exported["pos_start"])


def _read_arguments(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The arguments of the official class in the `config.json` beside a file; none if there is no such file."""
    path = Path(checkpoint).parent / "config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # Every configuration of the official class has its depth; other files may lie in the same folder.
        known = {name: content[name] for name in ARGUMENTS if name in content} if "depth" in content else {}
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{str(path)!r} must hold the arguments of a {KIND}: {error}.") from error
    if not known:
        return {}
    try:
        arguments = {
            name: checked(name, known.get(name, default), kind) for name, (kind, default) in ARGUMENTS.items()
        }
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must hold the arguments of a {KIND}: {error}") from error
    for name in ("rope", "use_swiglu_ffn"):
        if not arguments[name]:
            raise ValueError(f"`{name}` in {str(path)!r} must be true, as in all released models.")
    return arguments


def _infer_fields(state_dict: StateDict, arguments: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    names = ["word_embed.weight", "text_pooler.weight", "lvl_embed.weight", "head.weight"]
    names += ["blocks.0.cross_attn.to_kv.weight", "blocks.0.ffn.up_proj.weight"]
    require_keys(state_dict, KIND, dict.fromkeys(names, 2))
    inputs, pooler, _, head, keys, feed_forward = (state_dict[name].shape for name in names)
    hidden_size, latent_channels = inputs
    depth, has_crop = count(state_dict, r"blocks\.(\d+)\."), any(name.startswith("crop_embed.") for name in state_dict)
    for name, found in {"depth": depth, "use_crop_cond": has_crop}.items():
        if arguments.get(name, found) != found:
            raise ValueError(
                f"`{name}` is {arguments[name]} in config.json, but `checkpoint` has the weights of {found}."
            )
    fields = {
        "codebook_size": head[0],
        "latent_channels": latent_channels,
        "cross_attention_dim": keys[1],
        "pooled_projection_dim": pooler[1],
        "hidden_size": hidden_size,
        "intermediate_size": feed_forward[0],
        "num_hidden_layers": depth,
        "crop_conditioning": has_crop,
        **{name: arguments[name] for name in ("rope_theta", "rope_size") if arguments},
    }
    if "is_causal" not in overrides:
        if not arguments:
            raise ValueError(
                f"`is_causal` cannot be inferred from the weights of a {KIND}: pass what its config.json calls "
                "`use_ar`, is_causal=False or is_causal=True, or put that file beside the checkpoint."
            )
        fields["is_causal"] = arguments["use_ar"]
    if "patch_nums" not in overrides:
        fields["patch_nums"] = _infer_patch_nums(state_dict, arguments)
    if "num_attention_heads" not in overrides:
        if hidden_size != 64 * depth:
            raise ValueError(
                f"`num_attention_heads` cannot be inferred from a {KIND} whose width {hidden_size} is not 64 per layer"
                f": pass it, for instance num_attention_heads={hidden_size // 64 or 1}."
            )
        fields["num_attention_heads"] = depth
    return fields


def _infer_patch_nums(state_dict: StateDict, arguments: dict[str, Any]) -> list[int]:
    """The schedule, from the level buffer or its length, from the resolution, or from the number of scales."""
    levels, num_scales = state_dict.get("lvl_1L"), len(state_dict["lvl_embed.weight"])
    released = [list(numbers) for numbers in RELEASED_PATCH_NUMS.values()]
    if levels is not None:
        length = levels.numel()
        known = next((numbers for numbers in released if sum(number**2 for number in numbers) == length), None)
        maps = square_maps(levels, length) if known is None else known
        if maps is not None:
            return maps
    elif arguments and arguments["reso"] in RELEASED_PATCH_NUMS:
        return list(RELEASED_PATCH_NUMS[arguments["reso"]])
    elif len(fitting := [numbers for numbers in released if len(numbers) == num_scales]) == 1:
        return fitting[0]
    raise ValueError(
        f"`patch_nums` cannot be inferred from this {KIND} of {num_scales} scales: pass the size of every token map, "
        f"for instance patch_nums={RELEASED_PATCH_NUMS[512]}."
    )


def _check_schedule(state_dict: StateDict, config: TextVARConfig) -> None:
    """Raise a `ValueError` unless weights and buffers are those of the schedule."""
    num_scales, levels = len(state_dict["lvl_embed.weight"]), state_dict.get("lvl_1L")
    if num_scales != len(config.patch_nums):
        raise ValueError(
            f"`patch_nums` must be the {num_scales} maps that lvl_embed.weight has rows for, got {config.patch_nums}."
        )
    if levels is not None and levels.numel() != config.length:
        raise ValueError(
            f"`patch_nums` must be maps of {levels.numel()} tokens, of which lvl_1L holds the levels, got "
            f"{config.patch_nums} with {config.length}."
        )


def _switti_names(model: TextVARTransformer) -> Names:
    """Official name of every weight, and which part of it where the official code fuses several of ours."""
    rules = [
        (r"^embeddings\.condition_proj\.", "text_pooler."),
        (r"^embeddings\.input_proj\.", "word_embed."),
        (r"^embeddings\.start_position$", "pos_start"),
        (r"^embeddings\.level_embedding$", "lvl_embed.weight"),
        (r"^embeddings\.crop_embedding\.frequencies$", "crop_embed.weight"),
        (r"^embeddings\.crop_embedding\.proj\.", "crop_proj."),
        (r"^head_norm\.adaln\.linear\.", "head_nm.ada_lin.1."),
        (r"^layers\.", "blocks."),
        (r"\.adaln\.linear\.", ".ada_lin.1."),
        (r"\.crop_scale$", ".crop_cond_scales"),
        (r"\.attention_norm\.", ".self_attention_norm1."),
        (r"\.attention_out_norm\.", ".self_attention_norm2."),
        (r"\.cross_attention_norm\.", ".cross_attention_norm1."),
        (r"\.cross_attention_out_norm\.", ".cross_attention_norm2."),
        (r"\.context_norm\.", ".attention_y_norm."),
        (r"\.mlp_norm\.", ".ffn_norm1."),
        (r"\.mlp_out_norm\.", ".ffn_norm2."),
        (r"\.mlp\.", ".ffn."),
        (r"\.cross_attention\.q_proj\.", ".cross_attn.to_q."),
        (r"\.cross_attention\.[kv]_proj\.", ".cross_attn.to_kv."),
        (r"\.attention\.[qkv]_proj\.", ".attn.to_qkv."),
        (r"\.(cross_)?attention\.o_proj\.", r".\1attn.proj."),
    ]
    fused = [(r"\.attention\.([qkv])_proj\.", "qkv"), (r"\.cross_attention\.([kv])_proj\.", "kv")]
    names: dict[str, str | Part | tuple[str, ...]] = {}
    for name in model.state_dict():
        official = rename(name, rules)
        parts = [
            Part(official, kinds.index(match.group(1)), len(kinds))
            for pattern, kinds in fused
            if (match := re.search(pattern, name))
        ]
        names[name] = parts[0] if parts else official
    return names


def _official_view(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Give a weight the singleton dimensions of the official code."""
    return tensor.unsqueeze(0) if name == "pos_start" or name.endswith("crop_cond_scales") else tensor


__all__ = ["export_switti", "load_switti"]
