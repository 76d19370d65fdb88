# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers that read texts, with contrast, and inputs for them."""

import math

import torch

from hf_var import TextVARConfig, TextVARTransformer, VARCache
from priors.tiny import block_inputs


# Arguments of an image's first call.
TEXT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "crop_sizes")


def text_config(**overrides) -> TextVARConfig:
    """Three scales, the last not square: 1 + 4 + 6 tokens."""
    sizes = {
        "codebook_size": 19,
        "latent_channels": 4,
        "patch_nums": (1, 2, (2, 3)),
        "cross_attention_dim": 12,
        "pooled_projection_dim": 10,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return TextVARConfig(**{**sizes, **overrides})


@torch.no_grad()
def give_contrast(model: TextVARTransformer, seed: int = 0) -> TextVARTransformer:
    """Weights that keep the variance of what they read, norms that differ between channels, and open gates."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        values = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values *= 0.3
        elif weight.ndim == 2 and "embedding" not in name.rpartition(".")[2] and "position" not in name:
            values /= math.sqrt(weight.shape[-1])
        else:
            values *= 0.7
        weight.copy_(values)
    return model


def text_model(attention: str = "sdpa", **overrides) -> TextVARTransformer:
    """A transformer with contrast, in evaluation mode."""
    model = TextVARTransformer._from_config(text_config(**overrides), attn_implementation=attention)
    return give_contrast(model).eval()


def text_inputs(config: TextVARConfig, batch_size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of five tokens, of which the last ones are padding, inputs of every scale but the first, and codes."""
    generator = torch.Generator().manual_seed(seed)
    length = config.length - config.block_lengths[0]
    inputs = {
        "encoder_hidden_states": torch.randn(batch_size, 5, config.cross_attention_dim, generator=generator),
        "encoder_attention_mask": (torch.arange(5) < torch.tensor([[3], [5], [1]])).long()[:batch_size],
        "pooled_projections": torch.randn(batch_size, config.pooled_projection_dim, generator=generator),
        "scale_inputs": torch.randn(batch_size, length, config.latent_channels, generator=generator),
        "labels": torch.randint(config.codebook_size, (batch_size, config.length), generator=generator),
    }
    if config.crop_conditioning:
        inputs["crop_sizes"] = torch.randint(300, 900, (batch_size, 2), generator=generator)
    return inputs


def text_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part that an image's first call reads."""
    return {name: inputs[name] for name in TEXT if name in inputs}


def logits_in_one_call(model: TextVARTransformer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**text_of(inputs), scale_inputs=inputs["scale_inputs"]).logits


@torch.no_grad()
def logits_by_calls(model, inputs, calls: list[int], cache, text_at_every_call: bool = False) -> torch.Tensor:
    """Logits of all tokens, where each call covers so many scales as `calls` says."""
    logits, first = [], 0
    for number in calls:
        text = text_of(inputs) if first == 0 or text_at_every_call else {}
        scale_inputs = block_inputs(model.config, inputs["scale_inputs"], first, first + number)
        logits.append(model(**text, scale_inputs=scale_inputs, cache=cache).logits)
        first += number
    return torch.cat(logits, dim=1)  # (batch, length, codebook_size)


def logits_scale_by_scale(model: TextVARTransformer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of all tokens, one call for each scale, with a cache of our own kind."""
    return logits_by_calls(model, inputs, [1] * len(model.config.patch_nums), VARCache(model.config))
