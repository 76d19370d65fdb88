# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ritheshkumar95/pytorch-vqvae, the public gated PixelCNN over the codes of a VQ-VAE, to our model and back."""

import os
from collections.abc import Mapping

import torch

from ..priors import PixelCNN, PixelCNNConfig
from ..weight_files import StateDict, read_state_dict
from .common import check_overrides, count, fill, rename, require_keys


# What that code fixes.
FIXED_FIELDS = {"first_kernel_size": 7, "kernel_size": 3, "head_hidden_size": 512}
RULES = [
    (r"\.vertical_conv\.", ".vert_stack."),
    (r"\.horizontal_conv\.", ".horiz_stack."),
    (r"\.vertical_to_horizontal\.", ".vert_to_horiz."),
    (r"\.horizontal_proj\.", ".horiz_resid."),
    (r"\.class_embedding\.", ".class_cond_embedding."),
    (r"^head_proj\.", "output_conv.0."),
    (r"^head\.", "output_conv.2."),
]


def load_pixelcnn(checkpoint: str | os.PathLike | Mapping, **config_overrides) -> PixelCNN:
    r"""
    Load a gated PixelCNN of ritheshkumar95/pytorch-vqvae, such as `prior.pt`.

    Args:
        checkpoint (`str`, `os.PathLike` or `dict`):
            A `.pt` file, read with `weights_only=True` and memory-mapped, a `.safetensors` file or a state dict.
        config_overrides:
            Fields of [`PixelCNNConfig`] which the file does not contain, in particular `map_size` (8) and `id2label`.

    Returns:
        [`PixelCNN`], in evaluation mode.

    Raises:
        `ValueError`: If the file cannot be read or is not such a model (the message lists the keys that are missing or left
            over).

    Example:

    ```python
    >>> from hf_var import PixelCNN, PixelCNNConfig
    >>> from hf_var.conversion import export_pixelcnn, load_pixelcnn

    >>> state_dict = export_pixelcnn(PixelCNN(PixelCNNConfig(num_labels=10, hidden_size=16, num_hidden_layers=3)))
    >>> load_pixelcnn(state_dict).config.num_labels
    10
    ```
    """
    check_overrides(PixelCNNConfig, config_overrides)
    state_dict = read_state_dict(checkpoint, section="pixelcnn")
    config = PixelCNNConfig(**{**_infer_fields(state_dict, config_overrides), **config_overrides})
    with torch.device("meta"):
        model = PixelCNN(config)
    return fill(model, {name: rename(name, RULES) for name in model.state_dict()}, state_dict, "PixelCNN")


def export_pixelcnn(model: PixelCNN) -> StateDict:
    """
    The state dict of ritheshkumar95/pytorch-vqvae of a [`PixelCNN`], equal to the one it was loaded from.

    Raises:
        `ValueError`: If the model has sizes which that code fixes otherwise.
    """
    for name, value in FIXED_FIELDS.items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"`{name}` must be {value} for the code of pytorch-vqvae, got {getattr(model.config, name)}."
            )
    return {rename(name, RULES): weight.clone() for name, weight in model.state_dict().items()}


def _infer_fields(state_dict: StateDict, overrides: dict) -> dict:
    required = {"embedding.weight": 2, "layers.0.vert_stack.weight": 4, "output_conv.0.weight": 4}
    require_keys(state_dict, "PixelCNN", required)
    codebook_size, hidden_size = state_dict["embedding.weight"].shape
    classes = state_dict.get("layers.0.class_cond_embedding.weight")
    num_classes = 0 if classes is None else len(classes)
    second_layer = state_dict.get("layers.1.vert_stack.weight")
    return {
        # With dropped classes, which that code lacks, the last one is the unconditional one.
        "num_labels": max(num_classes - (overrides.get("class_dropout_prob", 0) > 0), 0),
        "codebook_size": codebook_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": count(state_dict, r"layers\.(\d+)\."),
        "first_kernel_size": state_dict["layers.0.vert_stack.weight"].shape[-1],
        "kernel_size": FIXED_FIELDS["kernel_size"] if second_layer is None else second_layer.shape[-1],
        "head_hidden_size": len(state_dict["output_conv.0.weight"]),
    }


__all__ = ["export_pixelcnn", "load_pixelcnn"]
