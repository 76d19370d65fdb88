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
        self.lent: VARCache | None = None
        # The cache and what it was made for; nothing while a call has it. Taking it out of a list is safe among threads.
        self._idle: list[tuple[VARCache | None, tuple]] = [(None, ())]
        self._made_for: tuple = ()

    def __reduce__(self) -> tuple:
        # Copied with its models, not with the functions that were made of them, which belong to the models themselves.
        return _recompiled, (self.transformer, self.vqvae, self.options)

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
        self.lent, self._made_for = cache, wanted
        cache.reset()
        # What the graphs of the last call returned is not needed any more, that of this call stays until the next one.
        torch.compiler.cudagraph_mark_step_begin()
        return cache

    def take_back(self, cache: VARCache) -> None:
        """End a loan, whether the call succeeded or not."""
        self.lent = None
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


def _recompiled(transformer: VARTransformer, vqvae: VQVAEModel, options: dict[str, Any]) -> CompiledModels:
    return CompiledModels(transformer, vqvae, **options)


class CompilationMixin(DiffusionPipeline):
    """`compile`, and the switch of CPUs."""

    _compiled: CompiledModels | None = None
    _prefers_onednn = False

    def compile(self, mode: str | None = None, **kwargs) -> None:
        r"""
        Compile the steps of the transformer, a graph for each scale, and the decoder. The first call of a batch size
        takes the time that it needs, for a large model minutes; further ones compile nothing.

        It is meant for CUDA, where a small batch waits for its kernels to be launched. Codes and images are those of the
        uncompiled pipeline up to rounding. A cache of keys and values stays allocated between calls, for the batch size
        of the last one. Where several scales are read at once (by [`VARImg2ImgPipeline`] and by a `refiner`), and in a
        `refiner`, the model is run as it is.

        Eight batch sizes (and guided and unguided calls, and scales of adapters, each count as another one) are compiled at
        most, further ones are run as they are. So is a call while another one is at work, in another thread or around it.

        The pipeline's models are not changed, and their weights may be trained or adapted later. Pipelines of `from_pipe`
        are to be compiled by themselves. Once a model is
        exchanged for another or moved to another kind of device, call this method again.

        Args:
            mode (`str`, *optional*):
                That of `torch.compile`. The default is `"reduce-overhead"` on CUDA, which replays CUDA graphs, unless
                `backend` or `options` are given.
            kwargs:
                Further arguments of `torch.compile`: `backend`, `options`, `fullgraph`.
        """
        if mode is None and self._execution_device.type == "cuda" and not kwargs.keys() & {"backend", "options"}:
            mode = "reduce-overhead"
        options = {"dynamic": False, "mode": mode, **kwargs}
        self._compiled = CompiledModels(_unwrapped(self.transformer), _unwrapped(self.vqvae), **options)

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
        cache = None
        if compiled is not None and compiled.transformer is _unwrapped(self.transformer) and conditions:
            cache = compiled.lend(conditions)
        if cache is None or compiled is None:
            yield VARCache(self.transformer.config)
            return
        try:
            yield cache
        finally:
            compiled.take_back(cache)

    def _step(self, model: VARTransformer, cache: VARCache, k: int, num_cached: int) -> Callable:
        """What computes scale `k` where the cache holds `num_cached` scales: `model` or what is compiled of it."""
        if self._compiled is None or cache is not self._compiled.lent or num_cached != k:
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
