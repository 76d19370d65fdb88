# SPDX-License-Identifier: Apache-2.0
"""
What VAR is compared with beside its own plain form: a decoder of the same size that samples one token after the other, and
diffusers' DiT. Their weights are random, and where a whole image takes too long, a part of it is measured.
"""

import math
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from hf_var import VARCache, VARConfig, VARTransformer, VQVAEModel
from hf_var.pipelines.sampling import apply_guidance, draw_codes, filter_logits

from .clock import Timed, now
from .models import DEPTHS, filled


# The positions at which tokens are timed when not all are.
NUM_POSITIONS = 3


def make_raster(fields: dict, transformer: VARTransformer) -> VARTransformer:
    """
    Our own transformer with blocks of one token (raster order) over the last token map of `transformer`, which was made
    with `fields`. They share all weights but those that depend on the number of tokens.
    """
    size = transformer.config.patch_nums[-1]
    length = transformer.config.scale_lengths[-1]
    fields = {**fields, "patch_nums": (size,), "block_sizes": [1] * length}
    config = VARConfig(**fields, drop_path_rate=0.0, class_dropout_prob=0.0)
    shared = transformer.state_dict()
    with torch.device("meta"):
        raster = nn.Module.to(VARTransformer(config), transformer.dtype)
    own = {
        name: shared[name] if shared[name].shape == tensor.shape else shared[name][: len(tensor)].clone()
        for name, tensor in raster.state_dict().items()
    }
    raster.load_state_dict(own, assign=True)
    return raster.eval()  # pyright: ignore[reportReturnType]


@torch.no_grad()
def draw_raster(
    transformer: VARTransformer,
    vqvae: VQVAEModel,
    class_labels: torch.Tensor,
    guidance_scale: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    tokens_measured: int | None = None,
) -> Timed:
    """
    Draw token after token, with the same filters as VAR, guidance and a cache of keys and values.

    Args:
        transformer ([`VARTransformer`]): With blocks of one token.
        vqvae ([`VQVAEModel`]): Looks code vectors up; its schedule is of no concern.
        class_labels (`torch.LongTensor` of shape `(batch,)`): Classes.
        guidance_scale (`float`): The same for all tokens; 1 is off.
        top_k (`int`): Codes to draw from.
        top_p (`float`): Their probability.
        generator (`torch.Generator`): Source of randomness.
        tokens_measured (`int`, *optional*):
            Time so many tokens at the begin, in the middle and at the end of the image only, and take the time of a token to
            change linearly between them, as the length of the cache does.
    """
    config, device = transformer.config, class_labels.device
    unconditional = torch.full_like(class_labels, config.num_labels or 0)
    guided = guidance_scale != 1
    rows = torch.cat([class_labels, unconditional]) if guided else class_labels

    def step(inputs: torch.Tensor | None, cache: VARCache) -> tuple[torch.Tensor, torch.Tensor]:
        labels = rows if inputs is None else None
        logits = transformer(labels, scale_inputs=inputs, cache=cache).logits[:, -1:]
        logits = apply_guidance(logits, guidance_scale) if guided else logits
        codes = draw_codes(filter_logits(logits, top_k, top_p), generator)
        return codes, vqvae.code_vectors(codes).repeat(2 if guided else 1, 1, 1)

    if tokens_measured is None or NUM_POSITIONS * tokens_measured >= config.length:
        start = now(device)
        cache, inputs, codes = VARCache(config), None, []
        for _ in range(config.length):
            drawn, inputs = step(inputs, cache)
            codes.append(drawn)
        return Timed(now(device) - start, torch.cat(codes, dim=1))

    per_token = []
    for begin in (1, (config.length - tokens_measured) // 2, config.length - tokens_measured):
        cache = VARCache(config)
        vectors = torch.randn(len(rows), begin, config.latent_channels, device=device)
        transformer(rows, scale_inputs=vectors[:, 1:] if begin > 1 else None, cache=cache)
        inputs = vectors[:, :1]
        step(inputs, cache)
        cache.crop(-1)
        start = now(device)
        for _ in range(tokens_measured):
            _, inputs = step(inputs, cache)
        per_token.append((now(device) - start) / tokens_measured)
    mean = (per_token[0] + 2 * per_token[1] + per_token[2]) / 4
    return Timed(mean * config.length, extrapolated=True)


def make_dit(size: str, dtype: torch.dtype, device: torch.device) -> DiTPipeline:
    """
    diffusers' DiT for 256x256 pixels with the autoencoder of Stable Diffusion.

    Args:
        size (`str`): `"xl"` for DiT-XL/2, or the size of a VAR, whose depth and width it has then.
        dtype (`torch.dtype`): Of all weights.
        device (`torch.device`): Where they are.
    """
    if size == "tiny":
        transformer_sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
        transformer_sizes["sample_size"] = 4
        widths, groups = (8, 8), 4
    else:
        heads, layers = (16, 28) if size == "xl" else (DEPTHS[size], DEPTHS[size])
        head_dim = 72 if size == "xl" else 64
        transformer_sizes = {"num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers}
        widths, groups = (128, 256, 512, 512), 32
    transformer = filled(
        lambda: DiTTransformer2DModel(in_channels=4, out_channels=8, **transformer_sizes), dtype, device, seed=3
    )
    autoencoder = filled(
        lambda: AutoencoderKL(
            block_out_channels=widths,  # pyright: ignore[reportArgumentType]
            down_block_types=["DownEncoderBlock2D"] * len(widths),  # pyright: ignore[reportArgumentType]
            up_block_types=["UpDecoderBlock2D"] * len(widths),  # pyright: ignore[reportArgumentType]
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=groups,
            sample_size=256,
        ),
        dtype,
        device,
        seed=4,
    )
    pipe = DiTPipeline(transformer, autoencoder, DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw_dit(pipe: DiTPipeline, class_labels: list[int], num_steps: int, steps_measured: int | None = None) -> Timed:
    """
    Draw images by `num_steps` steps of DDIM with guidance.

    Args:
        pipe (`DiTPipeline`): The pipeline.
        class_labels (`list[int]`): Classes.
        num_steps (`int`): Steps.
        steps_measured (`int`, *optional*): Run so many only and take the others to be as fast; the decoder runs once.
    """
    device = pipe.transformer.device
    steps = num_steps if steps_measured is None else min(num_steps, steps_measured)
    decoder_times: list[float] = []

    def decode(latents: torch.Tensor):
        start = now(device)
        decoded = AutoencoderKL.decode(pipe.vae, latents)  # pyright: ignore[reportArgumentType]
        decoder_times.append(now(device) - start)
        return decoded

    pipe.vae.decode = decode
    start = now(device)
    pipe(class_labels, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="pt")
    total = now(device) - start
    denoising = (total - math.fsum(decoder_times)) / steps * num_steps
    return Timed(denoising + math.fsum(decoder_times), extrapolated=steps < num_steps)
