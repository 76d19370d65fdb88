# SPDX-License-Identifier: Apache-2.0
"""Checks of a pipeline's models and of the values that its methods take."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from ..autoencoders import TokenizerConfig, VQVAEConfig, VQVAEModel
from ..priors import VARConfig, VARTransformer
from .adapters import is_adapter_module
from .sampling import Generators


def check_components(transformer: VARTransformer, vqvae: VQVAEModel) -> None:
    """Raise a `ValueError` unless these are models of the two stages, for the same codes."""
    for name, component, config_class in (("transformer", transformer, VARConfig), ("vqvae", vqvae, VQVAEConfig)):
        # By its configuration: the model itself may be wrapped, by torch.compile for one.
        if not isinstance(getattr(component, "config", None), config_class):
            raise ValueError(
                f"`{name}` must be a model with a {config_class.__name__}, got {type(component).__name__}."
            )
        if is_adapter_module(component):
            raise ValueError(
                f"`{name}` must be the model itself, got PEFT's {type(component).__name__} around it: pass its "
                "`get_base_model()`, which has the adapters in its layers, or its `merge_and_unload()`."
            )
    for field in ("codebook_size", "latent_channels", "patch_nums"):
        ours, theirs = getattr(transformer.config, field), getattr(vqvae.config, field)
        if ours != theirs:
            raise ValueError(
                f"`transformer` and `vqvae` do not belong together: {field} is {ours} in the transformer and {theirs} in "
                "the vqvae."
            )
    if not transformer.config.has_known_inputs:
        raise ValueError(
            "`transformer` must predict a whole scale or a single token at a time, got block_sizes="
            f"{transformer.config.block_sizes} for patch_nums={transformer.config.patch_nums}."
        )


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


def is_number(value: Any, kind: type[Real] = Real) -> bool:
    """Whether `value` is a finite number, Python's or numpy's."""
    try:
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # the largest integers
        return False


def check_guidance(guidance_scale: Any) -> None:
    """Raise a `ValueError` unless it is a finite number or a callable."""
    if not callable(guidance_scale) and not is_number(guidance_scale):
        raise ValueError(
            f"`guidance_scale` must be a finite number, 1 for no guidance, or a callable of (k, K), got {guidance_scale!r}."
        )


def check_top_k(codebook_size: int, top_k: Any) -> None:
    """Raise a `ValueError` unless it is a number of codes."""
    if not is_number(top_k, Integral) or not 0 <= top_k <= codebook_size:
        raise ValueError(
            f"`top_k` must be from 1 to codebook_size={codebook_size}, 0 for all codes or `None` for the default, got "
            f"{top_k!r}."
        )


def check_top_p(top_p: Any) -> None:
    """Raise a `ValueError` unless it is a probability."""
    if not is_number(top_p) or not 0 <= top_p <= 1:
        raise ValueError(f"`top_p` must be in [0, 1], where 0 and 1 mean all codes, got {top_p!r}.")


def check_temperature(temperature: Any) -> None:
    """Raise a `ValueError` unless it is a positive number."""
    if not is_number(temperature) or temperature <= 0:
        raise ValueError(f"`temperature` must be a number above 0, got {temperature!r}; greedy choice is `top_k=1`.")


def check_count(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless it is an integer of at least 1."""
    if not is_number(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless it is a truth value."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless it is `None` or can be called."""
    if value is not None and not callable(value):
        raise ValueError(f"`{name}` must be a callable, got {value!r}.")


def checked_codes(name: str, codes: Any, config: VQVAEConfig | VARConfig) -> torch.Tensor:
    """Codes of whole images, `(batch, length)`; a `ValueError` that names the argument unless these are some."""
    length: int = sum(config.scale_lengths)
    found: Any = as_tensor(codes)
    is_whole = isinstance(found, torch.Tensor) and found.shape[1:] == (length,) and len(found) > 0
    if not is_whole or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        got = type(codes).__name__ if found is None else f"{found.dtype} of the shape {tuple(found.shape)}"
        raise ValueError(f"`{name}` must be integers of the shape (batch, {length}), got {got}.")
    found = found.long()
    # The models look at the range on the CPU alone; elsewhere a wrong code ends the process.
    lowest, highest = int(found.min()), int(found.max())
    if lowest < 0 or highest >= config.codebook_size:
        raise ValueError(f"`{name}` must be in [0, {config.codebook_size}), got values from {lowest} to {highest}.")
    return found


def as_tensor(value: Any) -> Any:
    """What torch makes of a user's numbers, `None` if it cannot read them."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def check_output(output_type: str, channels: int) -> None:
    """Raise a `ValueError` unless images with this number of channels can be returned in this form."""
    if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    if output_type == "pil" and channels not in (1, 3, 4):
        raise ValueError(f"`output_type` must be 'np', 'pt' or 'latent' for images of {channels} channels, got 'pil'.")


def check_generator(generator: Generators, batch_size: int) -> None:
    """Raise a `ValueError` unless there is no generator, one, or a list with one for each image."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` must be one generator or {batch_size}, one per image, got {len(generator)}.")
    for single in generator if isinstance(generator, list) else [generator]:
        if not isinstance(single, torch.Generator) and (single is not None or isinstance(generator, list)):
            raise ValueError(
                "`generator` must be a `torch.Generator`, such as `torch.Generator().manual_seed(0)`, or a list of "
                f"them, got {single!r}."
            )


def check_num_scales(name: str, value: int, num_scales: int) -> None:
    """Raise a `ValueError` that names the argument unless it is a number of scales."""
    if not is_number(value, Integral) or not 0 <= value <= num_scales:
        raise ValueError(f"`{name}` must be a number of scales from 0 to {num_scales}, got {value!r}.")
