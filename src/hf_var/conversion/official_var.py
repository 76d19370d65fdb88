# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of the official VAR code to our models and back.

What an official state dict does not say in its shapes and names is taken from the released models, and can be
overridden with any field of the configuration: the mixing ratio of phi (0.5), the commitment weight (0.25), Euclidean
search and 32 groups per normalisation.
"""

import json
import os
import re
from collections.abc import Mapping
from importlib import resources

import torch
from transformers.utils import logging

from ..autoencoders import VQVAEConfig, VQVAEModel
from ..priors import VARConfig, VARTransformer
from ..schedules import RELEASED_PATCH_NUMS
from ..weight_files import StateDict, read_state_dict
from .common import (
    DTYPES,
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
from .taming_vqgan import infer_network_fields, network_names


logger = logging.get_logger(__name__)

# Buffers which follow from the configuration; files come with and without them.
DERIVED_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")


def load_official_vqvae(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> VQVAEModel:
    r"""
    Load a multi-scale VQ-VAE of the official code, such as `vae_ch160v4096z32.pth`.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pth` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict.
        config_overrides:
            Fields of [`VQVAEConfig`] which the file does not contain, in particular `patch_nums`: a file of ten scales is
            taken for the released 256-pixel model, for any other number they must be given.

    Returns:
        [`VQVAEModel`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read, is not such a model (the message lists the keys that are missing or left
            over), or leaves something open.
    """
    check_overrides(VQVAEConfig, config_overrides)
    state_dict = read_state_dict(checkpoint, section="vae_local")
    fields = _infer_vqvae_fields(state_dict, config_overrides)
    config = VQVAEConfig(**{**fields, **config_overrides})
    for name in [name for name in state_dict if name.startswith("quantize.")]:
        if state_dict[name].dtype in DTYPES:
            state_dict[name] = state_dict[
                name
            ].float()  # the quantizer's dtype, also where a file is in half precision
    hits = state_dict.get("quantize.ema_vocab_hit_SV")
    if hits is None or hits.ndim != 2 or len(hits) != len(config.patch_nums):
        # Usage statistics of another schedule say nothing about this one; the official code drops them likewise.
        state_dict["quantize.ema_vocab_hit_SV"] = torch.zeros(len(config.patch_nums), config.codebook_size)
    with torch.device("meta"):
        model = VQVAEModel(config)
    return fill(model, _vqvae_names(model), state_dict, "VQVAE")


def load_official_var(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> VARTransformer:
    r"""
    Load a VAR transformer of the official code, such as `var_d16.pth`.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pth` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict.
        config_overrides:
            Fields of [`VARConfig`] which the file does not contain: `patch_nums` where its maps are not square or its
            level buffer is missing, `num_attention_heads` where there is no QK-norm and the width is not 64 per layer,
            `id2label` for other label names than ImageNet-1k's.

    Returns:
        [`VARTransformer`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read, is not such a model (the message lists the keys that are missing or left
            over), or leaves something open.
    """
    check_overrides(VARConfig, config_overrides)
    state_dict = read_state_dict(checkpoint, section="var_wo_ddp")
    config = VARConfig(**{**_infer_var_fields(state_dict, config_overrides), **config_overrides})
    with torch.device("meta"):
        model = VARTransformer(config)
    weights = {name: tensor for name, tensor in state_dict.items() if not DERIVED_BUFFERS.fullmatch(name)}
    return fill(model, _var_names(model), weights, "VAR transformer", view=_official_view)


def export_official_vqvae(model: VQVAEModel) -> StateDict:
    """
    The official code's state dict of a [`VQVAEModel`], equal to the one it was loaded from.

    Raises:
        `ValueError`: If the quantizer has no codebook of weights, which the official code needs, or if the levels have
            attention or widths that it does not know.
    """
    config = model.config
    if not config.has_trainable_codes:
        raise ValueError(f"`quantizer` must be 'vq' for the official code, got {config.quantizer!r}.")
    if config.attention_levels is not None or config.num_encoder_channels != config.latent_channels:
        raise ValueError(
            "`attention_levels` and `encoder_out_channels` must be None for the official code, got "
            f"{config.attention_levels} and {config.encoder_out_channels}."
        )
    return official_weights(model, _vqvae_names(model))


def export_official_var(model: VARTransformer) -> StateDict:
    """
    The official code's state dict of a [`VARTransformer`], equal to the one it was loaded from.

    Raises:
        `ValueError`: If the model predicts other blocks than scales or projects its class embeddings, which the official
            code cannot.
    """
    config = model.config
    if config.condition_channels is not None:
        raise ValueError(
            f"`condition_channels` must be None for the official code, which has no projection, got "
            f"{config.condition_channels}."
        )
    if config.block_lengths != config.scale_lengths:
        raise ValueError(
            f"`block_sizes` must be one block per scale for the official code, got {config.block_lengths} for scales "
            f"of {config.scale_lengths} tokens."
        )
    exported = official_weights(model, _var_names(model), _official_view)
    exported |= schedule_buffers(config, exported["pos_1LC"])
    for layer in range(config.num_hidden_layers):
        exported[f"blocks.{layer}.attn.zero_k_bias"] = torch.zeros(config.hidden_size, dtype=exported["pos_1LC"].dtype)
    return exported


def imagenet_id2label() -> dict[int, str]:
    """Names of the ImageNet-1k classes, as the Hub's models name them."""
    names = json.loads(resources.files("hf_var").joinpath("imagenet_labels.json").read_text(encoding="utf-8"))
    return dict(enumerate(names))


def _infer_vqvae_fields(state_dict: StateDict, overrides: dict) -> dict:
    fields = infer_network_fields(state_dict, "VQVAE", "quantize.embedding.weight")

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state_dict)

    hits = state_dict.get("quantize.ema_vocab_hit_SV")
    num_scales = len(hits) if hits is not None and hits.ndim == 2 else None
    fields |= dict(
        zip(("codebook_size", "latent_channels"), state_dict["quantize.embedding.weight"].shape, strict=True)
    )
    if has("quantize.quant_resi.qresi."):
        fields["num_refinement_convs"] = 1
    elif has("quantize.quant_resi.qresi_ls."):
        fields["num_refinement_convs"] = count(state_dict, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    elif has("quantize.quant_resi."):
        fields["num_refinement_convs"] = 0
    else:
        fields["refinement_ratio"] = 0.0
    if "patch_nums" not in overrides:
        released = [numbers for numbers in RELEASED_PATCH_NUMS.values() if len(numbers) == num_scales]
        if not released:
            scales = "an unknown number of" if num_scales is None else num_scales
            raise ValueError(
                f"`patch_nums` cannot be inferred from this VQVAE of {scales} scales: pass the size of every token map, "
                "for instance patch_nums=(1, 2, 3, 4)."
            )
        fields["patch_nums"] = released[0]
        if len(released) > 1:
            logger.warning(
                "The file tells the number of scales only: taking the schedule of the 256-pixel models, "
                f"patch_nums={released[0]}. Pass `patch_nums` for another one of {num_scales} scales."
            )
    return fields


def _infer_var_fields(state_dict: StateDict, overrides: dict) -> dict:
    matrices = ["word_embed.weight", "class_emb.weight", "lvl_embed.weight", "blocks.0.ffn.fc1.weight", "head.weight"]
    required = dict.fromkeys([*matrices, "blocks.0.attn.mat_qkv.weight"], 2)
    require_keys(state_dict, "VAR transformer", {"pos_1LC": 3, **required})
    hidden_size, latent_channels = state_dict["word_embed.weight"].shape
    depth = count(state_dict, r"blocks\.(\d+)\.")
    scale = next((tensor for name, tensor in state_dict.items() if name.endswith(".scale_mul_1H11")), None)
    num_labels = state_dict["class_emb.weight"].shape[0] - 1
    fields = {
        "codebook_size": state_dict["head.weight"].shape[0],
        "latent_channels": latent_channels,
        "hidden_size": hidden_size,
        "num_hidden_layers": depth,
        "mlp_ratio": state_dict["blocks.0.ffn.fc1.weight"].shape[0] / hidden_size,
        "qk_norm": scale is not None,
        "shared_adaln": any(name.startswith("shared_ada_lin.") for name in state_dict),
    }
    if "id2label" not in overrides and "num_labels" not in overrides:
        if num_labels == 1000:
            fields["id2label"] = imagenet_id2label()
        else:
            fields["num_labels"] = num_labels
    if "patch_nums" not in overrides:
        fields["patch_nums"] = _infer_patch_nums(state_dict)
    if "num_attention_heads" not in overrides:
        if scale is not None:
            fields["num_attention_heads"] = scale.numel()
        elif hidden_size == 64 * depth:
            fields["num_attention_heads"] = depth
        else:
            raise ValueError(
                "`num_attention_heads` cannot be inferred from a VAR transformer without QK-norm whose width, "
                f"{hidden_size}, is not 64 per layer: pass it, for instance num_attention_heads={hidden_size // 64 or 1}."
            )
    return fields


def _infer_patch_nums(state_dict: StateDict) -> list[int]:
    length = state_dict["pos_1LC"].shape[1]
    for numbers in RELEASED_PATCH_NUMS.values():
        if sum(number**2 for number in numbers) == length and len(numbers) == len(state_dict["lvl_embed.weight"]):
            return list(numbers)
    maps = square_maps(state_dict.get("lvl_1L", torch.empty(0)), length)
    if maps is not None:
        return maps
    raise ValueError(
        f"`patch_nums` cannot be inferred from this VAR transformer of {length} tokens: pass the size of every token "
        "map, for instance patch_nums=(1, 2, 3, 4)."
    )


def _vqvae_names(model: VQVAEModel) -> dict[str, str]:
    """Official name of every weight."""
    # No convolution per se, one for all, one list for several: the official module's layout depends on the sharing.
    phi = {0: r"quantize.quant_resi.\1", 1: "quantize.quant_resi.qresi"}.get(
        model.config.num_refinement_convs, r"quantize.quant_resi.qresi_ls.\1"
    )
    rules = [
        (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
        (r"^quantizer\.codebook\.running_hits$", "quantize.ema_vocab_hit_SV"),
        (r"^quantizer\.refinement_convs\.(\d+)", phi),
    ]
    quantizer = [name for name in model.state_dict() if re.match(r"quantizer\.(?!codebook\.average_)", name)]
    return {name: rename(name, rules) for name in quantizer} | network_names(model)


def _var_names(model: VARTransformer) -> Names:
    """Official name of every weight, and which third of it where the official code fuses three of ours."""
    rules = [
        (r"^embeddings\.class_embedding", "class_emb"),
        (r"^embeddings\.input_proj", "word_embed"),
        (r"^embeddings\.start_position$", "pos_start"),
        (r"^embeddings\.position_embedding$", "pos_1LC"),
        (r"^embeddings\.level_embedding$", "lvl_embed.weight"),
        (r"^shared_adaln\.linear", "shared_ada_lin.1"),
        (r"^head_norm\.adaln\.linear", "head_nm.ada_lin.1"),
        (r"^layers\.(\d+)\.attention\.o_proj", r"blocks.\1.attn.proj"),
        (r"^layers\.(\d+)\.attention\.(q|v)_proj\.bias$", r"blocks.\1.attn.\2_bias"),
        (r"^layers\.(\d+)\.attention\.(q|k|v)_proj\.weight$", r"blocks.\1.attn.mat_qkv.weight"),
        (r"^layers\.(\d+)\.attention\.log_query_scale$", r"blocks.\1.attn.scale_mul_1H11"),
        (r"^layers\.(\d+)\.mlp", r"blocks.\1.ffn"),
        (r"^layers\.(\d+)\.adaln\.linear", r"blocks.\1.ada_lin.1"),
        (r"^layers\.(\d+)\.adaln\.offset$", r"blocks.\1.ada_gss"),
    ]
    fused = {"q_proj.weight": 0, "k_proj.weight": 1, "v_proj.weight": 2}
    names: dict[str, str | Part | tuple[str, ...]] = {}
    for name in model.state_dict():
        third = fused.get(".".join(name.split(".")[-2:]))
        names[name] = rename(name, rules) if third is None else Part(rename(name, rules), third, 3)
    return names


def _official_view(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Give a weight the singleton dimensions of the official code."""
    if name in ("pos_start", "pos_1LC"):
        return tensor.unsqueeze(0)
    if name.endswith("scale_mul_1H11"):
        return tensor.view(1, -1, 1, 1)
    return tensor.view(1, 1, *tensor.shape) if name.endswith("ada_gss") else tensor


__all__ = [
    "export_official_var",
    "export_official_vqvae",
    "imagenet_id2label",
    "load_official_var",
    "load_official_vqvae",
]
