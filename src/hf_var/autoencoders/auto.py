# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of any class."""

import os
from typing import Any

from ..loading import read_fields
from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig
from .configuration_vqvae import VQVAEConfig
from .modeling_hierarchical_vqvae import HierarchicalVQVAEModel
from .modeling_vqvae import VQVAEModel


Tokenizer = VQVAEModel | HierarchicalVQVAEModel
TokenizerConfig = VQVAEConfig | HierarchicalVQVAEConfig
TOKENIZERS: dict[Any, Any] = {
    model_class.config_class.model_type: model_class for model_class in (VQVAEModel, HierarchicalVQVAEModel)
}


def load_tokenizer(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Any:
    r"""
    Load a tokenizer of the class that its `config.json` names.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): Its folder or Hub repository.
        kwargs: Arguments of transformers' `from_pretrained`, such as `dtype`, `revision` and `subfolder`.

    Returns:
        [`VQVAEModel`] or [`HierarchicalVQVAEModel`], in evaluation mode.

    Raises:
        `ValueError`: If it holds no tokenizer, or not all of its weights.
    """
    fields, _ = read_fields(pretrained_model_name_or_path, **kwargs)
    kind: Any = fields.get("model_type")
    if kind not in TOKENIZERS:
        raise ValueError(
            f"{str(pretrained_model_name_or_path)!r} holds a model of type {kind!r}, which is no tokenizer: pass the folder "
            f"or repository of one of {sorted(TOKENIZERS)}."
        )
    return TOKENIZERS[kind].from_pretrained(pretrained_model_name_or_path, **kwargs)
