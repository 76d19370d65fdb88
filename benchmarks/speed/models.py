# SPDX-License-Identifier: Apache-2.0
"""
Models of the published sizes with random weights, which cost as much as trained ones.

The weights keep the variance of what they read, so that logits, codes and images have contrast: two variants that compute
different things cannot agree by accident.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_var import VARConfig, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.precision import ONEDNN_MATMUL, fp32_precision


# Depth, by which VAR's width and heads go (Tian et al. 2024, section 4.2).
DEPTHS = {"d16": 16, "d20": 20, "d24": 24, "d30": 30}
MODELS = ("tiny", *DEPTHS)
TINY_SCHEDULE = {"codebook_size": 64, "latent_channels": 8, "patch_nums": (1, 2, 4)}


def transformer_fields(model: str) -> dict:
    """What the configuration of a transformer of this size has other than by default."""
    if model == "tiny":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 10}
        return {**TINY_SCHEDULE, **sizes}
    depth = DEPTHS[model]
    return {"hidden_size": 64 * depth, "num_hidden_layers": depth, "num_attention_heads": depth}


def vqvae_fields(model: str) -> dict:
    """The same for the tokenizer, which is one for all sizes but the tiny one."""
    if model != "tiny":
        return {}
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    return {**TINY_SCHEDULE, **sizes}


def make_transformer(
    fields: dict, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> VARTransformer:
    """A transformer with contrast, in evaluation mode and without dropout of any kind."""
    config = VARConfig(**{"drop_path_rate": 0.0, "class_dropout_prob": 0.0, **fields})
    model = filled(lambda: VARTransformer(config), dtype, device, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_query_scale"):
                parameter.fill_(math.log(4))
    return model


def make_vqvae(fields: dict, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VQVAEModel:
    """A tokenizer with contrast, in evaluation mode."""
    config = VQVAEConfig(**fields)
    return filled(lambda: VQVAEModel(config), dtype, device, seed=2)


def filled(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device | str, seed: int) -> Any:
    """
    The model that `make` makes with random weights of our own, filled in place: making it on the device would fill it twice
    and hold more memory meanwhile than the model needs.
    """
    with torch.device("meta"):
        model = make()
    # diffusers' own `to` warns of modules that stay in fp32, of which there are none here.
    model = nn.Module.to(model, dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                is_table = "embedding" in name or "position" in name or "codebook" in name
                parameter.normal_(std=1.0 if is_table else parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def random_images(vqvae: VQVAEModel, batch_size: int, seed: int = 0) -> torch.Tensor:
    """Images in [-1, 1] on the model's device, smooth ones as photographs are, with a little noise."""
    config, generator = vqvae.config, torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch_size, config.in_channels, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=config.image_size, mode="bicubic")
    noise = torch.randn(smooth.shape, generator=generator)
    return (0.5 * smooth + 0.05 * noise).clamp(-1, 1).to(vqvae.device)


@torch.no_grad()
def calibrate(vqvae: VQVAEModel) -> None:
    """Give the features the spread of the codebook; otherwise a few codes were nearest to everything."""
    encoded: Any = vqvae.encode(random_images(vqvae, 2, seed=5))
    means, spread = encoded.features.mean(dim=(0, 2, 3)), encoded.features.std()
    for parameter in vqvae.quant_conv.parameters():
        parameter.sub_(means if parameter.ndim == 1 else 0).div_(spread)


@contextmanager
def onednn_matmul(enabled: bool = True) -> Iterator[None]:
    """
    Inside, fp32 matrix products on a CPU go to oneDNN in place of the library that torch was built with, by torch's public
    switch. On a CPU whose matrix units know bf16 (AMX) this permits lower precision.
    """
    with fp32_precision(ONEDNN_MATMUL if enabled else {}):
        yield
