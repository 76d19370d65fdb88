# SPDX-License-Identifier: Apache-2.0
"""The arguments that all pipelines share: checked, and resolved to one value per scale."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..priors import VARTransformer
from .sampling import Generators


# The official default, unless the codebook is smaller.
DEFAULT_TOP_K = 900

Guidance = float | Callable[[int, int], float]


@dataclass
class SamplingSettings:
    """
    How codes are drawn, see [`VARPipeline.__call__`].

    Args:
        guidance_scale (`float` or `Callable`): A number, or the weight of each scale.
        top_k (`list[int]`): Of each scale; 0 for all codes.
        top_p (`list[float]`): Of each scale; 0 and 1 for all codes.
        temperature (`list[float]`): Of each scale.
        smooth (`bool`): Whether code vectors are mixed.
        logits_processor (`LogitsProcessorList`, *optional*): Sees the guided logits of each scale.
        refiner ([`VARTransformer`], *optional*): Takes over from the first model.
        refiner_start (`int`): First scale of the refiner.
    """

    guidance_scale: Guidance
    top_k: list[int]
    top_p: list[float]
    temperature: list[float]
    smooth: bool = False
    logits_processor: LogitsProcessorList | None = None
    refiner: VARTransformer | None = None
    refiner_start: int = 0


def resolve_settings(
    transformer: VARTransformer,
    defaults: Mapping[str, Any],
    guidance_scale: Guidance | None,
    top_k: int | Sequence[int] | None,
    top_p: float | Sequence[float] | None,
    temperature: float | Sequence[float] | None,
    smooth: bool,
    logits_processor: LogitsProcessor | LogitsProcessorList | None,
    refiner: VARTransformer | None,
    refiner_start: int | None,
) -> SamplingSettings:
    """
    Check the arguments of a call about drawing, and put `defaults` (`guidance_scale`, `top_p`, `temperature`) in place of
    `None`.

    Raises:
        `ValueError`: If one is out of range.
    """
    config = transformer.config
    num_scales = len(config.patch_nums)
    guidance_scale = float(defaults["guidance_scale"]) if guidance_scale is None else guidance_scale
    top_p = float(defaults["top_p"]) if top_p is None else top_p
    temperature = float(defaults["temperature"]) if temperature is None else temperature
    top_k = min(DEFAULT_TOP_K, config.codebook_size) if top_k is None else top_k
    check_guidance(guidance_scale)
    for value in _values(top_k):
        if not is_number(value, Integral) or not 0 <= value <= config.codebook_size:
            raise ValueError(
                f"`top_k` must be from 1 to codebook_size={config.codebook_size}, 0 for all codes or `None` for the "
                f"default, got {top_k!r}."
            )
    for value in _values(top_p):
        check_top_p(value)
    for value in _values(temperature):
        check_temperature(value)
    if logits_processor is not None and not isinstance(logits_processor, LogitsProcessorList):
        # transformers reads the signature of the class's `__call__`, which plain functions do not have.
        if not isinstance(logits_processor, LogitsProcessor):
            raise ValueError(f"`logits_processor` must be a `LogitsProcessor`, got {logits_processor!r}.")
        logits_processor = LogitsProcessorList([logits_processor])
    return SamplingSettings(
        guidance_scale=guidance_scale,
        top_k=_per_scale("top_k", top_k, num_scales),
        top_p=_per_scale("top_p", top_p, num_scales),
        temperature=_per_scale("temperature", temperature, num_scales),
        smooth=smooth,
        logits_processor=logits_processor,
        refiner=refiner,
        refiner_start=_check_refiner(transformer, refiner, refiner_start, num_scales),
    )


def is_number(value: Any, kind: type[Real] = Real) -> bool:
    """Whether `value` is a finite number, Python's or numpy's."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def check_guidance(guidance_scale: Any) -> None:
    """Raise a `ValueError` unless it is a finite number or a callable."""
    if not callable(guidance_scale) and not is_number(guidance_scale):
        raise ValueError(
            f"`guidance_scale` must be a finite number, 1 for no guidance, or a callable of (k, K), got {guidance_scale!r}."
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


def check_output(output_type: str, channels: int) -> None:
    """Raise a `ValueError` unless images of so many channels can be returned in this form."""
    if output_type not in ("pil", "np", "pt", "latent"):
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


def _values(value: Any) -> list:
    return list(value) if _is_list(value) else [value]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _per_scale(name: str, value: Any, num_scales: int) -> list:
    if not _is_list(value):
        return [value] * num_scales
    if len(value) != num_scales:
        raise ValueError(f"`{name}` must be one value or {num_scales}, one per scale, got {len(value)}.")
    return list(value)


def _check_refiner(
    transformer: VARTransformer, refiner: VARTransformer | None, start: int | None, num_scales: int
) -> int:
    if refiner is None:
        if start is not None:
            raise ValueError(f"`refiner_start` = {start!r} needs a `refiner`.")
        return num_scales
    if start is None or not is_number(start, Integral) or not 0 <= start < num_scales:
        raise ValueError(f"`refiner_start` must be a scale from 0 to {num_scales - 1}, got {start!r}.")
    for field in ("codebook_size", "latent_channels", "patch_nums", "num_labels", "block_sizes"):
        ours = getattr(transformer.config, field)
        theirs = getattr(getattr(refiner, "config", None), field, None)
        if ours != theirs:
            raise ValueError(
                f"`refiner` must be a transformer like the pipeline's: {field} is {ours} there, got {theirs}."
            )
    return int(start)
