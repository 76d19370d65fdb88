# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of any class."""

import os
from typing import Any

from transformers import PreTrainedConfig

from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig
from .configuration_vqvae import VQVAEConfig
from .modeling_hierarchical_vqvae import HierarchicalVQVAEModel
from .modeling_vqvae import VQVAEModel


Tokenizer = VQVAEModel | HierarchicalVQVAEModel
TokenizerConfig = VQVAEConfig | HierarchicalVQVAEConfig
TOKENIZERS: dict[Any, Any] = {
    VQVAEConfig.model_type: VQVAEModel,
    HierarchicalVQVAEConfig.model_type: HierarchicalVQVAEModel,
}


def load_tokenizer(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Tokenizer:
    """A tokenizer of the class that its `config.json` names, with the arguments of transformers' `from_pretrained`."""
    fields, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
    model_class = TOKENIZERS.get(fields.get("model_type"), VQVAEModel)
    return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
