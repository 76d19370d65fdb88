# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of the official RQ-VAE code (rq-vae-transformer) to our models and back: the RQ-Transformer (Lee et al. 2022).

A file does not contain the number of heads, which is width / 64 in all released models, the size of maps that are not square,
the activation (`hidden_act="quick_gelu"` is the code's `v2`) and whether depth layers read sums (`cumulative_depth_inputs`,
true in all released models). Each can be overridden with the field of the configuration.
"""

import math
import os
from collections.abc import Mapping

import torch

from ..priors import RQTransformer, RQTransformerConfig
from ..weight_files import StateDict, read_state_dict
from .common import check_overrides, count, fill, official_weights, rename, require_keys
from .official_var import imagenet_id2label
from .taming import LAYER_RULES, position_view


def load_rq_transformer(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> RQTransformer:
    r"""
    Load an RQ-Transformer of the official code.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pt` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict.
        config_overrides:
            Fields of [`RQTransformerConfig`] which the file does not contain: `patch_nums` of maps that are not square,
            `num_attention_heads` where heads are not 64 wide, `hidden_act`, `cumulative_depth_inputs`, `id2label` for other
            label names than ImageNet-1k's.

    Returns:
        [`RQTransformer`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read, is not such a model (the message lists the keys that are missing or left
            over), or leaves something open.
    """
    check_overrides(RQTransformerConfig, config_overrides)
    state_dict = read_state_dict(checkpoint, section="rq_transformer")
    config = RQTransformerConfig(**{**_infer_fields(state_dict, config_overrides), **config_overrides})
    with torch.device("meta"):
        model = RQTransformer(config)
    return fill(model, _rq_names(model), _split(state_dict, config), "RQ-Transformer", position_view)


def export_rq_transformer(model: RQTransformer) -> StateDict:
    """
    The official code's state dict of an [`RQTransformer`], equal to the one it was loaded from.

    Raises:
        `ValueError`: If the model is wired in a way that the official code cannot be.
    """
    config = model.config
    num_positions = config.condition_length + config.num_positions
    if (
        config.num_depth_layers == 0
        or config.shared_embedding
        or not config.head_bias
        or config.bidirectional_condition
    ):
        raise ValueError(
            "`model` must have depth layers, `shared_embedding=False`, `head_bias=True` and `bidirectional_condition=False` "
            f"for the official RQ-Transformer, got num_depth_layers={config.num_depth_layers}, "
            f"shared_embedding={config.shared_embedding}, head_bias={config.head_bias} and "
            f"bidirectional_condition={config.bidirectional_condition}."
        )
    if (config.max_position_embeddings or 0) > num_positions:
        raise ValueError(
            f"`max_position_embeddings` must be at most {num_positions} for the official RQ-Transformer, got "
            f"{config.max_position_embeddings}."
        )
    exported = official_weights(model, _rq_names(model), position_view)
    positions = exported.pop("pos_emb")
    # The last position has an embedding there, although nothing reads its codes.
    positions = torch.nn.functional.pad(positions, (0, 0, 0, num_positions - positions.shape[1]))
    exported["pos_emb_cond"] = positions[:, : config.condition_length].clone()
    exported["pos_emb_hw"] = positions[:, config.condition_length :].clone()
    if config.separate_depth_heads:
        for name in ("weight", "bias"):
            parts = torch.stack([exported.pop(f"classifier.linear.{depth}.{name}") for depth in range(config.depth)])
            exported[f"classifier.linear.{name}"] = parts.mT.contiguous() if name == "weight" else parts
    if config.separate_depth_embeddings:
        exported["tok_emb.offsets"] = torch.arange(config.depth) * config.codebook_size
    return exported


def _infer_fields(state_dict: StateDict, overrides: dict) -> dict:
    positions = dict.fromkeys(["pos_emb_cond", "pos_emb_hw", "pos_emb_d"], 3)
    reads_vectors = any(name.startswith("input_mlp.") for name in state_dict)
    matrices = ["cond_emb.weight", "body_transformer.blocks.0.mlp.0.weight", *["input_mlp.weight"] * reads_vectors]
    head = state_dict.get("classifier.linear.weight")
    has_separate_heads = head is not None and head.ndim == 3
    require_keys(
        state_dict,
        "RQ-Transformer",
        {**positions, **dict.fromkeys(matrices, 2), "classifier.linear.weight": 3 if has_separate_heads else 2},
    )
    num_conditions, hidden_size = state_dict["cond_emb.weight"].shape
    condition_length, num_positions, depth = (state_dict[name].shape[1] for name in positions)
    fields = {
        "codebook_size": state_dict["classifier.linear.weight"].shape[2 if has_separate_heads else 0],
        "condition_length": condition_length,
        "condition_loss_weight": 0.1 if "cond_classifier.linear.weight" in state_dict else 0.0,
        "max_position_embeddings": condition_length + num_positions,
        "code_inputs": "vectors" if reads_vectors else "tokens",
        "separate_depth_embeddings": "tok_emb.offsets" in state_dict,
        "separate_depth_heads": has_separate_heads,
        "hidden_size": hidden_size,
        "num_hidden_layers": count(state_dict, r"body_transformer\.blocks\.(\d+)\."),
        "num_depth_layers": count(state_dict, r"head_transformer\.blocks\.(\d+)\."),
        "num_attention_heads": max(hidden_size // 64, 1),
        "mlp_ratio": state_dict["body_transformer.blocks.0.mlp.0.weight"].shape[0] / hidden_size,
    }
    if reads_vectors:
        fields["latent_channels"] = state_dict["input_mlp.weight"].shape[1]
    if "patch_nums" not in overrides:
        side = math.isqrt(num_positions)
        if side**2 != num_positions:
            raise ValueError(
                f"`patch_nums` cannot be inferred from this RQ-Transformer of {num_positions} positions, which are no "
                f"square: pass the size of its maps, {depth} times, for instance patch_nums=[[3, 4], [3, 4]]."
            )
        fields["patch_nums"] = [side] * depth
    if condition_length > 1 or "condition_vocab_size" in overrides:
        fields |= {"condition_vocab_size": num_conditions, "num_labels": 0}
    elif not {"num_labels", "id2label"} & overrides.keys():
        # The one condition of unconditional models is our unconditional one.
        num_labels = {"num_labels": 0 if num_conditions == 1 else num_conditions}
        fields |= {"id2label": imagenet_id2label()} if num_conditions == 1000 else num_labels
    return fields


def _split(state_dict: StateDict, config: RQTransformerConfig) -> StateDict:
    """The state dict with one table of positions and a projection for each depth, as our model has them."""
    parts = dict(state_dict)
    parts["pos_emb"] = torch.cat([parts.pop("pos_emb_cond"), parts.pop("pos_emb_hw")], dim=1)
    parts.pop("tok_emb.offsets", None)
    if config.separate_depth_heads:
        weights, biases = (parts.pop(f"classifier.linear.{name}") for name in ("weight", "bias"))
        for depth, (weight, bias) in enumerate(zip(weights.mT.contiguous(), biases, strict=True)):
            parts |= {f"classifier.linear.{depth}.weight": weight, f"classifier.linear.{depth}.bias": bias}
    return parts


def _rq_names(model: RQTransformer) -> dict[str, str]:
    """Name of every weight in what [`_split`] makes of the official state dict."""
    projection = r"classifier.linear.\1." if model.config.separate_depth_heads else "classifier.linear."
    rules = [
        (r"^embeddings\.condition_embedding\.", "cond_emb."),
        (r"^embeddings\.code_embedding\.", "tok_emb."),
        (r"^embeddings\.position_embedding\.weight$", "pos_emb"),
        (r"^embeddings\.depth_position_embedding\.weight$", "pos_emb_d"),
        (r"^embeddings\.input_proj\.", "input_mlp."),
        (r"^embeddings\.depth_proj\.", "head_mlp."),
        (r"^head\.norm\.", "classifier.layer_norm."),
        (r"^head\.projections\.(\d+)\.", projection),
        (r"^condition_head\.norm\.", "cond_classifier.layer_norm."),
        (r"^condition_head\.projections\.0\.", "cond_classifier.linear."),
        (r"^layers\.", "body_transformer.blocks."),
        (r"^depth_layers\.", "head_transformer.blocks."),
        *LAYER_RULES,
    ]
    return {name: rename(name, rules) for name in model.state_dict()}


__all__ = ["export_rq_transformer", "load_rq_transformer"]
