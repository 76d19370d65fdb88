# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of taming-transformers to our models and back: VQGAN's GPT (Esser et al. 2021), alone or in the Lightning file of
a `Net2NetTransformer`.

A file does not contain the number of heads, which is known of the released sizes only, how the positions divide into
condition and image, which follows for square maps, and whether the condition is bidirectional (`n_unmasked`). Each can be
overridden with the field of the configuration.
"""

import math
import os
import re
from collections.abc import Mapping

import torch

from ..priors import RQTransformer, RQTransformerConfig
from ..scales import normalize_patch_nums, scale_sizes
from ..weight_files import StateDict, read_state_dict
from .common import check_overrides, count, fill, official_weights, rename, require_keys
from .official_var import imagenet_id2label


# Heads of the released models, by number of layers and width.
RELEASED_HEADS = {(24, 1024): 16, (24, 1664): 16, (36, 1536): 16, (40, 1408): 16, (48, 1536): 24}
# The class-conditional model of ImageNet, whose labels have names.
IMAGENET_SIZES = (48, 1536)
# What stands beside the transformer in its file: tokenizers, losses and the order of the codes.
OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "loss.", "permuter.")
# Names of the weights of a layer, which the RQ-Transformer's code has from here.
LAYER_RULES = [
    (r"\.attention_norm\.", ".ln1."),
    (r"\.mlp_norm\.", ".ln2."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
]


def load_taming_gpt(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> RQTransformer:
    r"""
    Load VQGAN's GPT, such as the transformer in `cin_transformer`'s `last.ckpt`.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A Lightning file of a `Net2NetTransformer`, read with `weights_only=True`, of which only the transformer is
            used, a `.safetensors` file or a state dict.
        config_overrides:
            Fields of [`RQTransformerConfig`] which the file does not contain: `num_attention_heads` of sizes that are not
            released, `patch_nums` of maps that are not square, `num_labels` or `id2label` of classes,
            `bidirectional_condition`.

    Returns:
        [`RQTransformer`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read, is not such a model (the message lists the keys that are missing or left
            over), or leaves something open.
    """
    check_overrides(RQTransformerConfig, config_overrides)
    state_dict = _transformer_weights(read_state_dict(checkpoint, section="transformer"))
    config = RQTransformerConfig(**{**_infer_fields(state_dict, config_overrides), **config_overrides})
    with torch.device("meta"):
        model = RQTransformer(config)
    return fill(model, _gpt_names(model), state_dict, "GPT", position_view)


def export_taming_gpt(model: RQTransformer) -> StateDict:
    """
    taming-transformers' state dict of an [`RQTransformer`], equal to the one it was loaded from, without the masks that
    its code derives (load it with `strict=False`).

    Raises:
        `ValueError`: If the model is wired in another way than this GPT.
    """
    config = model.config
    if config.depth > 1 or config.num_depth_layers or not config.shared_embedding or config.head_bias:
        raise ValueError(
            "`model` must have one depth, no depth layers, `shared_embedding=True` and `head_bias=False` for "
            f"taming-transformers, got depth {config.depth}, num_depth_layers={config.num_depth_layers}, "
            f"shared_embedding={config.shared_embedding} and head_bias={config.head_bias}."
        )
    exported = official_weights(model, _gpt_names(model), position_view)
    # As many positions as condition and image have, although nothing reads the last code: the file tells both lengths.
    missing = config.condition_length + config.num_positions - exported["pos_emb"].shape[1]
    if config.condition_length > 1 and missing > 0:
        exported["pos_emb"] = torch.nn.functional.pad(exported["pos_emb"], (0, 0, 0, missing))
    return exported


def position_view(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Give position embeddings the batch dimension that minGPT and its descendants have."""
    return tensor.unsqueeze(0) if name.startswith("pos_emb") else tensor


def _transformer_weights(state_dict: StateDict) -> StateDict:
    """The weights of the transformer alone, by the names it gives them, without masks."""
    if any(name.startswith("transformer.") for name in state_dict):
        state_dict = {
            name.removeprefix("transformer."): tensor
            for name, tensor in state_dict.items()
            if not name.startswith(OTHER_PARTS)
        }
    return {name: tensor for name, tensor in state_dict.items() if not re.fullmatch(r"blocks\.\d+\.attn\.mask", name)}


def _infer_fields(state_dict: StateDict, overrides: dict) -> dict:
    require_keys(
        state_dict,
        "GPT",
        {"pos_emb": 3, **dict.fromkeys(["tok_emb.weight", "head.weight", "blocks.0.mlp.0.weight"], 2)},
    )
    codebook_size, hidden_size = state_dict["tok_emb.weight"].shape
    sizes = count(state_dict, r"blocks\.(\d+)\."), hidden_size
    num_positions = state_dict["pos_emb"].shape[1]
    fields = {
        "codebook_size": codebook_size,
        "patch_nums": overrides.get("patch_nums") or [_infer_side(num_positions)],
        "max_position_embeddings": num_positions,
        "code_inputs": "tokens",
        "shared_embedding": True,
        "head_bias": False,
        "hidden_size": hidden_size,
        "num_hidden_layers": sizes[0],
        "num_depth_layers": 0,
        "mlp_ratio": state_dict["blocks.0.mlp.0.weight"].shape[0] / hidden_size,
        "dropout": 0.0,
    }
    # A class alone before the image takes the position of the last code, which nothing reads.
    length = math.prod(scale_sizes(normalize_patch_nums(fields["patch_nums"]))[0])
    has_classes = overrides.get("num_labels") or overrides.get("id2label")
    fields["condition_length"] = 1 if has_classes else max(num_positions - length, 1)
    if not {"num_labels", "id2label"} & overrides.keys():
        is_imagenet = sizes == IMAGENET_SIZES and fields["condition_length"] == 1
        fields |= {"id2label": imagenet_id2label()} if is_imagenet else {"num_labels": 0}
    if "num_attention_heads" not in overrides:
        if sizes not in RELEASED_HEADS:
            raise ValueError(
                f"`num_attention_heads` cannot be inferred from a GPT of {sizes[0]} layers of width {hidden_size}, which is "
                f"none of the released sizes: pass it, for instance num_attention_heads={hidden_size // 64 or 1}."
            )
        fields["num_attention_heads"] = RELEASED_HEADS[sizes]
    return fields


def _infer_side(num_positions: int) -> int:
    """Side of the square map of a model with as many positions: the map alone, or after another one as its condition."""
    for length in (num_positions, num_positions // 2):
        if math.isqrt(length) ** 2 == length and num_positions % length == 0:
            return math.isqrt(length)
    raise ValueError(
        f"`patch_nums` cannot be inferred from a GPT of {num_positions} positions: pass the size of its map, for instance "
        "patch_nums=[16]."
    )


def _gpt_names(model: RQTransformer) -> dict[str, str]:
    """Official name of every weight."""
    rules = [
        (r"^embeddings\.code_embedding\.", "tok_emb."),
        (r"^embeddings\.position_embedding\.weight$", "pos_emb"),
        (r"^head\.norm\.", "ln_f."),
        (r"^head\.projections\.0\.", "head."),
        (r"^layers\.", "blocks."),
        *LAYER_RULES,
    ]
    return {name: rename(name, rules) for name in model.state_dict()}


__all__ = ["export_taming_gpt", "load_taming_gpt"]
