# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by LoRA (Hu et al. 2022) through PEFT: what to train, and adapters that are saved whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ..adapter_files import write_adapter
from ..compatibility import add_adapter
from ..priors import TextVARTransformer, VARTransformer
from ..ranges import CheckedFields, Decay, NonNegativeInt, PositiveFloat, argument


# The projections of attention and feed-forward layers, where a transformer has most of its weights.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
# Those of gated feed-forward layers, in their place.
GATED_TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class LoraFields(CheckedFields):
    """Arguments of [`add_lora`] on a command line."""

    lora_rank: NonNegativeInt = argument(
        0, help="train adapters of this rank and the class embedding alone; 0: all weights"
    )
    lora_alpha: PositiveFloat | None = argument(None, help="scale of the adapters; default: lora_rank")
    lora_dropout: Decay = 0.0
    lora_target_modules: list[str] | None = argument(
        None, help="default: all projections of attention and feed-forward layers"
    )


def add_lora(
    transformer: VARTransformer | TextVARTransformer,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    train_labels: bool = True,
) -> list[nn.Parameter]:
    r"""
    Freeze a transformer and give it a LoRA adapter named `default`, which leaves its outputs as they are at first.

    Labels are changed before that, by [`VARTransformer.set_labels`]; the optimizer, the average of the weights and
    wrappers such as DDP come after it.

    Args:
        transformer ([`VARTransformer`] or [`TextVARTransformer`]): A trained model, changed in place.
        rank (`int`, *optional*, defaults to 16): Rank of the changes of each weight.
        alpha (`float`, *optional*, defaults to `rank`): The changes are multiplied by `alpha / rank`.
        dropout (`float`, *optional*, defaults to 0.0): Dropout probability of what the adapter reads.
        target_modules (`list[str]`, *optional*):
            Linear layers that are adapted, by the ends of their names; all projections of attention and feed-forward
            layers by default.
        train_labels (`bool`, *optional*, defaults to `True`):
            Whether the class embedding is trained as well, whole, and saved with the adapter. New labels need it;
            transformers that read texts have none.

    Returns:
        `list[nn.Parameter]`: What is to be trained, in the order of `transformer.parameters()`.

    Raises:
        `ValueError`: If an argument is out of range, a target is not a linear layer, there is an adapter already, or
            labels are new and not to be trained.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` must be an integer of at least 1, got {rank!r}.")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"`alpha` must be positive, got {alpha}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
    if getattr(transformer, "peft_config", None):
        raise ValueError("`transformer` has an adapter already: merge or remove it first.")
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    kinds = {name.rpartition(".")[2] for name in linear}
    defaults = [name for name in (*LORA_TARGETS, *GATED_TARGETS) if name in kinds]
    targets = defaults if target_modules is None else list(target_modules)
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not targets:
        raise ValueError(
            f"`target_modules` must be among the linear layers {sorted(kinds)}, got {unknown or targets}."
        )
    has_labels = hasattr(transformer.embeddings, "class_embedding")
    if has_labels and not train_labels:
        _check_labels_are_trained(transformer)

    transformer.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType] - any number will do
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=["class_embedding"] if has_labels and train_labels else None,
    )
    add_adapter(transformer, config)
    if any(layer.gradient_checkpointing for layer in transformer.layers):
        # Reentrant checkpointing gives no gradients to layers whose inputs need none.
        transformer.enable_input_require_grads()
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def save_lora(
    transformer: VARTransformer | TextVARTransformer,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    r"""
    Save the adapter of [`add_lora`] with everything that it needs in addition to the base model.

    [`VARPipeline.load_lora_weights`] loads the folder, labels included. So does `PeftModel.from_pretrained`, if
    `transformer.set_labels` was called with the names in `labels.json` before.

    Args:
        transformer ([`VARTransformer`]): The model with the adapter, without wrappers.
        folder (`str`): Gets `adapter_config.json`, `adapter_model.safetensors` and `labels.json`.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            The model's weights where it does not hold them itself, as under FSDP.

    Raises:
        `ValueError`: If there is not exactly one adapter.
    """
    configs = getattr(transformer, "peft_config", {})
    if len(configs) != 1:
        raise ValueError(f"`transformer` must have one adapter, got {list(configs)}.")
    [adapter_name] = configs
    write_adapter(transformer, adapter_name, folder, state_dict)


def _check_labels_are_trained(transformer: Any) -> None:
    *rows, unconditional = transformer.embeddings.class_embedding.weight.unbind()
    names = (transformer.config.id2label or {}).values()
    new = [name for name, row in zip(names, rows, strict=True) if torch.equal(row, unconditional)]
    if new:
        raise ValueError(f"`train_labels` must be true: the labels {new} are new and would stay unconditional.")
