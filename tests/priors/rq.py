# SPDX-License-Identifier: Apache-2.0
"""Tiny RQ-Transformers with contrast, inputs for them, and sampling as a plain loop."""

import torch
from transformers import DynamicCache

from hf_var import RQTransformer, RQTransformerConfig
from hf_var.pipelines.sampling import draw_codes, filter_logits
from parity import make_contrast


SIZES = {
    "codebook_size": 11,
    "latent_channels": 4,
    "patch_nums": [(2, 3)] * 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_depth_layers": 2,
    "num_attention_heads": 2,
    "dropout": 0.0,
}
ONE_DEPTH = {"patch_nums": [(2, 3)], "num_depth_layers": 0}
GPT = {**ONE_DEPTH, "code_inputs": "tokens", "shared_embedding": True, "head_bias": False}
TEXT = {"condition_length": 4, "condition_vocab_size": 7}
# Of every kind, with fields in place of those above.
KINDS = {
    "classes": {"num_labels": 5},
    "guided": {"num_labels": 5, "class_dropout_prob": 0.3},
    "unconditional": {"num_labels": 0},
    "text": {**TEXT, "condition_loss_weight": 0.1, "class_dropout_prob": 0.3},
    "bidirectional": {**TEXT, "bidirectional_condition": True},
    "tokens": {
        "num_labels": 5,
        "code_inputs": "tokens",
        "separate_depth_embeddings": True,
        "separate_depth_heads": True,
        "cumulative_depth_inputs": False,
    },
    "shared_tokens": {"num_labels": 5, "code_inputs": "tokens", "hidden_act": "quick_gelu"},
    "gpt": {**GPT, "num_labels": 5},
    "unconditional_gpt": {**GPT, "num_labels": 0},
    "prefix_gpt": {**GPT, "condition_length": 6, "condition_loss_weight": 0.1},
}


def rq_model(kind: str = "classes", attention: str = "sdpa", **overrides) -> RQTransformer:
    """A model with contrast, in evaluation mode."""
    config = RQTransformerConfig(**{**SIZES, **KINDS[kind], **overrides})
    return make_contrast(RQTransformer._from_config(config, attn_implementation=attention))


def rq_inputs(config: RQTransformerConfig, batch_size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Condition, whole stacks and their labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, config.num_positions, config.depth)
    codes = torch.randint(config.codebook_size, shape, generator=generator)
    inputs = {"labels": codes, **stacks_of(config, codes)}
    if config.num_labels:
        inputs["class_labels"] = torch.randint(config.num_labels, (batch_size,), generator=generator)
    elif config.condition_length > 1:
        shape = (batch_size, config.condition_length)
        inputs["condition_ids"] = torch.randint(config.num_condition_ids, shape, generator=generator)
    return inputs


def stacks_of(
    config: RQTransformerConfig, codes: torch.Tensor | None, table: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """`codes` as the model reads them; their vectors are rows of `table`."""
    if codes is None:
        return {}
    if config.code_inputs == "tokens":
        return {"codes": codes}
    if table is None:
        shape = (config.codebook_size, config.latent_channels)
        table = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return {"code_vectors": table[codes]}


def condition_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a step of sampling begins with."""
    return {name: inputs[name] for name in ("class_labels", "condition_ids") if name in inputs}


@torch.no_grad()
def sample_codes(
    model: RQTransformer,
    condition: dict[str, torch.Tensor],
    top_k: list[int] | int = 0,
    top_p: list[float] | float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
    given: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stacks `(batch, positions, depth)`, of which the first ones may be `given`, position by position."""
    config, cache, generator = model.config, DynamicCache(), torch.Generator().manual_seed(seed)
    top_k = [top_k] * config.depth if isinstance(top_k, int) else top_k
    top_p = [top_p] * config.depth if isinstance(top_p, float) else top_p
    (batch_size,) = {len(values) for values in condition.values()}
    stacks = torch.empty(batch_size, 0, config.depth, dtype=torch.long) if given is None else given
    output = model(**condition, **stacks_of(config, given, table), cache=cache)
    while True:
        context, depth_cache = output.context[:, -1], DynamicCache()
        stack = torch.empty(batch_size, 0, dtype=torch.long)
        for depth in range(config.depth):
            read = stacks_of(config, stack if depth > 0 else None, table)
            logits = model.predict_depth(context, **read, cache=depth_cache)
            logits = filter_logits(logits / temperature, top_k[depth], top_p[depth])
            stack = torch.cat([stack, draw_codes(logits.unsqueeze(1), generator)], dim=1)
        stacks = torch.cat([stacks, stack.unsqueeze(1)], dim=1)
        if stacks.shape[1] == config.num_positions:
            return stacks
        output = model(**stacks_of(config, stacks[:, -1:], table), cache=cache)
