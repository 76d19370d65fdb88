# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of taming-transformers to our models and back: VQGAN's tokenizer, `VQModel` (Esser et al. 2021). VAR's and
RQ-VAE's code have their encoder and decoder from here, with the names of its weights.

A file does not contain the image size. The released models are for 256x256 pixels, so `patch_nums` is 256 divided by
the downsampling factor unless it is given; no weight depends on it. Nor does a file contain the loss: that code trains
with `legacy=True`, in which its factor beta = 0.25 weighs the codebook term and not the commitment term.
"""

import os
from collections.abc import Mapping

import torch

from ..autoencoders import VQVAEConfig, VQVAEModel
from ..weight_files import StateDict, listing, read_state_dict
from .common import DTYPES, Names, check_overrides, count, fill, official_weights, rename, require_keys


# Tokenizers in the file of a `Net2NetTransformer`: that of the images and that of the conditions.
SECTIONS = ("first_stage_model", "cond_stage_model")
# What stands beside the tokenizer: the discriminator and LPIPS, a projection for pictures, and the codes that a
# remapped transformer keeps.
OTHER_PARTS = ("loss.", "colorize", "quantize.used")
# Side of the images of the released models.
IMAGE_SIDE = 256
# Fewer channels are those of images: gray, colour, transparency.
MOST_IMAGE_CHANNELS = 4
CODEBOOK = "quantize.embedding.weight"


def load_taming_vqgan(
    checkpoint: str | os.PathLike | Mapping, section: str | None = None, **config_overrides
) -> VQVAEModel:
    r"""
    Load a VQGAN of taming-transformers, such as `vqgan_imagenet_f16_16384`'s `last.ckpt`.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A Lightning file, read with `weights_only=True`, a `.safetensors` file or a state dict. Losses,
            discriminator and remapped codes are left out.
        section (`str`, *optional*):
            Which tokenizer of a `Net2NetTransformer`'s file: `"first_stage_model"`, of the images, or
            `"cond_stage_model"`, of the conditions.
        config_overrides:
            Fields of [`VQVAEConfig`] which the file does not contain: `patch_nums`, for other images than those of
            256x256 pixels; `sample_type`, which is `"class_map"` for more than 4 channels; `commitment_loss_weight`
            and `codebook_loss_weight`, which are 1.0 and 0.25 (`legacy=True` of that code) but 0.25 and 1.0 with
            `legacy=False`.

    Returns:
        [`VQVAEModel`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read, is not such a model (the message lists the keys that are missing or
            left over), or has a Gumbel quantizer.

    Example:

    ```python
    >>> from hf_var import VQVAEConfig, VQVAEModel
    >>> from hf_var.conversion import export_taming_vqgan, load_taming_vqgan

    >>> sizes = {"base_channels": 32, "channel_multipliers": (1, 2, 2), "latent_channels": 8}
    >>> config = VQVAEConfig(patch_nums=[8], quant_conv_kernel_size=1, refinement_ratio=0.0, **sizes)
    >>> load_taming_vqgan(export_taming_vqgan(VQVAEModel(config)), patch_nums=[[8, 12]]).config.image_size
    (32, 48)
    ```
    """
    check_overrides(VQVAEConfig, config_overrides)
    state_dict = _vqgan_weights(read_state_dict(checkpoint, section="vqgan"), section)
    config = VQVAEConfig(**{**_infer_fields(state_dict), **config_overrides})
    if state_dict[CODEBOOK].dtype in DTYPES:
        # The quantizer's dtype, also where a file is in half precision.
        state_dict[CODEBOOK] = state_dict[CODEBOOK].float()
    with torch.device("meta"):
        model = VQVAEModel(config)
    return fill(model, _names(model), state_dict, "VQGAN")


def tokenizer_sections(checkpoint: str | os.PathLike | Mapping) -> list[str]:
    """Which tokenizers there are in the file of a `Net2NetTransformer`, for `section` of [`load_taming_vqgan`]."""
    names = read_state_dict(checkpoint, section="transformer")
    return [section for section in SECTIONS if f"{section}.{CODEBOOK}" in names]


def export_taming_vqgan(model: VQVAEModel) -> StateDict:
    """
    taming-transformers' state dict of a [`VQVAEModel`], equal to the one it was loaded from.

    Raises:
        `ValueError`: If the model is not a `VQModel` of that code: one map, a codebook, 1x1 convolutions around the
            quantizer and attention in the middle.
    """
    check_network(model.config, "taming-transformers")
    if len(model.config.patch_nums) > 1:
        raise ValueError(f"`patch_nums` must be one map for taming-transformers, got {model.config.patch_nums}.")
    return official_weights(model, _names(model))


# --------------------------------------------------------------------------------------------------------------------
# What descendants share


def infer_network_fields(state_dict: StateDict, kind: str, codebook: str) -> dict:
    """Fields of [`VQVAEConfig`] about encoder, decoder and the convolutions between them, whose names are taming's."""
    num_levels = max(count(state_dict, r"encoder\.down\.(\d+)\.block\."), 1)
    level_convs = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(num_levels)]
    ends = ["encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight"]
    require_keys(state_dict, kind, {codebook: 2, **dict.fromkeys([*ends, *level_convs], 4)})
    base_channels, in_channels = state_dict["encoder.conv_in.weight"].shape[:2]
    out_channels = state_dict["decoder.conv_out.weight"].shape[0]
    latent_channels, encoder_channels = state_dict["quant_conv.weight"].shape[:2]

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state_dict)

    with_attention = [level for level in range(num_levels) if has(f"encoder.down.{level}.attn.")]
    is_usual = with_attention in ([], [num_levels - 1])
    return {
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "base_channels": base_channels,
        "channel_multipliers": [state_dict[name].shape[0] // base_channels for name in level_convs],
        "num_res_blocks": count(state_dict, r"encoder\.down\.0\.block\.(\d+)\."),
        "last_level_attention": num_levels - 1 in with_attention,
        "attention_levels": None if is_usual else with_attention,
        "mid_block_attention": has("encoder.mid.attn_1."),
        "encoder_out_channels": None if encoder_channels == latent_channels else encoder_channels,
        "quant_conv_kernel_size": state_dict["quant_conv.weight"].shape[-1],
    }


def network_names(model: VQVAEModel) -> dict[str, str]:
    """Name of every weight outside the quantizer, where attention is fused as ours."""
    last_level = len(model.config.channel_multipliers) - 1
    rules = [
        (r"\.mid_block\.resnet(\d)", r".mid.block_\1"),
        (r"\.mid_block\.attention", ".mid.attn_1"),
        (r"^encoder\.levels\.(\d+)\.resample", r"encoder.down.\1.downsample"),
        (r"^encoder\.levels\.(\d+)", r"encoder.down.\1"),
        (r"^decoder\.levels\.(\d+)\.resample", r"decoder.levels.\1.upsample"),
        # That decoder counts its levels from the finest one.
        (r"^decoder\.levels\.(\d+)", lambda match: f"decoder.up.{last_level - int(match.group(1))}"),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.shortcut\.", ".nin_shortcut."),
    ]
    return {name: rename(name, rules) for name in model.state_dict() if not name.startswith("quantizer.")}


def names_of_unfused_attention(model: VQVAEModel) -> dict[str, str | tuple[str, ...]]:
    """The same for code with separate `q`, `k` and `v`, one below the other in our `qkv`."""
    return {
        ours: tuple(name.replace(".qkv.", f".{part}.") for part in "qkv") if ".qkv." in name else name
        for ours, name in network_names(model).items()
    }


def default_patch_nums(fields: dict, depth: int) -> list[int]:
    """`depth` maps of images of 256x256 pixels."""
    return [max(IMAGE_SIDE // 2 ** (len(fields["channel_multipliers"]) - 1), 1)] * depth


def check_network(config: VQVAEConfig, code: str) -> None:
    """Raise a `ValueError` unless a tokenizer has what all of taming's have."""
    needed = {
        "quantizer": "vq",
        "normalize_codebook": False,
        "refinement_ratio": 0.0,
        "quant_conv_kernel_size": 1,
        "mid_block_attention": True,
        "norm_num_groups": 32,
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` must be {value!r} for {code}, got {getattr(config, name)!r}.")


# --------------------------------------------------------------------------------------------------------------------
# VQGAN


def _vqgan_weights(state_dict: StateDict, section: str | None) -> StateDict:
    """The weights of one tokenizer, by the names it gives them."""
    if section is not None and (not isinstance(section, str) or section not in SECTIONS):
        raise ValueError(f"`section` must be None, {' or '.join(SECTIONS)}, got {section!r}.")
    present = [name for name in SECTIONS if any(key.startswith(f"{name}.") for key in state_dict)]
    if section is None and present:
        raise ValueError(f"`section` must be one of {present} for the file of a Net2NetTransformer, got None.")
    if section is not None:
        if section not in present:
            raise ValueError(
                f"`section` = {section!r} is not in `checkpoint`, which holds {listing(list(state_dict))}."
            )
        prefix = f"{section}."
        state_dict = {
            name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)
        }
    state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith(OTHER_PARTS)}
    gumbel = [name for name in state_dict if name.startswith(("quantize.proj.", "quantize.embed."))]
    if gumbel:
        raise ValueError(
            f"`checkpoint` must be a VQModel, whose codes are the nearest code vectors, got a GumbelVQ ({gumbel}), which "
            "draws them by a convolution and has no counterpart here."
        )
    return state_dict


def _infer_fields(state_dict: StateDict) -> dict:
    fields = infer_network_fields(state_dict, "VQGAN", CODEBOOK)
    codebook_size, latent_channels = state_dict[CODEBOOK].shape
    is_class_map = fields["out_channels"] is None and fields["in_channels"] > MOST_IMAGE_CHANNELS
    return {
        **fields,
        "sample_type": "class_map" if is_class_map else "image",
        "codebook_size": codebook_size,
        "latent_channels": latent_channels,
        "patch_nums": default_patch_nums(fields, depth=1),
        "refinement_ratio": 0.0,
        "commitment_loss_weight": 1.0,
        "codebook_loss_weight": 0.25,
    }


def _names(model: VQVAEModel) -> Names:
    """Official name of every weight."""
    return {"quantizer.codebook.weight": CODEBOOK} | names_of_unfused_attention(model)


__all__ = ["export_taming_vqgan", "load_taming_vqgan"]
