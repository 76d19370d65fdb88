# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of rosinality/vq-vae-2-pytorch's `PixelSNAIL`, the public priors of VQ-VAE-2, to our model and back."""

import os
import re
from collections.abc import Mapping

import torch

from ..priors import PixelSNAIL, PixelSNAILConfig
from ..weight_files import StateDict, read_state_dict
from .common import check_overrides, count, fill, rename, require_keys


# Follows from the size of the map.
POSITIONS = "background"
NUM_ATTENTION_HEADS = 8
# The coarser map has half the side.
CONDITION_FACTOR = 2


def load_pixelsnail(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> PixelSNAIL:
    r"""
    Load a PixelSNAIL of rosinality/vq-vae-2-pytorch, the prior of the top or of the bottom codes of a VQ-VAE-2.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pt` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict.
        config_overrides:
            Fields of [`PixelSNAILConfig`] which the file does not contain, such as `dropout`.

    Returns:
        [`PixelSNAIL`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read or is not such a model (the message lists the keys that are missing or left
            over).

    Example:

    ```python
    >>> from hf_var import PixelSNAIL, PixelSNAILConfig
    >>> from hf_var.conversion import export_pixelsnail, load_pixelsnail

    >>> sizes = {"codebook_size": 32, "hidden_size": 32, "residual_size": 16, "num_blocks": 1}
    >>> state_dict = export_pixelsnail(PixelSNAIL(PixelSNAILConfig(map_size=4, **sizes)))
    >>> load_pixelsnail(state_dict).config.map_size
    (4, 4)
    ```
    """
    check_overrides(PixelSNAILConfig, config_overrides)
    state_dict = read_state_dict(checkpoint, section="pixelsnail")
    config = PixelSNAILConfig(**{**_infer_fields(state_dict), **config_overrides})
    with torch.device("meta"):
        model = PixelSNAIL(config)
    weights = {name: weight for name, weight in state_dict.items() if name != POSITIONS}
    return fill(model, _names(model), weights, "PixelSNAIL", view=_view)


def export_pixelsnail(model: PixelSNAIL) -> StateDict:
    """
    The state dict of rosinality/vq-vae-2-pytorch of a [`PixelSNAIL`], equal to the one it was loaded from.

    Raises:
        `ValueError`: If the model has classes or sizes which that code cannot have.
    """
    config = model.config
    if config.num_labels:
        raise ValueError(f"`num_labels` must be 0 for that code, which has no classes, got {config.num_labels}.")
    if config.attention and config.num_attention_heads != NUM_ATTENTION_HEADS:
        raise ValueError(
            f"`num_attention_heads` must be {NUM_ATTENTION_HEADS} for that code, got {config.num_attention_heads}."
        )
    if config.condition_map_size is not None:
        if config.num_condition_codes != config.codebook_size:
            raise ValueError(
                "`condition_codebook_size` must be that of the model for that code, which has one for both, got "
                f"{config.num_condition_codes} and {config.codebook_size}."
            )
        if config.condition_map_size != _coarser(config.map_size):
            raise ValueError(
                f"`condition_map_size` must be half of `map_size` for that code, got {config.condition_map_size} and "
                f"{config.map_size}."
            )
    names, weights = _names(model), model.state_dict()
    exported = {names[ours]: _view(names[ours], weight).clone() for ours, weight in weights.items()}
    return {POSITIONS: model.positions(model.device).to(model.dtype), **exported}


def _infer_fields(state_dict: StateDict) -> dict:
    first_conv, first_block = "horizontal.conv.conv.weight_v", "blocks.0.resblocks.0.conv1.conv.conv.weight_v"
    require_keys(state_dict, "PixelSNAIL", dict.fromkeys([POSITIONS, first_conv, first_block], 4))
    hidden_size, codebook_size = state_dict[first_conv].shape[:2]
    map_size = tuple(state_dict[POSITIONS].shape[2:])
    fields = {
        "map_size": map_size,
        "codebook_size": codebook_size,
        "hidden_size": hidden_size,
        "residual_size": len(state_dict[first_block]),
        "kernel_size": state_dict[first_block].shape[-1],
        "num_blocks": count(state_dict, r"blocks\.(\d+)\."),
        "num_res_blocks": count(state_dict, r"blocks\.0\.resblocks\.(\d+)\."),
        "attention": "blocks.0.causal_attention.query.weight_v" in state_dict,
        "num_attention_heads": NUM_ATTENTION_HEADS,
        "num_output_res_blocks": count(state_dict, r"out\.(\d+)\.conv1\."),
    }
    condition_conv = state_dict.get("cond_resnet.blocks.0.conv.weight_v")
    if condition_conv is not None:
        fields["condition_map_size"] = _coarser(map_size)
        fields["condition_hidden_size"] = len(condition_conv)
        fields["num_condition_res_blocks"] = count(state_dict, r"cond_resnet\.blocks\.(\d+)\.") - 1
    return fields


def _coarser(map_size) -> tuple[int, ...]:
    return tuple(side // CONDITION_FACTOR for side in map_size)


def _names(model: PixelSNAIL) -> dict[str, str]:
    """Name of every weight in that code, whose convolutions lie in one or two modules called `conv`."""
    rules = [
        (r"^above_conv\.", "horizontal.conv.conv."),
        (r"^left_conv\.", "vertical.conv.conv."),
        (r"^condition_stack\.conv\.", "cond_resnet.blocks.0.conv."),
        (r"^condition_stack\.blocks\.(\d+)\.(conv\d)\.", _condition_block),
        (r"^output_blocks\.(\d+)\.(conv\d)\.", r"out.\1.\2.conv."),
        (r"^head\.", f"out.{model.config.num_output_res_blocks + 1}.conv."),
        (r"\.res_blocks\.(\d+)\.(conv\d)\.", r".resblocks.\1.\2.conv.conv."),
        (r"\.res_blocks\.(\d+)\.condition_conv\.", r".resblocks.\1.condition.conv."),
        (r"\.(key|query)_block\.(conv\d)\.", r".\1_resblock.\2.conv."),
        (r"\.output_block\.(conv\d|aux_conv)\.", r".out_resblock.\1.conv."),
        (r"\.output_conv\.", ".out.conv."),
        (r"\.attention\.", ".causal_attention."),
    ]
    return {name: rename(name, rules) for name in model.state_dict()}


def _condition_block(match: re.Match) -> str:
    return f"cond_resnet.blocks.{int(match.group(1)) + 1}.{match.group(2)}.conv."


def _view(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Give our convolutions of single positions in attention the dimensions of linear layers."""
    return weight.flatten(1) if "causal_attention" in name and weight.ndim == 4 else weight


__all__ = ["export_pixelsnail", "load_pixelsnail"]
