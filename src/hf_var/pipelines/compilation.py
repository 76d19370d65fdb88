# SPDX-License-Identifier: Apache-2.0
"""Faster ways to draw the same images: compiled models, and torch's switch between the CPU's matrix libraries."""

from collections.abc import Callable
from contextlib import AbstractContextManager
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

    def __init__(self, transformer: VARTransformer, vqvae: VQVAEModel, **options):
        self.transformer, self.vqvae = transformer, vqvae
        # A callable for each scale, whose shapes and place in the cache are constants. They share the code of `forward`,
        # of which Dynamo makes eight graphs at most, unless each is counted by itself.
        self.steps = [
            torch.compile(transformer, isolate_recompiles=True, **options)  # pyright: ignore[reportCallIssue]
            for _ in transformer.config.patch_nums
        ]
        self.decode = torch.compile(vqvae.decode, isolate_recompiles=True, **options)  # pyright: ignore[reportCallIssue]
        self.cache: VARCache | None = None
        self.made_for: tuple = ()

    @torch.no_grad()
    def empty_cache(self, conditions: dict[str, torch.Tensor]) -> VARCache:
        """A cache for images of the classes `conditions`, whose buffers are those of the last call wherever they fit."""
        (classes,) = conditions.values()
        device_type = classes.device.type
        # The meta device, for one, has no autocast.
        autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        made_for = (len(classes), classes.device, self.transformer.dtype, autocast)
        if self.cache is None or self.cache.batch_size != len(classes) or self.made_for != made_for:
            self.cache, self.made_for = VARCache(self.transformer.config), made_for
            # A step makes the buffers. One within a CUDA graph would leave them to the graph, which uses them otherwise.
            self.transformer(**conditions, past_key_values=self.cache)
            for layer in self.cache.layers:
                torch._dynamo.mark_static_address(layer.keys)  # pyright: ignore[reportAttributeAccessIssue]
                torch._dynamo.mark_static_address(layer.values)  # pyright: ignore[reportAttributeAccessIssue]
        self.cache.reset()
        # What the graphs of the last call returned is not needed any more, that of this call stays until the next one.
        torch.compiler.cudagraph_mark_step_begin()
        return self.cache


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

        The pipeline's models are not changed, and their weights may be trained or adapted later. Once a model is
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

    def _empty_cache(self, conditions: dict[str, torch.Tensor]) -> VARCache:
        """A cache for the transformer; without `conditions` nothing will be drawn."""
        if self._compiled is None or self._compiled.transformer is not _unwrapped(self.transformer) or not conditions:
            return VARCache(self.transformer.config)
        return self._compiled.empty_cache(conditions)

    def _step(self, model: VARTransformer, cache: VARCache, k: int, num_cached: int) -> Callable:
        """What computes scale `k` where the cache holds `num_cached` scales: `model` or what is compiled of it."""
        if self._compiled is None or cache is not self._compiled.cache or num_cached != k:
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
