# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported releases of the libraries. All other code is written for the newest ones."""

from typing import Any

from transformers import PreTrainedModel


def enable_activation_checkpointing(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Checkpoint the layers of `model`; before transformers 5.24 the method has another name, which version 6 drops."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def add_adapter(model: PreTrainedModel, config: Any, adapter_name: str = "default") -> None:
    """`model.add_adapter` by PEFT itself: transformers 5.24 refuses to call any PEFT before 0.22."""
    from peft import inject_adapter_in_model

    config.base_model_name_or_path = model.name_or_path
    inject_adapter_in_model(config, model, adapter_name)
    # What makes `save_pretrained` of transformers write the adapter instead of the weights beneath.
    model._hf_peft_config_loaded = True
