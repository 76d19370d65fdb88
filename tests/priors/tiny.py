# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers with contrast, and inputs for them."""

import math

import torch

from hf_var import VARCache, VARConfig, VARTransformer


def tiny_config(**overrides) -> VARConfig:
    """Three scales, the last not square: 1 + 4 + 6 tokens."""
    sizes = {
        "num_labels": 5,
        "codebook_size": 19,
        "latent_channels": 4,
        "patch_nums": (1, 2, (2, 3)),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "drop_path_rate": 0.0,
    }
    return VARConfig(**{**sizes, **overrides})


@torch.no_grad()
def give_contrast(model: VARTransformer, seed: int = 0) -> VARTransformer:
    """
    Weights that keep the variance of what they read, and open gates. The official initialisation nearly closes every
    residual branch and flattens the logits, so that a wrong attention would pass any tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.3
        elif name.endswith("log_query_scale"):
            values = 1 + 0.5 * values
        elif "embedding" in name or "position" in name or name.endswith("offset"):
            values *= 0.7
        else:
            values /= math.sqrt(parameter.shape[-1])
        parameter.copy_(values)
    return model


def tiny_model(attention: str = "sdpa", **overrides) -> VARTransformer:
    """A transformer with contrast, in evaluation mode."""
    model = VARTransformer._from_config(tiny_config(**overrides), attn_implementation=attention)
    return give_contrast(model).eval()


def tiny_inputs(config: VARConfig, batch_size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Classes, inputs of every block but the first, and codes."""
    generator = torch.Generator().manual_seed(seed)
    length = config.length - config.block_lengths[0]
    return {
        "class_labels": torch.randint(config.num_labels + 1, (batch_size,), generator=generator),
        "scale_inputs": torch.randn(batch_size, length, config.latent_channels, generator=generator),
        "labels": torch.randint(config.codebook_size, (batch_size, config.length), generator=generator),
    }


def block_inputs(config: VARConfig, scale_inputs: torch.Tensor, first: int, last: int) -> torch.Tensor | None:
    """The part of `scale_inputs` that a call over the blocks `first` to `last - 1` reads."""
    bounds = [0, *config.block_ends]
    begin, end = (bounds[block] - bounds[1] for block in (max(first, 1), last))
    return scale_inputs[:, begin:end] if end > begin else None


def logits_by_calls(
    model: VARTransformer, inputs: dict[str, torch.Tensor], calls: list[int], cache, label_every_call: bool = False
) -> torch.Tensor:
    """Logits of all tokens, where each call covers so many blocks as `calls` says."""
    logits, first = [], 0
    for num_blocks in calls:
        output = model(
            class_labels=inputs["class_labels"] if first == 0 or label_every_call else None,
            scale_inputs=block_inputs(model.config, inputs["scale_inputs"], first, first + num_blocks),
            cache=cache,
        )
        logits.append(output.logits)
        first += num_blocks
    return torch.cat(logits, dim=1)  # (batch, length, codebook_size)


def logits_block_by_block(model: VARTransformer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of all tokens, one call per block, with a cache of our own kind."""
    return logits_by_calls(model, inputs, [1] * len(model.config.block_lengths), VARCache(model.config))
