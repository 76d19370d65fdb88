# SPDX-License-Identifier: Apache-2.0
"""LoRA in a pipeline (Hu et al. 2022): load, mix, merge and remove adapters, and refuse to save a pipeline without them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import get_adapter_name, scale_lora_layers, set_weights_and_activate_adapters
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from safetensors.torch import load_file
from torch import nn
from transformers.utils import check_peft_version
from transformers.utils.hub import DownloadKwargs, cached_file

from ..compatibility import add_adapter
from ..priors import VARTransformer
from ..priors.configuration_var import ADAPTER_LABELS_NAME


MIN_PEFT_VERSION = "0.21"
CLASS_EMBEDDING_KEY = "embeddings.class_embedding.weight"
# Initialisations of LoRA which do not change the base weights; others, such as PiSSA, take a part of them away.
HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
# The attribute that keeps a transformer's own labels while those of an adapter are in their place. On the transformer,
# because pipelines may share it.
OWN_LABELS = "_labels_without_adapters"


def is_adapter_module(module: nn.Module) -> bool:
    """Whether PEFT put this module there. By its class's origin, so that it is known where PEFT is not installed."""
    return type(module).__module__.partition(".")[0] == "peft"


def has_adapters(model: nn.Module) -> bool:
    """Whether the weights of `model` are spread over adapters and what lies beneath them."""
    return any(is_adapter_module(module) for module in model.modules())


class LoraMixin(DiffusionPipeline):
    """Adapters of a pipeline's transformer, by the names which they have in diffusers."""

    def load_lora_weights(
        self, pretrained_model_name_or_path: str | Path, adapter_name: str | None = None, **kwargs
    ) -> None:
        r"""
        Load a LoRA adapter into the transformer's layers and make it the active one.

        An adapter for another label set changes the labels as well: it brings their names and embeddings. The weights
        beneath stay as they are until [`~VARPipeline.fuse_lora`].

        Args:
            pretrained_model_name_or_path (`str`):
                Folder or repository with PEFT's `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name (`str`, *optional*):
                Its name in [`~VARPipeline.set_adapters`]; the default is `default_0`, `default_1` and so on.
            kwargs:
                `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and `proxies`, as in
                `from_pretrained`.

        Raises:
            `ValueError`: If PEFT is missing, or the adapter is not a LoRA, would change the weights beneath, was made for
                another model or for labels that it does not bring along. The pipeline is then as it was before.
            `OSError`: If there is no such folder, repository or file.
        """
        check_peft_version(min_version=MIN_PEFT_VERSION)
        unknown = kwargs.keys() - DownloadKwargs.__annotations__.keys()
        if unknown:
            raise ValueError(f"`load_lora_weights` takes {sorted(DownloadKwargs.__annotations__)}, got {unknown}.")
        transformer = self._transformer_to_adapt()
        source = str(pretrained_model_name_or_path)
        config, names, weights = _read_adapter(source, kwargs)
        adapter_name = get_adapter_name(transformer) if adapter_name is None else adapter_name
        if adapter_name in getattr(transformer, "peft_config", {}):
            raise ValueError(f"`adapter_name` = {adapter_name!r} is taken by another adapter.")
        was_plain, active = not has_adapters(transformer), _active_adapters(transformer)
        trainable = {name for name, parameter in _plain_parameters(transformer) if parameter.requires_grad}
        own_labels = transformer.config.id2label or {}, transformer.embeddings.class_embedding.weight
        has_other_labels = _check_labels(source, names, weights.get(CLASS_EMBEDDING_KEY), own_labels[0])
        if has_other_labels and not was_plain:
            raise ValueError(
                f"The adapter in {source!r} has other labels than those already loaded: call `fuse_lora()` or "
                "`unload_lora_weights()` first."
            )
        try:
            if has_other_labels:
                setattr(transformer, OWN_LABELS, own_labels)
                transformer.set_labels(names)
            _add_trained_adapter(transformer, adapter_name, source, config, weights)
            self.set_adapters(adapter_name)
            # The new layers, whose dropout would act otherwise.
            transformer.eval()
        except Exception as error:
            if was_plain:
                _remove_adapters(transformer)
                _restore_labels(transformer)
            elif adapter_name in transformer.peft_config:
                _activate(transformer, active)
                _delete_adapter(transformer, adapter_name)
            if isinstance(error, RuntimeError):
                raise ValueError(
                    f"The adapter in {source!r} was made for another transformer: its weights have other shapes."
                ) from error
            raise
        finally:
            # PEFT freezes all weights outside of adapters.
            for name, parameter in _plain_parameters(transformer):
                parameter.requires_grad_(name in trainable or parameter.requires_grad)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """
        Choose the active adapters among those loaded.

        Args:
            adapter_names (`str` or `list[str]`):
                Their names. Only one of them may bring an embedding of the labels.
            adapter_weights (`float` or `list[float]`, *optional*, defaults to 1.0):
                Strength of each; the embedding of the labels is not scaled.

        Raises:
            `ValueError`: If a name is unknown, there are not as many weights as names, or two adapters bring an
                embedding of the labels.
        """
        transformer = self._transformer_to_adapt()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        loaded = list(getattr(transformer, "peft_config", {}))
        if not names or not set(names) <= set(loaded):
            raise ValueError(f"`adapter_names` must be among {loaded}, got {adapter_names!r}.")
        if adapter_weights is None or isinstance(adapter_weights, (int, float)):
            weights = [1.0 if adapter_weights is None else adapter_weights] * len(names)
        else:
            weights = list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"`adapter_weights` must be a number or {len(names)} of them, got {adapter_weights!r}.")
        _activate(transformer, names, weights)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """
        Merge the active adapters into the weights for good; others are dropped. The transformer is a plain one after
        that, which can be saved, pushed and offloaded like any other.

        Args:
            lora_scale (`float`, *optional*, defaults to 1.0): Factor on the strength of the adapters.

        Raises:
            `ValueError`: If there is no adapter, or the weights are offloaded.
        """
        transformer = self._transformer_to_adapt()
        if not has_adapters(transformer):
            raise ValueError("`fuse_lora` found no adapter: call `load_lora_weights` first.")
        scale_lora_layers(transformer, lora_scale)
        _remove_adapters(transformer, merge=True)
        vars(transformer).pop(OWN_LABELS, None)

    def unload_lora_weights(self) -> None:
        """
        Remove all adapters, and the labels that they brought: weights and labels are those from before
        [`~VARPipeline.load_lora_weights`]. What was merged by [`~VARPipeline.fuse_lora`] stays.

        Raises:
            `ValueError`: If the weights are offloaded.
        """
        transformer = self._transformer_to_adapt()
        if has_adapters(transformer):
            _remove_adapters(transformer)
        _restore_labels(transformer)

    def save_pretrained(self, save_directory: Any, *args, **kwargs) -> None:
        """
        Save the pipeline, see diffusers' `DiffusionPipeline.save_pretrained`.

        Raises:
            `ValueError`: If a model has adapters: with them, transformers would save the adapters alone.
        """
        self._check_has_no_adapters()
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> str:
        """
        Upload the pipeline, see diffusers' `DiffusionPipeline.push_to_hub`.

        Raises:
            `ValueError`: If a model has adapters, before a repository is created.
        """
        self._check_has_no_adapters()
        return super().push_to_hub(repo_id, *args, **kwargs)

    def _check_has_no_adapters(self) -> None:
        for name, component in self.components.items():
            if isinstance(component, nn.Module) and has_adapters(component):
                raise ValueError(
                    f"`{name}` has live adapters, which a saved pipeline cannot hold: merge them by `fuse_lora()` or "
                    "remove them by `unload_lora_weights()` first."
                )

    def _transformer_to_adapt(self) -> VARTransformer:
        """The transformer itself, without what `torch.compile` wraps around it, with its weights at hand."""
        transformer = getattr(self.transformer, "_orig_mod", self.transformer)
        is_away = any(parameter.device.type == "meta" for parameter in transformer.parameters())
        if is_away or any(hasattr(module, "_diffusers_hook") for module in transformer.modules()):
            raise ValueError(
                "`transformer` is offloaded in parts or cast layer by layer, so its layers cannot be changed: load, "
                "merge or remove adapters before `enable_sequential_cpu_offload`, `enable_group_offload` and the like."
            )
        return transformer


def _plain_parameters(transformer: VARTransformer) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that those beneath adapters have without them."""
    for name, parameter in transformer.named_parameters():
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _active_adapters(transformer: VARTransformer) -> list[str]:
    layers: Iterator[Any] = filter(is_adapter_module, transformer.modules())
    return next((list(layer.active_adapters) for layer in layers if hasattr(layer, "base_layer")), [])


def _activate(transformer: VARTransformer, names: Sequence[str], weights: Sequence[float] = ()) -> None:
    """Make adapters the active ones, with strengths `weights` if there are any."""
    # transformers and diffusers leave out modules that are trained whole, such as the class embedding.
    for module in transformer.modules():
        wrapper: Any = module
        if is_adapter_module(module) and hasattr(module, "original_module"):
            chosen = wrapper.check_set_adapter(names)
            wrapper.set_adapter([] if chosen is None else chosen)
    set_weights_and_activate_adapters(transformer, names, weights)


def _add_trained_adapter(
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


def _delete_adapter(transformer: VARTransformer, adapter_name: str) -> None:
    """Delete one of several adapters. What it alone had changed is plain again."""
    for name, module in list(transformer.named_modules()):
        if not is_adapter_module(module):
            continue
        wrapper: Any = module
        if hasattr(module, "original_module"):
            # PEFT's own function for this fails if a wrapper has no active copy.
            if adapter_name in wrapper.modules_to_save:
                del wrapper.modules_to_save[adapter_name]
            others, plain = wrapper.modules_to_save, wrapper.original_module
        elif hasattr(module, "base_layer"):
            wrapper.delete_adapter(adapter_name)
            others, plain = wrapper.r, wrapper.base_layer
        else:
            continue
        if not others:
            _replace(transformer, name, plain)
    del transformer.peft_config[adapter_name]


def _replace(transformer: VARTransformer, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(transformer.get_submodule(parent), child, module)


def _remove_adapters(transformer: VARTransformer, merge: bool = False) -> None:
    """Put the layers beneath back in the adapters' places, with the active adapters merged into them or as they were."""
    for name, module in list(transformer.named_modules()):
        wrapper: Any = module
        if is_adapter_module(module) and hasattr(module, "original_module"):
            # A module that was trained whole is merged by taking the active adapter's copy of it.
            active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
            plain = wrapper.modules_to_save[active[0]] if merge and active else wrapper.original_module
            _replace(transformer, name, plain)
        elif merge and is_adapter_module(module) and hasattr(module, "base_layer"):
            wrapper.merge()
    recurse_remove_peft_layers(transformer)
    vars(transformer).pop("peft_config", None)
    transformer._hf_peft_config_loaded = False
    # Where transformers' own `load_adapter` notes that names begin with "base_model.model", as it would save them then.
    vars(transformer).pop("_weight_conversions", None)


def _restore_labels(transformer: VARTransformer) -> None:
    own_labels = vars(transformer).pop(OWN_LABELS, None)
    if own_labels is not None:
        names, rows = own_labels
        transformer.set_labels(names)
        with torch.no_grad():
            transformer.embeddings.class_embedding.weight.copy_(rows)


def _read_adapter(
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


def _check_labels(
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
