# SPDX-License-Identifier: Apache-2.0
"""Compiled forms of a pipeline's models, which sample the same images faster."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor_config
from diffusers.utils import logging

from ..autoencoders import VQVAEModel
from ..priors import VARCache, VARTransformerOutput
from ..priors.modeling_blocks import BlockTransformer


logger = logging.get_logger(__name__)

# What is written through `.data`, as PEFT's merging and diffusers' average do, changes neither address nor version.
NUM_SAMPLED_VALUES = 64


class CompiledModels:
    """
    A graph for each scale, and one for the decoder. CUDA graphs read and write at the addresses that they were recorded
    with, so the cache stays from one call to the next.
    """

    def __init__(self, transformer: BlockTransformer, vqvae: VQVAEModel, **options: Any):
        self.transformer, self.vqvae, self.options = transformer, vqvae, options
        # Shapes and the place in the cache are constants of a scale. The scales share the code of `forward`, of which
        # Dynamo makes eight graphs at most, unless each is counted by itself.
        compiled: Any = partial(torch.compile, isolate_recompiles=True, **options)
        self.steps: list[Callable] = [compiled(transformer) for _ in transformer.config.patch_nums]
        self.decode = compiled(vqvae.decode)
        self._cache: VARCache | None = None
        self._made_for: tuple = ()
        self._in_use = threading.Lock()

    def __reduce__(self) -> tuple:
        # Copies contain the models, but not the compiled functions, which are bound to the original models.
        return partial(type(self), **self.options), (self.transformer, self.vqvae)

    @contextmanager
    def cache(self, condition: Mapping[str, torch.Tensor]) -> Iterator[VARCache | None]:
        """The cache, empty, for a call with this `condition`; `None` while another call has it."""
        if not self._in_use.acquire(blocking=False):
            yield None
            return
        try:
            example = next(iter(condition.values()))
            autocast = torch.is_autocast_enabled(example.device.type)
            dtype = torch.get_autocast_dtype(example.device.type) if autocast else self.transformer.dtype
            wanted = (len(example), example.device, dtype, torch.is_inference_mode_enabled())
            # Its batch is halved where guidance has ended before the last scale.
            if self._cache is None or self._made_for != wanted or self._cache.batch_size != len(example):
                self._cache, self._made_for = self._make(condition), wanted
            self._cache.reset()
            # Outputs of the last call's graphs are no longer needed; those of this call are valid until the next one.
            torch.compiler.cudagraph_mark_step_begin()
            yield self._cache
        finally:
            self._in_use.release()

    @torch.no_grad()
    def _make(self, condition: Mapping[str, torch.Tensor]) -> VARCache:
        cache = VARCache(self.transformer.config)
        # A step makes the buffers. One within a CUDA graph would leave them to the graph, which uses them otherwise.
        self.transformer(**condition, cache=cache)
        for buffer in _buffers(cache):
            torch._dynamo.mark_static_address(buffer)
        return cache


class FrozenModels:
    """
    The transformer for CPUs, with its weights as constants (torch's "freezing"): oneDNN arranges them once as it will read
    them, and Inductor fuses what lies around the products. Each graph holds a copy of the weights, so a single one serves
    any number of tokens and images. The decoder is not compiled, because it gains little or gets slower.
    """

    def __init__(self, transformer: BlockTransformer, vqvae: VQVAEModel, **options: Any):
        self.transformer, self.vqvae, self.options = transformer, vqvae, options
        # The first scale reads its own weights, those of AdaLN, for a single token.
        self.steps: list[Callable] = [transformer, *[self._step] * (len(transformer.config.patch_nums) - 1)]
        self.decode: Any = vqvae.decode
        self._predict = torch.compile(transformer.predict, **{"dynamic": True, "isolate_recompiles": True, **options})
        self._weights: list[tuple] | None = None
        self._has_warned = False

    __reduce__ = CompiledModels.__reduce__

    @torch.no_grad()
    def cache(self, condition: Mapping[str, torch.Tensor]) -> AbstractContextManager[VARCache | None]:
        """An empty cache; `None`, with a warning, once the transformer has changed since the graph was made."""
        obstacle = find_obstacle(self.transformer)
        if obstacle is None:
            weights = _describe(self.transformer)
            self._weights = self._weights or weights
            if weights != self._weights:
                # Not compiled anew at once: torch keeps the old graph, and with it its copy of the weights.
                obstacle = "its weights have changed"
        if obstacle is not None and not self._has_warned:
            logger.warning(f"The transformer is run as it is until `compile()` is called again: {obstacle}.")
        self._has_warned = obstacle is not None
        return nullcontext(VARCache(self.transformer.config) if obstacle is None else None)

    def _step(self, scale_inputs: torch.Tensor, cache: VARCache) -> VARTransformerOutput:
        """What the transformer itself returns for a block after the first one, without its checks."""
        inputs = self.transformer.embed(None, scale_inputs, cache.get_seq_length(), scale_inputs.shape[1])
        _mark_sizes(inputs, cache)
        # For this thread and step. Among the `options` Inductor would see it, but not Dynamo, which decides what is constant.
        with inductor_config.patch(freezing=True):
            logits = self._predict(**inputs, cache=cache)
        return VARTransformerOutput(logits=logits, cache=cache)


def compile_models(
    transformer: BlockTransformer, vqvae: VQVAEModel, freezing: bool | None, on_cuda: bool, **options: Any
) -> CompiledModels | FrozenModels:
    """The compiled form that suits the device, see [`~VARPipeline.compile`]."""
    transformer, vqvae = unwrapped(transformer), unwrapped(vqvae)
    obstacle = find_obstacle(transformer)
    if freezing and obstacle is not None:
        raise ValueError(
            f"`freezing=True` needs a plain transformer on the CPU, got one that does not fit: {obstacle}."
        )
    if freezing or (freezing is None and obstacle is None and "backend" not in options):
        return FrozenModels(transformer, vqvae, **options)
    if on_cuda and options.get("mode") is None and not options.keys() & {"backend", "options"}:
        options["mode"] = "reduce-overhead"
    return CompiledModels(transformer, vqvae, **{"dynamic": False, **options})


def unwrapped(model: Any) -> Any:
    """The model itself, without what `torch.compile` wraps around it."""
    return getattr(model, "_orig_mod", model)


def find_obstacle(transformer: BlockTransformer) -> str | None:
    """Why the weights of `transformer` cannot be constants of a graph; `None` if they can."""
    tensors = [tensor.detach() for tensor in (*transformer.parameters(), *transformer.buffers())]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "its weights are not all on the CPU"
    if any(type(tensor) is not torch.Tensor for tensor in tensors):
        return "it is quantized"
    # The graph begins after the embeddings, so hooks of the model itself would not run.
    if "forward" in vars(transformer) or transformer._forward_hooks or transformer._forward_pre_hooks:
        return "it has hooks"
    return None


def _describe(transformer: BlockTransformer) -> list[tuple]:
    """What changes with the weights of the graph: addresses, torch's counts of changes, and some of the values."""
    parts = (transformer.layers, transformer.head_norm, transformer.head)
    return [
        (
            tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
            tensor.dtype,
            # Odd steps, so that the values lie in many columns.
            tensor.flatten()[:: tensor.numel() // NUM_SAMPLED_VALUES | 1].tolist(),
        )
        for part in parts
        for tensor in (*part.parameters(), *part.buffers())
    ]


def _buffers(cache: VARCache) -> list[torch.Tensor]:
    """Keys and values of the tokens; where a layer only counts them, there are none."""
    layers: Any = cache.layers
    return [buffer for layer in layers for buffer in (layer.keys, layer.values) if buffer is not None]


def _mark_sizes(inputs: Mapping[str, Any], cache: VARCache) -> None:
    """
    Mark the sizes that vary, tokens and images. Otherwise Dynamo assumes that equal sizes stay equal, such as four images
    and four tokens, and makes another graph when they differ.
    """
    hidden_states, angles = inputs["hidden_states"], inputs.get("position_embeddings", ())
    text = [states for pair in cache.cross_attention.values() for states in pair]
    text += [] if cache.cross_mask is None else [cache.cross_mask]
    per_image = (hidden_states, *_buffers(cache), *cache.modulations.values(), *text)
    for tensor, dim in [(hidden_states, 1), *((each, 0) for each in angles), *((each, 0) for each in per_image)]:
        # A graph for a single one is always another.
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
