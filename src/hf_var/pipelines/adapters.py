# SPDX-License-Identifier: Apache-2.0
"""PEFT's layers in a transformer: put there, activated, merged, detached and removed, together with the labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from diffusers.utils import set_weights_and_activate_adapters
from torch import nn

from ..compatibility import add_adapter
from ..priors import VARTransformer
from ..priors.configuration_var import ADAPTER_LABELS_NAME


# Attributes of a transformer, because pipelines may share it: its own labels while those of an adapter are in their place,
# and what `fuse_lora` merged.
OWN_LABELS = "_labels_without_adapters"
FUSED = "_fused_adapters"


def is_adapter_module(module: nn.Module) -> bool:
    """Whether PEFT put this module there. By its class's origin, so that it is known where PEFT is not installed."""
    return type(module).__module__.partition(".")[0] == "peft"


def has_adapters(model: nn.Module) -> bool:
    """Whether the weights of `model` are spread over adapters and what lies beneath them."""
    return any(is_adapter_module(module) for module in model.modules())


def adapter_layers(transformer: VARTransformer) -> list[tuple[str, Any]]:
    """Names and layers of PEFT that stand in a layer's place: beside it (LoRA), or with trained copies of it."""
    return [
        (name, module)
        for name, module in transformer.named_modules()
        if is_adapter_module(module) and (hasattr(module, "base_layer") or is_copied(module))
    ]


def is_copied(layer: nn.Module) -> bool:
    """Whether adapters hold whole copies of the layer, such as the class embedding."""
    return hasattr(layer, "original_module")


def plain_parameters(transformer: VARTransformer) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that those beneath adapters have without them."""
    for name, parameter in transformer.named_parameters():
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def active_adapters(transformer: VARTransformer) -> list[str]:
    """Names of the adapters that act, or would if they were not disabled."""
    return next((list(layer.active_adapters) for _, layer in adapter_layers(transformer) if not is_copied(layer)), [])


def activate(transformer: VARTransformer, names: Sequence[str], weights: Sequence[float] = ()) -> None:
    """Make adapters the active ones, with strengths `weights` if there are any."""
    # transformers and diffusers leave out modules that are trained whole, such as the class embedding.
    for _, layer in adapter_layers(transformer):
        if is_copied(layer):
            chosen = layer.check_set_adapter(names)
            layer.set_adapter([] if chosen is None else chosen)
    set_weights_and_activate_adapters(transformer, names, weights)


def enable(transformer: VARTransformer, enabled: bool) -> None:
    """Switch all adapters on or off, also where they hold copies, which diffusers leaves out."""
    for _, layer in adapter_layers(transformer):
        layer.enable_adapters(enabled)


def move(transformer: VARTransformer, names: Sequence[str], device: torch.device) -> None:
    """Move the weights of some adapters alone."""
    for _, layer in adapter_layers(transformer):
        for store in [getattr(layer, attribute) for attribute in layer.adapter_layer_names]:
            for name in store.keys() & set(names):
                is_module = isinstance(store[name], nn.Module)
                store[name] = store[name].to(device) if is_module else nn.Parameter(store[name].to(device))


def add_trained_adapter(
    transformer: VARTransformer,
    adapter_name: str,
    source: str,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
) -> None:
    """What `transformer.load_adapter` is for; a `ValueError` if the weights are not just those of the new layers."""
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    add_adapter(transformer, PeftConfig.from_peft_type(**{**config, "inference_mode": True}), adapter_name)
    expected = get_peft_model_state_dict(transformer, adapter_name=adapter_name, save_embedding_layers=False)
    missing, excess = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or excess:
        raise ValueError(
            f"The adapter in {source!r} was made for another transformer: it lacks {shorten(str(missing), 200)} and has "
            f"in excess {shorten(str(excess), 200)}."
        )
    set_peft_model_state_dict(transformer, weights, adapter_name)


def delete_adapter(transformer: VARTransformer, adapter_name: str) -> None:
    """Delete one of several adapters. What it alone had changed is plain again."""
    for name, layer in adapter_layers(transformer):
        if is_copied(layer):
            # PEFT's own function for this fails if a wrapper has no active copy.
            if adapter_name in layer.modules_to_save:
                del layer.modules_to_save[adapter_name]
            others, plain = layer.modules_to_save, layer.original_module
        else:
            layer.delete_adapter(adapter_name)
            others, plain = layer.r, layer.base_layer
        if not others:
            _replace(transformer, name, plain)
    del transformer.peft_config[adapter_name]


def remove_adapters(transformer: VARTransformer) -> None:
    """Put the layers beneath back in the adapters' places."""
    for name, layer in adapter_layers(transformer):
        _replace(transformer, name, layer.original_module if is_copied(layer) else layer.base_layer)
    _set_adapter_configs(transformer, None)


@dataclass
class _FusedAdapters:
    """What `fuse_lora` took out of a transformer: layers by name, with the plain ones in their places and their scales."""

    configs: dict[str, Any]
    layers: list[tuple[str, Any, nn.Module, dict[str, float]]]
    id2label: Mapping[Any, str] | None
    own_labels: tuple | None


def merge_adapters(transformer: VARTransformer, names: Sequence[str], scale: float, is_checked: bool) -> None:
    """
    Merge adapters into the layers beneath and put those in their places. The transformer is a plain one then, and keeps
    the adapters aside.
    """
    layers, merged = [], []
    try:
        for name, layer in adapter_layers(transformer):
            if is_copied(layer):
                # A module that was trained whole is merged by taking the adapter's copy of it.
                chosen = layer.check_set_adapter(names)
                plain = layer.original_module if chosen is None else layer.modules_to_save[chosen]
                layers.append((name, layer, plain, {}))
                continue
            scales = dict(layer.scaling)
            merged.append((layer, scales))
            layer.scaling.update({adapter: scales[adapter] * scale for adapter in names if adapter in scales})
            layer.merge(safe_merge=is_checked, adapter_names=list(names))
            layers.append((name, layer, layer.base_layer, scales))
    except Exception:
        for layer, scales in merged:
            _unmerge(layer, scales)
        raise
    for name, _, plain, _ in layers:
        _replace(transformer, name, plain)
    own_labels = vars(transformer).pop(OWN_LABELS, None)
    labels = transformer.config.id2label
    setattr(transformer, FUSED, _FusedAdapters(getattr(transformer, "peft_config", {}), layers, labels, own_labels))
    _set_adapter_configs(transformer, None)


def unmerge_adapters(transformer: VARTransformer) -> None:
    """Undo [`merge_adapters`]; a `ValueError` if nothing is kept aside, or the transformer has changed since."""
    fused: _FusedAdapters | None = getattr(transformer, FUSED, None)
    if fused is None:
        raise ValueError("`unfuse_lora` found nothing that `fuse_lora` merged, or others were loaded since.")
    is_same = all(transformer.get_submodule(name) is plain for name, _, plain, _ in fused.layers)
    if not is_same or transformer.config.id2label != fused.id2label:
        raise ValueError("`unfuse_lora` cannot take adapters out: layers or labels were changed after `fuse_lora`.")
    for name, layer, plain, scales in fused.layers:
        # The plain layers may have been moved, without what was kept aside.
        layer.to(next(plain.parameters()).device)
        if not is_copied(layer):
            _unmerge(layer, scales)
        _replace(transformer, name, layer)
    _set_adapter_configs(transformer, fused.configs)
    if fused.own_labels is not None:
        setattr(transformer, OWN_LABELS, fused.own_labels)
    delattr(transformer, FUSED)


def restore_labels(transformer: VARTransformer) -> None:
    """Put the labels back which the transformer had before an adapter brought others."""
    own_labels = vars(transformer).pop(OWN_LABELS, None)
    if own_labels is not None:
        names, rows = own_labels
        transformer.set_labels(names)
        with torch.no_grad():
            transformer.embeddings.class_embedding.weight.copy_(rows)


def bring_other_labels(
    source: str, names: dict[int, str] | None, embedding: torch.Tensor | None, own: Mapping[Any, str]
) -> bool:
    """Whether the adapter has other labels than `own`, all of which must have an embedding in it or in the model."""
    if names is None:
        if embedding is not None and len(embedding) != len(own) + 1:
            raise ValueError(
                f"The adapter in {source!r} was made for {len(embedding) - 1} labels but has no {ADAPTER_LABELS_NAME} that "
                f"names them, and the transformer has {len(own)}: call `transformer.set_labels` with their names first."
            )
        return False
    unknown = [name for name in names.values() if name not in set(own.values())]
    if embedding is None and unknown:
        raise ValueError(
            f"The adapter in {source!r} was made for other labels and has no embedding of them; the transformer does "
            f"not know {shorten(str(unknown), 80)}."
        )
    return names != own


def _unmerge(layer: Any, scales: dict[str, float]) -> None:
    # PEFT warns of layers into which nothing is merged.
    if layer.merged:
        layer.unmerge()
    layer.scaling = scales


def _replace(transformer: VARTransformer, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(transformer.get_submodule(parent), child, module)


def _set_adapter_configs(transformer: VARTransformer, configs: dict[str, Any] | None) -> None:
    """What PEFT and transformers note in a model with adapters, or the traces of it removed."""
    vars(transformer).pop("peft_config", None)
    # Where transformers' own `load_adapter` notes that names begin with "base_model.model", as it would save them then.
    vars(transformer).pop("_weight_conversions", None)
    if configs:
        transformer.peft_config = configs
    transformer._hf_peft_config_loaded = bool(configs)
