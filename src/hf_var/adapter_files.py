# SPDX-License-Identifier: Apache-2.0
"""Folders with a LoRA adapter: PEFT's two files, and the names of the labels that it was made for."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

from .priors.configuration_var import ADAPTER_LABELS_NAME
from .priors.modeling_blocks import BlockTransformer
from .weight_files import use_umask


# Initialisations of LoRA which do not change the base weights; others, such as PiSSA, take a part of them away.
HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def write_adapter(
    transformer: BlockTransformer,
    adapter_name: str,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write one of the transformer's adapters; `state_dict` are the model's weights where it does not hold them itself."""
    from peft import get_peft_model_state_dict

    # PEFT would look for a text vocabulary that has grown, on the Hub if need be.
    weights = get_peft_model_state_dict(transformer, state_dict, adapter_name, save_embedding_layers=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The names that they have in a `PeftModel`.
    named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    use_umask(folder / "adapter_model.safetensors")
    config: Any = copy.copy(transformer.peft_config[adapter_name])
    config.inference_mode = True
    if Path(config.base_model_name_or_path or "").exists():
        # A path of this machine is useless to others and may reveal private names.
        config.base_model_name_or_path = None
    config.save_pretrained(str(folder))
    labels = {"id2label": transformer.config.id2label}
    (folder / ADAPTER_LABELS_NAME).write_text(
        json.dumps(labels, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_adapter(
    source: str, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[int, str] | None, dict[str, torch.Tensor]]:
    """Configuration, names of the labels if it has any of its own, and weights of an adapter that can be unloaded again."""
    config = json.loads(Path(cached_file(source, "adapter_config.json", **hub_kwargs)).read_text(encoding="utf-8"))  # pyright: ignore
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"`load_lora_weights` loads adapters of the type LORA, got {config.get('peft_type')} in {source!r}."
        )
    if config.get("trainable_token_indices") is not None:
        raise ValueError(
            f"The adapter in {source!r} trains single rows (trainable_token_indices), which cannot be merged."
        )
    if config.get("bias", "none") != "none" or config.get("init_lora_weights", True) not in HARMLESS_INITIALISATIONS:
        raise ValueError(
            f"The adapter in {source!r} changes the weights beneath (bias={config.get('bias')!r}, init_lora_weights="
            f"{config.get('init_lora_weights')!r}), so it could not be unloaded: merge it with PEFT's "
            "`merge_and_unload` instead."
        )
    path = cached_file(source, ADAPTER_LABELS_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    named = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))["id2label"]
    names = None if named is None else {int(label): name for label, name in named.items()}
    weights = load_file(str(cached_file(source, "adapter_model.safetensors", **hub_kwargs)))
    return config, names, {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
