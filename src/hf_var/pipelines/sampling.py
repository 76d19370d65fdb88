# SPDX-License-Identifier: Apache-2.0
"""From logits to codes: guidance, filters and sampling as functions of tensors, and the object that applies them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional
from transformers import LogitsProcessorList

from ..priors import LayerHook
from ..priors.modeling_blocks import BlockTransformer
from ..ranges import CheckedFields, OneOf
from ..scales import GUIDANCE_RULES
from .checks import is_number


# How code vectors are mixed: VAR filters the logits and draws codes besides, Switti does neither.
SMOOTH_RULES = ("filtered", "plain")
SmoothRule = Annotated[str, OneOf(*SMOOTH_RULES)]
GuidanceRule = Annotated[str, OneOf(*GUIDANCE_RULES)]
Generators = torch.Generator | list[torch.Generator] | None
Guidance = float | Callable[[int, int], float]


@dataclass
class SamplingSettings(CheckedFields):
    """How codes are sampled, with one value per scale: see [`VARPipeline.__call__`] for the meaning of each."""

    guidance_scale: Guidance
    top_k: list[int]
    top_p: list[float]
    temperature: list[float]
    smooth: list[bool]
    logits_processor: LogitsProcessorList | None
    refiner: BlockTransformer | None
    refiner_start: int
    layer_hooks: Sequence[LayerHook] | None = None
    guidance_start: int = 0
    guidance_end: int | None = None
    smooth_rule: SmoothRule = "filtered"
    guidance_rule: GuidanceRule = "linear"

    def last_guided_scale(self, num_scales: int) -> int:
        """The last scale for which the unconditional half is computed, -1 if there is none."""
        return last_guided_scale(self.guidance_scale, num_scales, self.guidance_start, self.guidance_end)


class Sampler:
    """Samples the codes of one scale after the other from guided logits."""

    def __init__(self, settings: SamplingSettings, generator: Generators, num_scales: int):
        self.settings, self.generator, self.num_scales = settings, generator, num_scales
        self._previous_logits: torch.Tensor | None = None

    def draw(
        self, logits: torch.Tensor, k: int, codes: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes `(batch, length)` of scale `k` and, if `smooth`, weights of all code vectors in place of each code."""
        settings = self.settings
        if settings.logits_processor is not None:
            guided_logits = logits
            logits = process_logits(settings.logits_processor, codes, logits, k, self._previous_logits)
            self._previous_logits = guided_logits
        logits = logits / settings.temperature[k]
        if settings.smooth[k] and settings.smooth_rule == "plain":
            weights = smooth_weights(logits, k, self.num_scales, self.generator)
            return weights.argmax(dim=-1), weights
        logits = filter_logits(logits, settings.top_k[k], settings.top_p[k])
        drawn = draw_codes(logits, self.generator)
        weights = smooth_weights(logits, k, self.num_scales, self.generator) if settings.smooth[k] else None
        return drawn, weights


def last_guided_scale(guidance_scale: Guidance, num_scales: int, start: int = 0, end: int | None = None) -> int:
    """
    The last scale whose weight is not 1, -1 if there is none: until then, the unconditional half is computed. Guidance
    is off before the scale `start` and from `end` on.
    """
    end = num_scales if end is None else end
    if not callable(guidance_scale):
        # A callback may change it.
        return end - 1 if guidance_scale != 1 and start < end else -1
    weights = [guidance_scale(k, num_scales) for k in range(num_scales)]
    for k, weight in enumerate(weights):
        if not is_number(weight):
            raise ValueError(f"`guidance_scale` must return a finite number, got {weight!r} for ({k}, {num_scales}).")
    return max((k for k, weight in enumerate(weights) if weight != 1 and start <= k < end), default=-1)


def guidance_weight(
    guidance_scale: Guidance,
    k: int,
    num_scales: int,
    start: int = 0,
    end: int | None = None,
    rule: GuidanceRule = "linear",
) -> float:
    """
    Weight of the conditional logits at scale `k`: it grows linearly from 1, no guidance, to `guidance_scale`, since
    the coarse scales decide on the composition and suffer from guidance (Tian et al. 2024, official code); by the rule
    "constant" it is `guidance_scale` from the first one on; or it is what `guidance_scale(k, num_scales)` returns. Before
    the scale `start` and from `end` on it is 1.
    """
    if k < start or (end is not None and k >= end):
        return 1.0
    if callable(guidance_scale):
        return guidance_scale(k, num_scales)
    depth = k / (num_scales - 1) if num_scales > 1 and rule == "linear" else 1.0
    return 1 + (guidance_scale - 1) * depth


def apply_guidance(logits: torch.Tensor, weight: float) -> torch.Tensor:
    """
    Classifier-free guidance (Ho and Salimans 2022) of conditional logits with unconditional ones behind them, `(2 * batch,
    length, codebook_size)`; a `weight` of 1 is off.
    """
    conditional, unconditional = logits.chunk(2)
    return conditional if weight == 1 else weight * conditional + (1 - weight) * unconditional


def process_logits(
    processors: LogitsProcessorList,
    codes: list[torch.Tensor],
    logits: torch.Tensor,
    k: int,
    previous_logits: torch.Tensor | None,
) -> torch.Tensor:
    """
    Guided logits `(batch, length, codebook_size)` of scale `k` as `processors` leave them, which see every token as a row of
    its own, the `codes` and the guided logits of the scales before: see [`VARPipeline.__call__`].
    """
    batch_size, length, codebook_size = logits.shape
    known = torch.cat(codes, dim=1) if codes else torch.empty(batch_size, 0, dtype=torch.long, device=logits.device)
    processed = processors(
        known.repeat_interleave(length, dim=0),  # pyright: ignore[reportArgumentType]
        logits.flatten(0, 1),
        scale=k,
        previous_logits=previous_logits,
    )
    shape = (batch_size * length, codebook_size)
    if not isinstance(processed, torch.Tensor) or processed.shape != shape:
        got = tuple(processed.shape) if isinstance(processed, torch.Tensor) else type(processed).__name__
        raise ValueError(f"`logits_processor` must return scores of the shape {shape}, got {got}.")
    return processed.view(batch_size, length, codebook_size)


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """
    Set all but the `top_k` largest logits to minus infinity, then of these all but the smallest set that holds the
    probability `top_p` (Holtzman et al. 2020).

    The result is that of transformers' top-k and top-p warpers, one after the other, which sort the whole codebook;
    here only the `top_k` survivors are sorted.

    Args:
        logits (`torch.Tensor` of shape `(..., codebook_size)`): Logits, not changed.
        top_k (`int`): 0 switches this filter off. Codes as likely as the last one kept stay, too.
        top_p (`float`): 0 and 1 switch this filter off. The most likely code always stays.
    """
    codebook_size = logits.shape[-1]
    filters_by_k = 0 < top_k < codebook_size
    filters_by_p = 0 < top_p < 1
    if not filters_by_k and not filters_by_p:
        return logits
    largest = logits.topk(top_k if filters_by_k else codebook_size, dim=-1).values  # descending
    kept = logits >= largest[..., -1:]
    if filters_by_p:
        log_total = logits.where(kept, -torch.inf).logsumexp(dim=-1, keepdim=True)
        probabilities = (largest - log_total).exp()
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        num_needed = (mass_before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
        boundary = largest.gather(-1, num_needed - 1)
        # Of several codes with the boundary's logit only as many stay as the probability needs, the last ones.
        tied = logits == boundary
        mass_above = (probabilities * (largest > boundary)).sum(dim=-1, keepdim=True)
        num_tied_kept = ((top_p - mass_above) / (boundary - log_total).exp()).ceil().clamp(min=1)
        num_tied_dropped = tied.sum(dim=-1, keepdim=True) - num_tied_kept
        kept = (logits > boundary) | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) > num_tied_dropped))
    return logits.where(kept, -torch.inf)


def draw_codes(logits: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """
    Sample a code for every token from filtered logits `(batch, length, codebook_size)`, with one multinomial call per
    scale, or per image with a list of generators, which may be on another device.

    The codes are those of `torch.multinomial`, which waits for an accelerator to check its input: the most probable code
    after a division by exponential noise (of exponential variables, the one with the highest rate is the first with
    that rate's share as its probability). On a CPU, a `ValueError` if a logit is not a number; elsewhere the comparison
    would wait for the device.
    """
    probabilities = functional.softmax(logits, dim=-1)
    if probabilities.device.type == "cpu" and not probabilities.sum(dtype=torch.float32).isfinite():
        raise ValueError("`logits` must be numbers, got nan: half precision may have overflowed in the transformer.")
    return (probabilities / _exponential(probabilities, generator)).argmax(dim=-1)


def _exponential(like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Exponential noise in the shape of `like`, from a generator on any device, or from one for each image."""
    if isinstance(generator, list):
        return torch.cat([_exponential(image, single) for image, single in zip(like.split(1), generator, strict=True)])
    device = like.device if generator is None else generator.device
    noise = torch.empty(like.shape, dtype=like.dtype, device=device).exponential_(generator=generator)
    # A non-blocking copy to the CPU may be read before it has finished.
    return noise.to(like.device, non_blocking=like.device.type != "cpu")


def smooth_weights(logits: torch.Tensor, k: int, num_scales: int, generator: Generators = None) -> torch.Tensor:
    """
    Weights `(batch, length, codebook_size)` for a mixture of code vectors in place of a single one, by the Gumbel softmax
    (Jang et al. 2017) of filtered logits: sharper and cooler with the scale `k`. Official `more_smooth`, for images to
    look at rather than for metrics.
    """
    depth = k / (num_scales - 1) if num_scales > 1 else 1.0
    temperature = max(0.27 * (1 - 0.95 * depth), 0.005)
    noise = -_exponential(logits, generator).log()
    return functional.softmax((logits * (1 + depth) + noise) / temperature, dim=-1)
