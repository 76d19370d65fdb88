# SPDX-License-Identifier: Apache-2.0
"""The ways to draw images that `sampling.py` compares, by name."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hf_var import VARPipeline, VARTransformer, VQVAEModel

from .clock import Timed, Unavailable, timed
from .models import make_transformer, make_vqvae, onednn_matmul, transformer_fields, vqvae_fields
from .peers import draw_dit, draw_raster, make_dit, make_raster
from .plain_var import PlainVAR
from .plain_vqvae import PlainVQVAE
from .report import is_half


# A name says who draws, then how: with torch's oneDNN switch or, of ours, without it; in bf16, or with the decoder alone in
# bf16; compiled.
VAR_VARIANTS = ["plain", "plain_onednn", "plain_bf16", "ours", "ours_mkl", "ours_compiled"]
VAR_VARIANTS += ["ours_bf16_decoder", "ours_bf16_decoder_compiled", "ours_bf16", "ours_bf16_compiled"]
DIT_STEPS = (25, 250)
PEER_VARIANTS = [
    f"{peer}{mode}"
    for peer in ("raster", *(f"{dit}_{steps}" for dit in ("dit", "dit_xl") for steps in DIT_STEPS))
    for mode in ("", "_onednn", "_bf16")
]
ALL_VARIANTS = VAR_VARIANTS + PEER_VARIANTS
# Peers in what makes them fastest on a CPU, and once as they are.
CPU_PEERS = ["raster", "raster_onednn", "raster_bf16", "dit_25_onednn", "dit_250_onednn", "dit_xl_25"]
CPU_PEERS += ["dit_xl_25_onednn", "dit_xl_250_onednn", "dit_xl_25_bf16"]
GPU_PEERS = [name for name in PEER_VARIANTS if name.endswith("_bf16")]

GUIDANCE_SCALE, TOP_K, TOP_P = 2.5, 900, 0.96
SEED = 0


def decoder_dtype(name: str) -> torch.dtype:
    """Of the decoder of a variant."""
    return torch.bfloat16 if "bf16" in name else torch.float32


class Samplers:
    """
    Makes the variants; models are made once, when a variant needs them.

    Args:
        model (`str`): Size of the transformer.
        device (`torch.device`): Where they are.
        peer_steps (`int`, *optional*): DiT's steps that are measured; `None` for all.
        peer_tokens (`int`, *optional*): Raster tokens that are measured at three positions each; `None` for all.
    """

    def __init__(self, model: str, device: torch.device, peer_steps: int | None, peer_tokens: int | None):
        self.model, self.device = model, device
        self.peer_steps, self.peer_tokens = peer_steps, peer_tokens
        # Methods cannot be cached by themselves without keeping the models alive for ever.
        self.transformer = cache(self._transformer)
        self.vqvae = cache(self._vqvae)
        self.plain = cache(self._plain)
        self.raster = cache(lambda dtype: make_raster(transformer_fields(model), self.transformer(dtype)))
        self.pipeline = cache(self._pipeline)
        self.dit = cache(lambda size, dtype: make_dit(size, dtype, device))

    def make(self, name: str, batch_size: int) -> Callable[[], Timed]:
        """
        A measurement of the variant `name`.

        Raises:
            [`Unavailable`]: If it cannot run here.
        """
        dtype = torch.bfloat16 if is_half(name) else torch.float32
        switched = "onednn" in name
        if name.startswith("ours"):
            # The pipeline sets and restores the switch itself.
            pipe = self.pipeline(dtype, decoder_dtype(name), "mkl" in name, "compiled" in name)
            return self._draw_ours(pipe, batch_size)
        if name.startswith("plain"):
            draw = self._draw_plain(dtype, batch_size)
        elif name.startswith("raster"):
            draw = self._draw_raster(dtype, batch_size)
        else:
            draw = self._draw_dit(name, dtype, batch_size)

        def measure() -> Timed:
            with onednn_matmul(switched):
                return draw()

        return measure

    def _draw_plain(self, dtype: torch.dtype, batch_size: int) -> Callable[[], Timed]:
        transformer, tokenizer = self.plain(dtype)
        labels = self._labels(batch_size)

        def draw() -> Timed:
            seconds, (_, codes) = timed(
                lambda: transformer.sample(tokenizer, labels, GUIDANCE_SCALE, self._top_k(), TOP_P, self._generator()),
                self.device,
            )
            return Timed(seconds, codes)

        return draw

    def _draw_ours(self, pipe: VARPipeline, batch_size: int) -> Callable[[], Timed]:
        labels = self._labels(batch_size).tolist()
        settings: dict[str, Any] = {"guidance_scale": GUIDANCE_SCALE, "top_k": self._top_k(), "top_p": TOP_P}

        def draw() -> Timed:
            seconds, output = timed(
                lambda: pipe(labels, generator=self._generator(), output_type="pt", **settings), self.device
            )
            return Timed(seconds, output.codes)

        return draw

    def _draw_raster(self, dtype: torch.dtype, batch_size: int) -> Callable[[], Timed]:
        transformer, vqvae = self.raster(dtype), self.vqvae(dtype)
        labels, config = self._labels(batch_size), vqvae.config
        settings = (GUIDANCE_SCALE, self._top_k(), TOP_P)

        def draw() -> Timed:
            tokens = draw_raster(transformer, vqvae, labels, *settings, self._generator(), self.peer_tokens)
            # The same decoder makes the image.
            latents = torch.randn(batch_size, config.latent_channels, *config.latent_size, device=self.device)
            with torch.no_grad():
                seconds, _ = timed(lambda: vqvae.decode(latents=latents), self.device)
            return Timed(tokens.seconds + seconds, extrapolated=tokens.extrapolated)

        return draw

    def _draw_dit(self, name: str, dtype: torch.dtype, batch_size: int) -> Callable[[], Timed]:
        size = "xl" if name.startswith("dit_xl") and self.model != "tiny" else self.model
        steps = next(int(part) for part in name.split("_") if part.isdigit())
        pipe, labels = self.dit(size, dtype), self._labels(batch_size).tolist()
        return lambda: draw_dit(pipe, labels, steps, self.peer_steps)

    def _transformer(self, dtype: torch.dtype) -> VARTransformer:
        if dtype != torch.float32:
            return copy.deepcopy(self.transformer(torch.float32)).to(dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return make_transformer(transformer_fields(self.model), device=self.device)

    def _vqvae(self, dtype: torch.dtype) -> VQVAEModel:
        if dtype != torch.float32:
            return copy.deepcopy(self.vqvae(torch.float32)).to(dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return make_vqvae(vqvae_fields(self.model), device=self.device)

    def _plain(self, dtype: torch.dtype) -> tuple[PlainVAR, PlainVQVAE]:
        return PlainVAR(self.transformer(dtype)), PlainVQVAE(self.vqvae(dtype))

    def _pipeline(
        self, dtype: torch.dtype, decoder_dtype: torch.dtype, without_onednn: bool, compiled: bool
    ) -> VARPipeline:
        methods = {"disable_onednn_matmul": without_onednn, "compile": compiled}
        wanted = [method for method, is_wanted in methods.items() if is_wanted]
        for method in wanted:
            if not hasattr(VARPipeline, method):
                raise Unavailable(f"`VARPipeline` has no `{method}`")
        pipe = VARPipeline(self.transformer(dtype), self.vqvae(decoder_dtype))
        pipe.set_progress_bar_config(disable=True)
        for method in wanted:
            getattr(pipe, method)()
        return pipe

    def _labels(self, batch_size: int) -> torch.Tensor:
        num_labels = self.transformer(torch.float32).config.num_labels or 1
        return torch.arange(batch_size, device=self.device) % num_labels

    def _top_k(self) -> int:
        return min(TOP_K, self.transformer(torch.float32).config.codebook_size)

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(SEED)
