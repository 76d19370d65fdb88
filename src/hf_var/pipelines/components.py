# SPDX-License-Identifier: Apache-2.0
"""Checks that the models of a pipeline belong together."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..autoencoders import TokenizerConfig, VQVAEConfig, VQVAEModel
from ..priors import RQTransformerConfig, VARConfig
from ..priors.configuration_blocks import BlocksMixin
from ..priors.modeling_blocks import BlockTransformer
from .adapters import is_adapter_module


def check_components(transformer: BlockTransformer, vqvae: VQVAEModel, config_class: type[BlocksMixin]) -> None:
    """Raise a `ValueError` unless these are models of the two stages, for the same scales, the first of this kind."""
    for name, component, kind in (("transformer", transformer, config_class), ("vqvae", vqvae, VQVAEConfig)):
        # By its configuration: the model itself may be wrapped, by torch.compile for one.
        if not isinstance(getattr(component, "config", None), kind):
            raise ValueError(f"`{name}` must be a model with a {kind.__name__}, got {type(component).__name__}.")
        check_no_adapter(name, component)
    _check_same_codes("transformer", transformer.config, vqvae.config)
    if transformer.config.is_raster:
        raise ValueError(
            "`transformer` must predict a whole scale at a time, got one of raster order: pass it to `ARPipeline` as its "
            "`prior`."
        )
    _check_blocks("transformer", transformer.config)


def check_priors(
    vqvae: Any,
    priors: Mapping[str, Any],
    condition_vqvae: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raise a `ValueError` unless the priors, in raster order, predict the tokenizer's codes, given what there is."""
    for name, prior in priors.items():
        check_no_adapter(name, prior)
    config: Any = getattr(priors["prior"], "config", None)
    reads_tokens = isinstance(config, RQTransformerConfig) and not config.has_classes
    if not isinstance(config, RQTransformerConfig | VARConfig):
        check_levels(vqvae, priors)
    else:
        if not isinstance(getattr(vqvae, "config", None), VQVAEConfig):
            raise ValueError(f"`vqvae` must be a `VQVAEModel` for this prior, got {type(vqvae).__name__}.")
        others = [name for name, prior in priors.items() if prior is not None and name != "prior"]
        if others:
            raise ValueError(f"`{others[0]}` must be None: `prior` predicts the codes of all maps.")
        _check_same_codes("prior", config, vqvae.config)
        if isinstance(config, VARConfig) and not config.is_raster:
            raise ValueError(
                "`prior` must predict one code after the other, got a VARTransformer of whole scales: pass it to "
                "`VARPipeline`."
            )
    for name, component in (("condition_vqvae", condition_vqvae), ("tokenizer", tokenizer)):
        if component is not None and not reads_tokens:
            raise ValueError(f"`{name}` must be None: `prior` is not conditioned on tokens.")
    if condition_vqvae is not None:
        _check_condition_vqvae(priors["prior"].config, condition_vqvae)
    if tokenizer is not None:
        _check_text_tokenizer(priors["prior"].config, tokenizer)


def check_no_adapter(name: str, component: Any) -> None:
    """Raise a `ValueError` if PEFT has wrapped a model in one of its own."""
    if is_adapter_module(component):
        raise ValueError(
            f"`{name}` must be the model itself, got PEFT's {type(component).__name__} around it: pass its "
            "`get_base_model()`, which has the adapters in its layers, or its `merge_and_unload()`."
        )


def _check_same_codes(name: str, prior: BlocksMixin | RQTransformerConfig, tokenizer: VQVAEConfig) -> None:
    reads_vectors = isinstance(prior, BlocksMixin) or prior.code_inputs == "vectors"
    for field in ("codebook_size", *(["latent_channels"] if reads_vectors else []), "patch_nums"):
        ours, theirs = getattr(prior, field), getattr(tokenizer, field)
        if ours != theirs:
            raise ValueError(
                f"`{name}` and `vqvae` do not belong together: {field} is {ours} in the {name} and {theirs} in the vqvae."
            )


def _check_blocks(name: str, config: Any) -> None:
    if not config.has_known_inputs:
        raise ValueError(
            f"`{name}` must predict a whole scale or a single token at a time, got block_sizes={config.block_sizes} for "
            f"patch_nums={config.patch_nums}."
        )


def _check_condition_vqvae(config: RQTransformerConfig, condition_vqvae: Any) -> None:
    condition: Any = getattr(condition_vqvae, "config", None)
    if not isinstance(condition, TokenizerConfig):
        raise ValueError(
            f"`condition_vqvae` must be a tokenizer such as `VQVAEModel`, got {type(condition_vqvae).__name__}."
        )
    length = sum(condition.scale_lengths)
    if length != config.condition_length or condition.codebook_size > config.num_condition_ids:
        raise ValueError(
            f"`condition_vqvae` must make {config.condition_length} codes below {config.num_condition_ids} for `prior`, got "
            f"{length} of {condition.codebook_size}."
        )


def _check_text_tokenizer(config: RQTransformerConfig, tokenizer: Any) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"`tokenizer` must be one of transformers' tokenizers, got {type(tokenizer).__name__}.")
    if len(tokenizer) > config.num_condition_ids:
        raise ValueError(
            f"`tokenizer` must have at most the {config.num_condition_ids} tokens that `prior` reads, got {len(tokenizer)}."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError("`tokenizer` must have a `pad_token`, since prompts are filled up to one length.")


def check_levels(vqvae: Any, priors: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless there is one prior for each level of the tokenizer, for its map and its codes."""
    tokenizer: Any = getattr(vqvae, "config", None)
    if not isinstance(tokenizer, TokenizerConfig):
        raise ValueError(f"`vqvae` must be a tokenizer such as `HierarchicalVQVAEModel`, got {type(vqvae).__name__}.")
    sizes, given = tokenizer.scale_sizes, {name: prior for name, prior in priors.items() if prior is not None}
    if len(given) != len(sizes) or "prior" not in given:
        raise ValueError(
            f"`vqvae` has {len(sizes)} levels, which need as many priors, got {', '.join(given) or 'none'}."
        )
    first: Any = getattr(given["prior"], "config", None)
    coarser = None
    for (name, prior), size in zip(given.items(), sizes, strict=True):
        config: Any = getattr(prior, "config", None)
        expected = {"map_size": size, "codebook_size": tokenizer.codebook_size}
        found = {field: getattr(config, field, None) for field in expected}
        if coarser is not None or getattr(config, "condition_map_size", None) is not None:
            expected |= {"condition_map_size": coarser}
            found |= {"condition_map_size": getattr(config, "condition_map_size", None)}
        if getattr(config, "condition_codebook_size", None) is not None:
            expected |= {"condition_codebook_size": tokenizer.codebook_size}
            found |= {"condition_codebook_size": config.condition_codebook_size}
        for field, value in expected.items():
            if found[field] != value:
                raise ValueError(
                    f"`{name}` and `vqvae` do not belong together: {field} is {found[field]} in the prior, and the "
                    f"tokenizer's level needs {value}."
                )
        if config.num_labels and config.id2label != first.id2label:
            raise ValueError(f"`{name}` must have the labels of `prior`, {first.id2label}, got {config.id2label}.")
        coarser = size
