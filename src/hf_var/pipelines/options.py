# SPDX-License-Identifier: Apache-2.0
"""The arguments that all pipelines share: their names, defaults and checks."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from numbers import Integral
from typing import Any, Literal, TypedDict, TypeVar, get_args, get_type_hints

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from transformers import LogitsProcessor, LogitsProcessorList

from ..plain_options import PLAIN_OPTIONS
from ..priors import LayerHook, TextVARConfig
from ..priors.layer_hooks import check_layer_hooks
from ..priors.modeling_blocks import BlockTransformer
from ..ranges import CheckedFields, PositiveInt
from ..scales import GUIDANCE_RULES
from .checks import (
    check_callable,
    check_flag,
    check_guidance,
    check_num_scales,
    check_temperature,
    check_top_k,
    check_top_p,
    is_number,
)
from .sampling import SMOOTH_RULES, Generators, Guidance, SamplingSettings


AnyCall = TypeVar("AnyCall", bound=Callable)
Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Callback = Callable[[Any, int, int, dict], dict | None] | PipelineCallback | MultiPipelineCallbacks

# What a checkpoint may choose for itself, in its model_index.json, and the values for one that does not.
CHECKPOINT_DEFAULTS = {"guidance_scale": 2.5, "top_p": 0.96, "temperature": 1.0}
# The official default, unless the codebook is smaller.
DEFAULT_TOP_K = 900


class FilterOptions(TypedDict, total=False):
    """How a code is sampled from its logits, see [`VARPipeline.__call__`]."""

    guidance_scale: Guidance | None
    top_k: int | Sequence[int] | None
    top_p: float | Sequence[float] | None
    temperature: float | Sequence[float] | None
    logits_processor: LogitsProcessor | LogitsProcessorList | None


class SamplingOptions(FilterOptions, total=False):
    """How the codes of whole scales are sampled, see [`VARPipeline.__call__`]."""

    smooth: bool
    refiner: BlockTransformer | None
    refiner_start: int | None
    layer_hooks: Sequence[LayerHook] | None


class TextSamplingOptions(SamplingOptions, total=False):
    """The same of a text, see [`VARTextToImagePipeline.__call__`]."""

    guidance_start: int
    guidance_end: int | None
    smooth_start: int


class ResultOptions(TypedDict, total=False):
    """What a call returns, see [`VARPipeline.__call__`]."""

    generator: Generators
    output_type: str
    return_dict: bool
    callback_on_step_end: Callback | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    num_candidates: int
    score_fn: Scores | None


class CallOptions(SamplingOptions, ResultOptions, total=False):
    """The arguments that the calls of the pipelines of a VAR transformer share, see [`VARPipeline.__call__`]."""

    prompt: str | Sequence[str] | None
    class_embeds: torch.Tensor | None
    num_images_per_label: int
    num_images_per_prompt: int


class ARCallOptions(FilterOptions, ResultOptions, total=False):
    """The arguments of [`ARPipeline.__call__`] beside the condition and the codes that are given."""

    class_embeds: torch.Tensor | None
    num_images_per_label: int
    num_images_per_prompt: int


class PromptOptions(TypedDict, total=False):
    """What is known of a text beside the text itself, see [`VARTextToImagePipeline.__call__`]."""

    negative_prompt: str | Sequence[str] | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    pooled_prompt_embeds: torch.Tensor | None
    negative_pooled_prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None
    original_size: tuple[int, int] | Sequence[tuple[int, int]] | None


class TextCallOptions(PromptOptions, TextSamplingOptions, ResultOptions, total=False):
    """The arguments that the calls of the pipelines of texts share, see [`VARTextToImagePipeline.__call__`]."""

    num_images_per_prompt: int


# `None` is the checkpoint's own value, or the pipeline's.
SAMPLING_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(PLAIN_OPTIONS),
    "smooth": False,
    "logits_processor": None,
    "refiner": None,
    "refiner_start": None,
    "layer_hooks": None,
}
# Those that only pipelines of texts have.
TEXT_SAMPLING_DEFAULTS: Mapping[str, Any] = {"guidance_start": 0, "guidance_end": None, "smooth_start": 0}


@dataclass
class CallSettings(CheckedFields):
    """The shared arguments of a call, checked: see [`VARPipeline.__call__`] for the meaning of each."""

    sampling: SamplingSettings
    class_embeds: torch.Tensor | None = None
    num_images_per_label: PositiveInt = 1
    num_images_per_prompt: PositiveInt = 1
    generator: Generators = None
    output_type: Literal["pil", "np", "pt", "latent"] = "pil"
    return_dict: bool = True
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    num_candidates: PositiveInt = 1
    score_fn: Scores | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("callback_on_step_end", "score_fn"):
            check_callable(name, getattr(self, name))
        if (self.num_candidates > 1) != (self.score_fn is not None):
            raise ValueError(
                f"`num_candidates` above 1 and `score_fn` go together, got {self.num_candidates} and {self.score_fn!r}."
            )
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_on_step_end_tensor_inputs = list(self.callback_on_step_end.tensor_inputs)

    @property
    def num_images(self) -> int:
        """Images for each label or prompt, by whichever name the pipeline has for it."""
        return self.num_images_per_label * self.num_images_per_prompt


def show_options(call: AnyCall, **own_defaults: Any) -> AnyCall:
    """Let `help` and `inspect` show the arguments behind the `**options` of a pipeline's call, with defaults of its own."""
    signature = inspect.signature(call)
    own = [entry for entry in signature.parameters.values() if entry.kind is not inspect.Parameter.VAR_KEYWORD]
    defaults = {**SAMPLING_DEFAULTS, **TEXT_SAMPLING_DEFAULTS}
    defaults |= dict.fromkeys(["prompt", *PromptOptions.__optional_keys__])
    defaults |= {entry.name: entry.default for entry in fields(CallSettings)} | own_defaults
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in get_type_hints(get_args(call.__annotations__["options"])[0]).items()
    ]
    call.__signature__ = signature.replace(parameters=[*own, *shared])  # pyright: ignore[reportFunctionMemberAccess]
    return call


def check_names(function: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise a `TypeError` as Python does for arguments of a function that are not among the `known` ones."""
    for name in set(names) - set(known):
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(sorted(known))}."
        raise TypeError(f"`{function}` got an unexpected keyword argument {name!r}; {hint}")


def resolve_call(
    known: Collection[str], tokenizer: Any, defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> CallSettings:
    """
    Check the `options` of a call, which must be among the `known` ones; `defaults` are the checkpoint's, for those that are
    `None`. The configuration of the `tokenizer` says how many codes and scales there are.
    """
    check_names("__call__", options, known)
    names = [name for name in ("num_images_per_label", "num_images_per_prompt") if name in options]
    if len(names) > 1:
        raise ValueError(f"Pass one of `{names[0]}` and `{names[1]}`, which mean the same, not both.")
    of_sampling = SAMPLING_DEFAULTS.keys() | TEXT_SAMPLING_DEFAULTS.keys()
    sampling: Any = {name: options[name] for name in of_sampling & options.keys()}
    others: Any = {name: options[name] for name in options.keys() - of_sampling}
    return CallSettings(resolve_sampling(tokenizer, defaults, sampling), **others)


def resolve_sampling(tokenizer: Any, defaults: Mapping[str, Any], options: TextSamplingOptions) -> SamplingSettings:
    """Check the arguments of sampling, with `defaults` in place of `None`, and resolve them to one value per scale."""
    num_scales = len(tokenizer.patch_nums)
    values: dict[str, Any] = {**SAMPLING_DEFAULTS, **TEXT_SAMPLING_DEFAULTS, **options}
    for name in CHECKPOINT_DEFAULTS:
        values[name] = float(defaults[name]) if values[name] is None else values[name]
    if values["top_k"] is None:
        values["top_k"] = min(defaults.get("top_k", DEFAULT_TOP_K), tokenizer.codebook_size)
    check_guidance(values["guidance_scale"])
    checks = {
        "top_k": partial(check_top_k, tokenizer.codebook_size),
        "top_p": check_top_p,
        "temperature": check_temperature,
    }
    for name, check in checks.items():
        values[name] = _per_scale(name, values[name], num_scales, check)
    processor = values["logits_processor"]
    if processor is not None:
        processors = processor if isinstance(processor, LogitsProcessorList) else LogitsProcessorList([processor])
        # transformers reads the signature of the class's `__call__`, which plain functions do not have.
        if not all(isinstance(single, LogitsProcessor) for single in processors):
            raise ValueError(f"`logits_processor` must be a `LogitsProcessor`, got {processor!r}.")
        values["logits_processor"] = processors
    values["refiner_start"] = _refiner_start(values["refiner"], values["refiner_start"], num_scales)
    rule = values["smooth_rule"] = defaults.get("smooth_rule", SMOOTH_RULES[0])
    values["guidance_rule"] = defaults.get("guidance_rule", GUIDANCE_RULES[0])
    values["smooth"] = _smooth_scales(values, values.pop("smooth_start"), rule, num_scales)
    return SamplingSettings(**values)


def _smooth_scales(values: Mapping[str, Any], start: Any, rule: str, num_scales: int) -> list[bool]:
    """Which scales mix code vectors: from `start` on, by Switti's rule while there is guidance only."""
    check_flag("smooth", values["smooth"])
    for name, number in {"guidance_start": values["guidance_start"], "smooth_start": start}.items():
        check_num_scales(name, number, num_scales)
    end = values["guidance_end"]
    if end is not None:
        check_num_scales("guidance_end", end, num_scales)
    last = num_scales if end is None or rule == SMOOTH_RULES[0] else end
    return [values["smooth"] and start <= k < last for k in range(num_scales)]


def _per_scale(name: str, value: Any, num_scales: int, check: Callable[[Any], None]) -> list:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    values = list(value) if is_list else [value] * num_scales
    for entry in values:
        check(entry)
    if len(values) != num_scales:
        raise ValueError(f"`{name}` must be one value or {num_scales}, one per scale, got {len(values)}.")
    return values


def _refiner_start(refiner: BlockTransformer | None, start: int | None, num_scales: int) -> int:
    if refiner is None:
        if start is not None:
            raise ValueError(f"`refiner_start` = {start!r} needs a `refiner`.")
        return num_scales
    if start is None or not is_number(start, Integral) or not 0 <= start < num_scales:
        raise ValueError(f"`refiner_start` must be a scale from 0 to {num_scales - 1}, got {start!r}.")
    return int(start)


def check_layers(transformer: BlockTransformer, settings: SamplingSettings) -> None:
    """Raise a `ValueError` unless refiner and hooks of the layers, where there are any, fit the `transformer`."""
    check_refiner(transformer, settings.refiner)
    for model in (transformer, settings.refiner):
        if model is not None:
            check_layer_hooks(settings.layer_hooks, model.config)


def check_refiner(transformer: BlockTransformer, refiner: BlockTransformer | None) -> None:
    """Raise a `ValueError` unless there is no refiner, or one that predicts the same codes of the same condition."""
    if refiner is None:
        return
    names = ["codebook_size", "latent_channels", "patch_nums", "num_labels"]
    if isinstance(transformer.config, TextVARConfig):
        names += ["cross_attention_dim", "pooled_projection_dim", "crop_conditioning", "learned_empty_text"]
    else:
        names += ["block_sizes"]
    for name in [*names, "model_type"]:
        ours = getattr(transformer.config, name)
        theirs = getattr(getattr(refiner, "config", None), name, None)
        if ours != theirs:
            raise ValueError(
                f"`refiner` must be a transformer like the pipeline's: {name} is {ours} there, got {theirs}."
            )
