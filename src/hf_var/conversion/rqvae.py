# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of the official RQ-VAE code (rq-vae-transformer) to our models and back: the RQ-VAE itself (Lee et al.
2022), whose encoder and decoder are those of taming-transformers.

That code trains its codebook by moving averages, without a codebook term: `codebook_loss_weight` is 0 and
`commitment_loss_weight` 0.25 unless they are overridden. The averages are kept. A file does not contain the image
size, which is 256x256 pixels for all released models and here unless `patch_nums` is given.
"""

import os
from collections.abc import Mapping

import torch

from ..autoencoders import VQVAEConfig, VQVAEModel
from ..autoencoders.codebook import AveragedCodebook
from ..weight_files import StateDict, listing, read_state_dict
from .common import DTYPES, Names, check_overrides, count, fill, official_weights
from .taming_vqgan import check_network, default_patch_nums, infer_network_fields, names_of_unfused_attention


# One codebook serves all depths, and its weights are repeated for each.
CODEBOOK = "quantizer.codebooks.0."
AVERAGES = {"average_hits": f"{CODEBOOK}cluster_size_ema", "average_sums": f"{CODEBOOK}embed_ema"}


def load_rqvae(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> VQVAEModel:
    r"""
    Load an RQ-VAE of the official code.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pt` file, read with `weights_only=True` and memory-mapped, of which the part `state_dict` is used, a
            `.safetensors` file or a state dict, for instance a file's part `state_dict_ema`.
        config_overrides:
            Fields of [`VQVAEConfig`] which the file does not contain, in particular `patch_nums`, as many maps as
            there are depths, for other images than those of 256x256 pixels.

    Returns:
        [`VQVAEModel`], in evaluation mode. It keeps the moving averages of the file (`codebook_averages`). Its codes
        are ordered by depth; [`stack_codes`] gives them the order of that code.

    Raises:
        `ValueError`: If the file cannot be read or is not such a model (the message lists the keys that are missing or
            left over), or if its depths have codebooks of their own.

    Example:

    ```python
    >>> from hf_var import VQVAEConfig, VQVAEModel
    >>> from hf_var.conversion import export_rqvae, load_rqvae

    >>> sizes = {"base_channels": 32, "channel_multipliers": (1, 2, 2), "latent_channels": 8}
    >>> config = VQVAEConfig(patch_nums=[4, 4, 4], quant_conv_kernel_size=1, refinement_ratio=0.0, **sizes)
    >>> load_rqvae(export_rqvae(VQVAEModel(config)), patch_nums=[8] * 3).config.image_size
    (32, 32)
    ```
    """
    check_overrides(VQVAEConfig, config_overrides)
    state_dict = read_state_dict(checkpoint, section="rqvae")
    fields = infer_network_fields(state_dict, "RQ-VAE", f"{CODEBOOK}weight")
    depth = count(state_dict, r"quantizer\.codebooks\.(\d+)\.")
    state_dict = _with_one_codebook(state_dict, depth)
    codebook_size, latent_channels = state_dict[f"{CODEBOOK}weight"].shape
    fields |= {
        "codebook_size": codebook_size,
        "latent_channels": latent_channels,
        "patch_nums": default_patch_nums(fields, depth),
        "refinement_ratio": 0.0,
        "codebook_averages": any(name in state_dict for name in AVERAGES.values()),
        "commitment_loss_weight": 0.25,
        "codebook_loss_weight": 0.0,
    }
    config = VQVAEConfig(**{**fields, **config_overrides})
    if len(config.patch_nums) != depth:
        raise ValueError(
            f"`patch_nums` must be {depth} maps, one for each depth of the file, got {config.patch_nums}."
        )
    has_averages = fields["codebook_averages"] and config.codebook_averages
    if not has_averages:
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in AVERAGES.values()}
    with torch.device("meta"):
        model = VQVAEModel(config)
    return fill(model, _names(model, has_averages), state_dict, "RQ-VAE")


def export_rqvae(model: VQVAEModel) -> StateDict:
    """
    The official code's state dict of a [`VQVAEModel`], equal to the one it was loaded from. Where the codebook has no
    moving averages, theirs are those that the official code starts with: no hits, and the code vectors.

    Raises:
        `ValueError`: If the model is not an RQ-VAE: maps of one size, a codebook, 1x1 convolutions around the
            quantizer and attention in the middle.
    """
    config = model.config
    check_network(config, "the official RQ-VAE")
    if len(set(config.scale_sizes)) > 1:
        raise ValueError(f"`patch_nums` must be maps of one size for the official RQ-VAE, got {config.patch_nums}.")
    codebook, averages = model.codebook, list(AVERAGES.values())
    has_averages = isinstance(codebook, AveragedCodebook) and codebook.has_averages
    exported = official_weights(model, _names(model, has_averages))
    weight = exported[f"{CODEBOOK}weight"]
    if not has_averages:
        exported |= dict(zip(averages, (weight.new_zeros(len(weight)), weight.clone()), strict=True))
    # The padding, which no search sees.
    exported[f"{CODEBOOK}weight"] = torch.nn.functional.pad(weight, (0, 0, 0, 1))
    for name in (f"{CODEBOOK}weight", *averages):
        for depth in range(1, len(config.patch_nums)):
            exported[name.replace(".0.", f".{depth}.")] = exported[name].clone()
    return exported


def _with_one_codebook(state_dict: StateDict, depth: int) -> StateDict:
    """The state dict with one codebook in place of those of all depths, in fp32 and without padding."""
    own = {name.removeprefix(CODEBOOK) for name in state_dict if name.startswith(CODEBOOK)}
    parts = dict(state_dict)
    for number in range(1, depth):
        prefix = f"quantizer.codebooks.{number}."
        others = {name.removeprefix(prefix): parts.pop(name) for name in state_dict if name.startswith(prefix)}
        different = {f"{prefix}{name}" for name in others.keys() ^ own}
        different |= {
            f"{prefix}{name}" for name in others.keys() & own if not _equal(others[name], parts[CODEBOOK + name])
        }
        if different:
            raise ValueError(
                f"`checkpoint` must be an RQ-VAE that shares one codebook, got others than {CODEBOOK}*: "
                f"{listing(list(different))}."
            )
    for name in own:
        if parts[CODEBOOK + name].dtype in DTYPES:
            parts[CODEBOOK + name] = parts[CODEBOOK + name].float()
    weight = parts[f"{CODEBOOK}weight"]
    if len(weight) < 2 or weight[-1].any():
        raise ValueError(
            f"`checkpoint` must be an RQ-VAE, the last of whose code vectors is padding, zeros, got {CODEBOOK}weight of "
            f"the shape {tuple(weight.shape)} without it."
        )
    parts[f"{CODEBOOK}weight"] = weight[:-1]
    return parts


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _names(model: VQVAEModel, has_averages: bool) -> Names:
    """Official name of every weight, with one codebook."""
    own = {"weight": f"{CODEBOOK}weight"} | (AVERAGES if has_averages else {})
    codebook = {f"quantizer.codebook.{ours}": official for ours, official in own.items()}
    return codebook | names_of_unfused_attention(model)


__all__ = ["export_rqvae", "load_rqvae"]
