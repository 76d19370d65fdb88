# SPDX-License-Identifier: Apache-2.0
"""Faster ways to draw the same images: compiled models, and torch's switch between the CPU's matrix libraries."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..autoencoders import VQVAEModel
from ..precision import ONEDNN_MATMUL, fp32_precision
from ..priors import VARCache, VARTransformer
from .freezing import FrozenModels, find_obstacle


class CompiledModels:
    """
    The steps of a transformer and the decoder, compiled, and the cache that the steps share from one call to the next:
    CUDA graphs read and write at the addresses that they were recorded with.

    Args:
        transformer ([`VARTransformer`]): Predicts the token maps.
        vqvae ([`VQVAEModel`]): Decodes them.
        options: Those of `torch.compile`.
    """

    def __init__(self, transformer: VARTransformer, vqvae: VQVAEModel, **options: Any):
        self.transformer, self.vqvae, self.options = transformer, vqvae, options
        # A callable for each scale, whose shapes and place in the cache are constants. They share the code of `forward`,
        # of which Dynamo makes eight graphs at most, unless each is counted by itself.
        compiled: Any = partial(torch.compile, isolate_recompiles=True, **options)
        self.steps = [compiled(transformer) for _ in transformer.config.patch_nums]
        self.decode = compiled(vqvae.decode)
        self._lent: VARCache | None = None
        # The cache and what it was made for; nothing while a call has it. Taking it out of a list is safe among threads.
        self._idle: list[tuple[VARCache | None, tuple]] = [(None, ())]
        self._made_for: tuple = ()

    def __reduce__(self) -> tuple:
        # Copied with its models, not with the functions that were made of them, which belong to the models themselves.
        return partial(type(self), **self.options), (self.transformer, self.vqvae)

    def lend(self, conditions: dict[str, torch.Tensor]) -> VARCache | None:
        """
        The cache, empty, for images of the classes `conditions`: its buffers are those of the last call if they fit. `None`
        while another call has it, in another thread or around this one. [`CompiledModels.take_back`] ends the loan.
        """
        try:
            cache, made_for = self._idle.pop()
        except IndexError:
            return None
        try:
            (classes,) = conditions.values()
            device_type = classes.device.type
            # The meta device, for one, has no autocast.
            autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
            wanted = (
                len(classes),
                classes.device,
                self.transformer.dtype,
                torch.get_autocast_dtype(device_type) if autocast else None,
                torch.is_inference_mode_enabled(),
            )
            if cache is None or made_for != wanted or cache.batch_size != len(classes):
                cache = self._make(conditions)
        except BaseException:
            self._idle.append((None, ()))
            raise
        self._lent, self._made_for = cache, wanted
        cache.reset()
        # What the graphs of the last call returned is not needed any more, that of this call stays until the next one.
        torch.compiler.cudagraph_mark_step_begin()
        return cache

    def has_lent(self, cache: VARCache) -> bool:
        """Whether `cache` is the one that is lent."""
        return cache is self._lent

    def take_back(self, cache: VARCache) -> None:
        """End a loan, whether the call succeeded or not."""
        self._lent = None
        self._idle.append((cache, self._made_for))

    @torch.no_grad()
    def _make(self, conditions: dict[str, torch.Tensor]) -> VARCache:
        cache = VARCache(self.transformer.config)
        # A step makes the buffers. One within a CUDA graph would leave them to the graph, which uses them otherwise.
        self.transformer(**conditions, past_key_values=cache)
        for layer in cache.layers:
            for buffer in (layer.keys, layer.values):  # pyright: ignore[reportAttributeAccessIssue]
                torch._dynamo.mark_static_address(buffer)  # pyright: ignore[reportArgumentType]
        return cache


class CompilationMixin(DiffusionPipeline):
    """`compile`, and the switch of CPUs."""

    _compiled: CompiledModels | FrozenModels | None = None
    _prefers_onednn = False

    def compile(self, mode: str | None = None, freezing: bool | None = None, **kwargs) -> None:
        r"""
        Compile the models: on a CPU the transformer, with its weights as constants, otherwise the transformer, a graph for
        each scale, and the decoder. Codes and images are those of the uncompiled pipeline up to rounding.

        **With `freezing`**, the first call compiles, which takes a minute for a large model, and one graph serves all
        scales but the first, and all batch sizes. A single image without guidance needs another one, and so do calls in
        inference mode and under autocast. Each graph holds a copy of the weights, until the process ends. Products of fp32
        matrices are oneDNN's, where torch was built with MKL. The decoder is run as it is: it gains little or loses. When the
        weights have changed since the first call, when they are offloaded or the transformer has got hooks, it is run as
        it is, too, and a warning says so.

        **Without**, the first call of a batch size compiles, for a large model some minutes; further ones compile nothing.
        It is meant for CUDA, where a small batch waits for its kernels to be launched. A cache of keys and values stays
        allocated between calls, for the batch size of the last one. Eight batch sizes (and guided and unguided calls, and
        scales of adapters, each count as another one) are compiled at most, further ones are run as they are. So is a
        call while another one is at work, in another thread or around it. Weights may be trained or adapted later.

        Where several scales are read at once (by [`VARImg2ImgPipeline`] and by a `refiner`), and in a `refiner`, the model
        is run as it is. The pipeline's models are not changed. Pipelines of `from_pipe` are to be compiled by themselves.
        Once a model is exchanged for another or moved to another kind of device, call this method again.

        Args:
            mode (`str`, *optional*):
                That of `torch.compile`. The default is `"reduce-overhead"` on CUDA, which replays CUDA graphs, unless
                `backend` or `options` are given.
            freezing (`bool`, *optional*):
                Whether the weights become constants. The default is to do so where they can, that is on a CPU and if
                they are neither offloaded nor quantized, and no `backend` is given.
            kwargs:
                Further arguments of `torch.compile`: `backend`, `options`, `fullgraph`.

        Raises:
            `ValueError`: If `freezing` is asked for and the weights cannot be constants.
        """
        transformer, vqvae = _unwrapped(self.transformer), _unwrapped(self.vqvae)
        obstacle = find_obstacle(transformer)
        if freezing and obstacle is not None:
            raise ValueError(
                f"`freezing=True` needs a plain transformer on the CPU, got one that does not fit: {obstacle}."
            )
        if freezing is None:
            freezing = obstacle is None and "backend" not in kwargs
        if freezing:
            self._compiled = FrozenModels(transformer, vqvae, mode=mode, **kwargs)
            return
        if mode is None and self._execution_device.type == "cuda" and not kwargs.keys() & {"backend", "options"}:
            mode = "reduce-overhead"
        self._compiled = CompiledModels(transformer, vqvae, **{"dynamic": False, "mode": mode, **kwargs})

    def enable_onednn_matmul(self) -> None:
        r"""
        Let oneDNN multiply the fp32 matrices of a CPU during calls, in place of MKL, which is slow on other CPUs than
        Intel's.

        It sets `torch.backends.mkldnn.matmul.fp32_precision` to `"bf16"` for the time of a call, which is the whole
        process' setting, and then back. The name says what else it permits: where the CPU has bf16 matrix units (AMX),
        oneDNN may round to bf16, and codes may be others. Elsewhere it computes in fp32.
        """
        self._prefers_onednn = True

    def disable_onednn_matmul(self) -> None:
        """Leave the choice of the library to torch again, see [`~VARPipeline.enable_onednn_matmul`]."""
        self._prefers_onednn = False

    def _matmul_library(self) -> AbstractContextManager[None]:
        """The setting of [`~VARPipeline.enable_onednn_matmul`], for the time of a call."""
        return fp32_precision(ONEDNN_MATMUL if self._prefers_onednn else {})

    @contextmanager
    def _cache_for(self, conditions: dict[str, torch.Tensor]) -> Iterator[VARCache]:
        """An empty cache for the transformer, for the time of a call; without `conditions` nothing will be drawn."""
        compiled = self._compiled
        if (
            compiled is None
            or compiled.transformer is not _unwrapped(self.transformer)
            or not conditions
            or (cache := compiled.lend(conditions)) is None
        ):
            yield VARCache(self.transformer.config)
            return
        try:
            yield cache
        finally:
            compiled.take_back(cache)

    def _step(self, model: VARTransformer, cache: VARCache, k: int, num_cached: int) -> Callable:
        """What computes scale `k` where the cache holds `num_cached` scales: `model` or what is compiled of it."""
        if self._compiled is None or not self._compiled.has_lent(cache) or num_cached != k:
            return model
        return self._compiled.steps[k]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1]."""
        compiled, decode = self._compiled, self.vqvae.decode
        if compiled is not None and compiled.vqvae is _unwrapped(self.vqvae):
            decode = compiled.decode
        return decode(latents=latents).sample


def _unwrapped(model: Any) -> Any:
    """The model itself, without what `torch.compile` wraps around it."""
    return getattr(model, "_orig_mod", model)
