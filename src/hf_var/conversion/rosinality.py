# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of rosinality/vq-vae-2-pytorch, the public VQ-VAE-2, to our model and back: its two-level `VQVAE`, and the same
modules with one level, which are VQ-VAE (van den Oord et al. 2017).

That code trains by moving averages, without a codebook term: `codebook_loss_weight` is 0 unless it is overridden.
"""

import os
from collections.abc import Mapping

import torch

from ..autoencoders import HierarchicalVQVAEConfig, HierarchicalVQVAEModel
from ..autoencoders.codebook import AveragedCodebook
from ..weight_files import StateDict, read_state_dict
from .common import check_overrides, count, fill, require_keys


# Encoder, convolution and quantizer of each level, coarse to fine, by the strides that the code has.
MODULES = {
    (4,): [("enc", "quantize_conv", "quantize")],
    (4, 2): [("enc_t", "quantize_conv_t", "quantize_t"), ("enc_b", "quantize_conv_b", "quantize_b")],
}
# Buffers of a codebook.
AVERAGES = {"average_hits": "cluster_size", "average_sums": "embed_avg"}


def load_vqvae2(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> HierarchicalVQVAEModel:
    r"""
    Load a VQ-VAE-2, or a VQ-VAE of one level, of rosinality/vq-vae-2-pytorch.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pt` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict.
        config_overrides:
            Fields of [`HierarchicalVQVAEConfig`] which the file does not contain, in particular `image_size` (256).

    Returns:
        [`HierarchicalVQVAEModel`], in evaluation mode. It keeps the moving averages of the file.

    Raises:
        `ValueError`: If the file cannot be read or is not such a model (the message lists the keys that are missing or left
            over).

    Example:

    ```python
    >>> from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel
    >>> from hf_var.conversion import export_vqvae2, load_vqvae2

    >>> config = HierarchicalVQVAEConfig(image_size=16, base_channels=16, residual_channels=8, latent_channels=8)
    >>> state_dict = export_vqvae2(HierarchicalVQVAEModel(config))
    >>> load_vqvae2(state_dict, image_size=16).config.patch_nums
    [2, 4]
    ```
    """
    check_overrides(HierarchicalVQVAEConfig, config_overrides)
    state_dict = read_state_dict(checkpoint, section="vqvae")
    config = HierarchicalVQVAEConfig(**{**_infer_fields(state_dict), **config_overrides})
    names = _names(config)
    for ours, official in names.items():
        if not ours.startswith("codebooks."):
            continue
        if ours.endswith("running_hits"):
            state_dict[official] = torch.zeros(1, config.codebook_size)
        elif ours.endswith("average_hits"):
            state_dict.setdefault(official, torch.zeros(config.codebook_size))
        elif ours.endswith("average_sums"):
            state_dict.setdefault(official, torch.zeros(config.latent_channels, config.codebook_size))
        if official in state_dict:
            # Stored as (channels, codes). In the quantizer's dtype, also where a file is in half precision.
            state_dict[official] = _transposed(ours, state_dict[official].float())
    with torch.device("meta"):
        model = HierarchicalVQVAEModel(config)
    return fill(model, names, state_dict, "VQ-VAE-2" if len(config.strides) > 1 else "VQ-VAE")


def export_vqvae2(model: HierarchicalVQVAEModel) -> StateDict:
    """
    The state dict of rosinality/vq-vae-2-pytorch for a [`HierarchicalVQVAEModel`], equal to the one it was loaded from.
    Where a codebook has no moving averages, theirs are those of codes that were chosen once each.

    Raises:
        `ValueError`: If the strides are not `(4,)` or `(4, 2)`, the only ones of that code.
    """
    if tuple(model.config.strides) not in MODULES:
        raise ValueError(
            f"`strides` must be (4,) or (4, 2) for rosinality/vq-vae-2-pytorch, got {tuple(model.config.strides)}."
        )
    weights = model.state_dict()
    for level, codebook in enumerate(model.codebooks):
        if isinstance(codebook, AveragedCodebook) and not codebook.has_averages:
            weights[f"codebooks.{level}.average_hits"] = torch.ones_like(codebook.average_hits)
            weights[f"codebooks.{level}.average_sums"] = codebook.weight
    names = {ours: official for ours, official in _names(model.config).items() if not ours.endswith("running_hits")}
    return {official: _transposed(ours, weights[ours]).clone() for ours, official in names.items()}


def _infer_fields(state_dict: StateDict) -> dict:
    one_level = any(name.startswith("enc.") for name in state_dict)
    kind, strides = ("VQ-VAE", (4,)) if one_level else ("VQ-VAE-2", (4, 2))
    encoder, _, quantizer = MODULES[strides][-1]
    embed = f"{quantizer}.embed"
    # Five layers, of which three are convolutions, come before the residual blocks.
    num_res_blocks = count(state_dict, rf"{encoder}\.blocks\.(\d+)\.conv\.", first=5)
    convs = [f"{encoder}.blocks.0.weight", f"{encoder}.blocks.4.weight", f"dec.blocks.{num_res_blocks + 4}.weight"]
    if num_res_blocks > 0:
        convs.append(f"{encoder}.blocks.5.conv.1.weight")
    require_keys(state_dict, kind, {embed: 2, **dict.fromkeys(convs, 4)})
    in_channels, out_channels = state_dict[convs[0]].shape[1], state_dict[convs[2]].shape[1]
    fields = {
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "strides": strides,
        "base_channels": state_dict[convs[1]].shape[0],
        "num_res_blocks": num_res_blocks,
        "latent_channels": state_dict[embed].shape[0],
        "codebook_size": state_dict[embed].shape[1],
        "codebook_loss_weight": 0.0,
    }
    return fields | ({"residual_channels": state_dict[convs[3]].shape[0]} if num_res_blocks > 0 else {})


def _names(config: HierarchicalVQVAEConfig) -> dict[str, str]:
    """Official name of every weight, and of the buffer that only ours has."""
    modules, buffers, number = {}, {}, config.num_res_blocks
    strides = config.strides[::-1]
    for level, (encoder, conv, quantizer) in enumerate(MODULES[tuple(config.strides)]):
        modules |= _encoder_names(f"encoders.{level}", f"{encoder}.blocks", strides[level], number)
        modules[f"quant_convs.{level}"] = conv
        for ours, official in {"weight": "embed", "running_hits": "running_hits", **AVERAGES}.items():
            buffers[f"codebooks.{level}.{ours}"] = f"{quantizer}.{official}"
    if len(strides) == 2:
        modules |= _decoder_names("condition_decoders.0", "dec_t.blocks", strides[0], number)
        modules["upsamplers.0"] = "upsample_t"
    modules |= _decoder_names("decoder", "dec.blocks", strides[-1], number)
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": f"{official}.{kind}" for ours, official in modules.items() for kind in kinds} | buffers


# An official network is one list of layers, ReLUs among them.


def _encoder_names(ours: str, official: str, stride: int, num_blocks: int) -> dict[str, str]:
    last = 2 * (stride.bit_length() - 1)
    names = {f"{ours}.downsamplers.{layer // 2}": f"{official}.{layer}" for layer in range(0, last, 2)}
    return names | {f"{ours}.conv": f"{official}.{last}"} | _block_names(ours, official, last + 1, num_blocks)


def _decoder_names(ours: str, official: str, stride: int, num_blocks: int) -> dict[str, str]:
    *upsamplers, last = (num_blocks + 2 + 2 * index for index in range(stride.bit_length() - 1))
    names = {f"{ours}.upsamplers.{index}": f"{official}.{layer}" for index, layer in enumerate(upsamplers)}
    names |= {f"{ours}.conv_in": f"{official}.0", f"{ours}.conv_out": f"{official}.{last}"}
    return names | _block_names(ours, official, 1, num_blocks)


def _block_names(ours: str, official: str, first: int, number: int) -> dict[str, str]:
    return {
        f"{ours}.blocks.{index}.conv{own}": f"{official}.{first + index}.conv.{layer}"
        for index in range(number)
        for own, layer in ((1, 1), (2, 3))
    }


def _transposed(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    """A codebook's tensor `(codes, channels)` as `(channels, codes)`, or the other way round; any other as it is."""
    is_table = ours.startswith("codebooks.") and ours.endswith(("weight", "average_sums")) and tensor.ndim == 2
    return tensor.T.contiguous() if is_table else tensor


__all__ = ["export_vqvae2", "load_vqvae2"]
