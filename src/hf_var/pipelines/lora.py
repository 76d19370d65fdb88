# SPDX-License-Identifier: Apache-2.0
"""diffusers' LoRA interface (Hu et al. 2022): load, mix, merge, save and remove adapters; no pipeline is saved without them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import get_adapter_name
from torch import nn
from transformers.utils import check_peft_version
from transformers.utils.hub import DownloadKwargs

from ..adapter_files import read_adapter, write_adapter
from ..priors import VARTransformer
from .adapters import (
    FUSED,
    OWN_LABELS,
    activate,
    active_adapters,
    add_trained_adapter,
    bring_other_labels,
    delete_adapter,
    enable,
    has_adapters,
    merge_adapters,
    move,
    plain_parameters,
    remove_adapters,
    restore_labels,
    unmerge_adapters,
)
from .checks import is_number


MIN_PEFT_VERSION = "0.21"
CLASS_EMBEDDING_KEY = "embeddings.class_embedding.weight"


class LoraMixin(LoraBaseMixin, DiffusionPipeline):
    """Adapters of a pipeline's transformer, by the names which they have in diffusers."""

    _lora_loadable_modules = ["transformer"]

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
        if not isinstance(pretrained_model_name_or_path, (str, Path)):
            raise ValueError(
                "`pretrained_model_name_or_path` must be a folder or repository, got "
                f"{pretrained_model_name_or_path!r}."
            )
        # PyTorch's names of modules have no dots.
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name):
            raise ValueError(f"`adapter_name` must be a name without dots, got {adapter_name!r}.")
        transformer = self._transformer_to_adapt()
        source = str(pretrained_model_name_or_path)
        config, names, weights = read_adapter(source, kwargs)
        adapter_name = get_adapter_name(transformer) if adapter_name is None else adapter_name
        if adapter_name in getattr(transformer, "peft_config", {}):
            raise ValueError(f"`adapter_name` = {adapter_name!r} is taken by another adapter.")
        was_plain, active = not has_adapters(transformer), active_adapters(transformer)
        trainable = {name for name, parameter in plain_parameters(transformer) if parameter.requires_grad}
        own_labels = transformer.config.id2label or {}, _label_rows(transformer)
        has_other_labels = bring_other_labels(source, names, weights.get(CLASS_EMBEDDING_KEY), own_labels[0])
        if has_other_labels and not was_plain:
            raise ValueError(
                f"The adapter in {source!r} has other labels than those already loaded: call `fuse_lora()` or "
                "`unload_lora_weights()` first."
            )
        try:
            if has_other_labels:
                setattr(transformer, OWN_LABELS, own_labels)
                transformer.set_labels(names)
            add_trained_adapter(transformer, adapter_name, source, config, weights)
            self.set_adapters(adapter_name)
            # The new layers, whose dropout would act otherwise.
            transformer.eval()
            enable(transformer, True)
            vars(transformer).pop(FUSED, None)
        except Exception as error:
            if was_plain:
                remove_adapters(transformer)
                restore_labels(transformer)
            elif adapter_name in transformer.peft_config:
                activate(transformer, active)
                delete_adapter(transformer, adapter_name)
            if isinstance(error, RuntimeError):
                raise ValueError(
                    f"The adapter in {source!r} was made for another transformer: its weights have other shapes."
                ) from error
            raise
        finally:
            # PEFT freezes all weights outside of adapters.
            for name, parameter in plain_parameters(transformer):
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
        names = _adapter_names(transformer, adapter_names)
        weights: Any = 1.0 if adapter_weights is None else adapter_weights
        weights = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(weights) != len(names) or not all(map(is_number, weights)):
            raise ValueError(f"`adapter_weights` must be a number or {len(names)} of them, got {adapter_weights!r}.")
        activate(transformer, names, weights)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that [`~VARPipeline.set_adapters`] chose, also while they are disabled."""
        return active_adapters(self._plain_transformer)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, for the model that has them: `{"transformer": ["default_0"]}`."""
        loaded = _loaded(self._plain_transformer)
        return {"transformer": loaded} if loaded else {}

    def disable_lora(self) -> None:
        """
        Switch all adapters off until [`~VARPipeline.enable_lora`]: the images are those of the weights beneath. Labels that
        an adapter brought stay, and those that the model beneath does not know draw unconditional images.
        """
        enable(self._plain_transformer, False)

    def enable_lora(self) -> None:
        """Switch the active adapters on again after [`~VARPipeline.disable_lora`]."""
        enable(self._plain_transformer, True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """
        Remove adapters. The others that are active stay so; without any, the first that is left becomes active, as in PEFT.
        Without adapters the transformer is as [`~VARPipeline.unload_lora_weights`] leaves it.

        Args:
            adapter_names (`str` or `list[str]`): Their names.

        Raises:
            `ValueError`: If a name is unknown, or the weights are offloaded.
        """
        transformer = self._transformer_to_adapt()
        names = _adapter_names(transformer, adapter_names)
        left = [name for name in _loaded(transformer) if name not in names]
        if not left:
            self.unload_lora_weights()
            return
        activate(transformer, [name for name in active_adapters(transformer) if name in left] or left[:1])
        for name in names:
            delete_adapter(transformer, name)

    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int) -> None:
        """
        Move the weights of adapters alone, such as those that are not active to the CPU.

        Args:
            adapter_names (`str` or `list[str]`): Their names.
            device (`torch.device`, `str` or `int`): Where to. To act, an adapter must be where the transformer is.

        Raises:
            `ValueError`: If a name is unknown, or the weights are offloaded.
        """
        transformer = self._transformer_to_adapt()
        move(transformer, _adapter_names(transformer, adapter_names), torch.device(device))

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """
        Save an adapter for [`~VARPipeline.load_lora_weights`]: PEFT's files, and the names of the labels. Its strength in
        [`~VARPipeline.set_adapters`] is not saved. Unlike diffusers' function it takes the weights from the transformer.

        Args:
            save_directory (`str`): Gets `adapter_config.json`, `adapter_model.safetensors` and `labels.json`.
            adapter_name (`str`, *optional*): Which one, if several are loaded.

        Raises:
            `ValueError`: If there is no such adapter, several without a name, or the weights are offloaded.
        """
        transformer = self._transformer_to_adapt()
        loaded = _loaded(transformer)
        if adapter_name is None and len(loaded) == 1:
            adapter_name = loaded[0]
        if not isinstance(adapter_name, str) or adapter_name not in loaded:
            raise ValueError(f"`adapter_name` must be one of {loaded}, got {adapter_name!r}.")
        write_adapter(transformer, adapter_name, save_directory)

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """
        Merge adapters into the weights. The transformer is a plain one after that, which can be saved, pushed and offloaded
        like any other. The adapters are kept aside for [`~VARPipeline.unfuse_lora`] until
        [`~VARPipeline.unload_lora_weights`] drops them or other ones are loaded.

        Args:
            components (`list[str]`, *optional*, defaults to `("transformer",)`): As in diffusers; no other one has adapters.
            lora_scale (`float`, *optional*, defaults to 1.0): Factor on the strength of the adapters.
            safe_fusing (`bool`, *optional*, defaults to `False`): Whether to refuse weights that would not be finite.
            adapter_names (`list[str]`, *optional*): Which ones; the active ones by default.

        Raises:
            `ValueError`: If there is no adapter, an argument is out of range, or the weights are offloaded.
        """
        _check_components(components)
        if not is_number(lora_scale):
            raise ValueError(f"`lora_scale` must be a finite number, got {lora_scale!r}.")
        transformer = self._transformer_to_adapt()
        if not has_adapters(transformer):
            raise ValueError("`fuse_lora` found no adapter: call `load_lora_weights` first.")
        names = active_adapters(transformer) if adapter_names is None else _adapter_names(transformer, adapter_names)
        merge_adapters(transformer, names, lora_scale, safe_fusing)
        self._merged_adapters = set(names)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """
        Undo [`~VARPipeline.fuse_lora`]: the weights are those from before up to rounding, and the adapters act beside them.

        Args:
            components (`list[str]`, *optional*, defaults to `("transformer",)`): As in diffusers.

        Raises:
            `ValueError`: If nothing is fused, other adapters were loaded since, or labels or layers were changed, or the
                weights are offloaded.
        """
        _check_components(components)
        unmerge_adapters(self._transformer_to_adapt())
        self._merged_adapters = set()

    def unload_lora_weights(self) -> None:
        """
        Remove all adapters, and the labels that they brought: weights and labels are those from before
        [`~VARPipeline.load_lora_weights`]. What was merged by [`~VARPipeline.fuse_lora`] stays.

        Raises:
            `ValueError`: If the weights are offloaded.
        """
        transformer = self._transformer_to_adapt()
        if has_adapters(transformer):
            remove_adapters(transformer)
        restore_labels(transformer)
        vars(transformer).pop(FUSED, None)

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

    @property
    def _plain_transformer(self) -> VARTransformer:
        """The transformer itself, without what `torch.compile` wraps around it."""
        return getattr(self.transformer, "_orig_mod", self.transformer)

    def _transformer_to_adapt(self) -> VARTransformer:
        """The same, with its weights at hand."""
        transformer = self._plain_transformer
        is_away = any(parameter.device.type == "meta" for parameter in transformer.parameters())
        if is_away or any(hasattr(module, "_diffusers_hook") for module in transformer.modules()):
            raise ValueError(
                "`transformer` is offloaded in parts or cast layer by layer, so its layers cannot be changed: load, "
                "merge or remove adapters before `enable_sequential_cpu_offload`, `enable_group_offload` and the like."
            )
        return transformer


def _label_rows(transformer: Any) -> torch.Tensor | None:
    """The weight of the class embedding, of models that have classes."""
    embedding = getattr(transformer.embeddings, "class_embedding", None)
    return None if embedding is None else embedding.weight


def _loaded(transformer: VARTransformer) -> list[str]:
    return list(getattr(transformer, "peft_config", {}))


def _adapter_names(transformer: VARTransformer, names: Any) -> list[str]:
    """One name or several, all of them loaded."""
    loaded = _loaded(transformer)
    chosen = [names] if isinstance(names, str) else names
    if not isinstance(chosen, Sequence) or not chosen or not all(name in loaded for name in chosen):
        raise ValueError(f"`adapter_names` must be among {loaded}, got {names!r}.")
    return list(chosen)


def _check_components(components: Any) -> None:
    if not isinstance(components, Sequence) or list(components) != ["transformer"]:
        raise ValueError(f"`components` must be ['transformer'], got {components!r}.")
