# SPDX-License-Identifier: Apache-2.0
"""Tiny PixelCNN and PixelSNAIL models with contrast, inputs for them, and sampling code by code."""

import torch

from hf_var import PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig, RowCache


NUM_CODES = 11
CNN = {"num_labels": 4, "map_size": (5, 4), "codebook_size": NUM_CODES, "hidden_size": 8, "num_hidden_layers": 3}
SNAIL = {
    "map_size": (4, 6),
    "codebook_size": NUM_CODES,
    "hidden_size": 16,
    "residual_size": 8,
    "kernel_size": 3,
    "num_blocks": 2,
    "num_res_blocks": 2,
    "num_attention_heads": 2,
    "num_condition_res_blocks": 1,
    "condition_hidden_size": 8,
}
COARSE = {"condition_map_size": (2, 3), "condition_codebook_size": 7}
CLASSES = {"num_labels": 4, "class_dropout_prob": 0.1}
# Of every kind, with fields in place of those above.
KINDS = {
    "cnn": (PixelCNN, {**CNN}),
    "cnn_wide": (PixelCNN, {**CNN, "kernel_size": 5, "first_kernel_size": 3, "map_size": (3, 6)}),
    "cnn_unconditional": (PixelCNN, {**CNN, "num_labels": 0}),
    "cnn_dropped_classes": (PixelCNN, {**CNN, "class_dropout_prob": 0.1}),
    "snail": (PixelSNAIL, {**SNAIL}),
    "snail_wide": (PixelSNAIL, {**SNAIL, "kernel_size": 5, "map_size": (5, 3), "num_output_res_blocks": 2}),
    "snail_classes": (PixelSNAIL, {**SNAIL, **CLASSES}),
    "snail_fine": (PixelSNAIL, {**SNAIL, **COARSE, "attention": False}),
    "snail_fine_classes": (PixelSNAIL, {**SNAIL, **COARSE, **CLASSES, "map_size": (4, 9)}),
}
CONFIGS = {PixelCNN: PixelCNNConfig, PixelSNAIL: PixelSNAILConfig}


@torch.no_grad()
def give_contrast(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that keep the variance of what they read, in masked places, too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.3
        elif name.endswith(("weight_g", "embedding.weight")):
            values = 1 + 0.3 * values if name.endswith("weight_g") else values
        else:
            values /= parameter[0].numel() ** 0.5
        parameter.copy_(values)
    return model


def pixel_prior(kind: str, **overrides):
    """A model of `KINDS` with contrast, in evaluation mode."""
    model_class, fields = KINDS[kind]
    return give_contrast(model_class(CONFIGS[model_class](**{**fields, **overrides}))).eval()


def pixel_inputs(config, batch_size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Codes and what else a model of this configuration reads."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"codes": torch.randint(config.codebook_size, (batch_size, config.length), generator=generator)}
    if config.num_labels:
        first = -1 if config.has_unconditional_class else 0
        inputs["class_labels"] = torch.randint(first, config.num_labels, (batch_size,), generator=generator)
    if length := getattr(config, "condition_length", 0):
        inputs["condition_codes"] = torch.randint(
            config.num_condition_codes, (batch_size, length), generator=generator
        )
    return inputs


def condition_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values for name, values in inputs.items() if name != "codes"}


@torch.no_grad()
def sample_naively(model, batch_size: int, choose, **condition) -> torch.Tensor:
    """Codes `(batch, length)` in raster order, each from logits of the whole map."""
    codes = torch.zeros(batch_size, model.config.length, dtype=torch.long)
    for place in range(model.config.length):
        codes[:, place] = choose(model(codes, **condition).logits[:, place])
    return codes


@torch.no_grad()
def sample_by_rows(model, batch_size: int, choose, **condition) -> torch.Tensor:
    """The same with a cache, which gets the condition at the first call alone."""
    config, cache = model.config, RowCache()
    codes = torch.zeros(batch_size, config.height, config.width, dtype=torch.long)
    for row in range(config.height):
        for column in range(config.width):
            logits = model(codes[:, row], cache=cache, **({} if row or column else condition)).logits
            codes[:, row, column] = choose(logits[:, column])
        model(codes[:, row], cache=cache)
        cache.finish_rows()
    return codes.flatten(1)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def draws(temperature: float, seed: int):
    """Draws of codes from one generator, in the order of the places."""
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
