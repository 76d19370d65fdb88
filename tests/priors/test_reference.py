# SPDX-License-Identifier: Apache-2.0
"""The whole transformer against its mathematics written out a second time, in plain torch."""

import math

import pytest
import torch
from torch.nn import functional

from priors.tiny import logits_block_by_block, tiny_inputs, tiny_model


def layer_norm(hidden, epsilon):
    centred = hidden - hidden.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def silu(vector):
    return vector / (1 + (-vector).exp())


def gelu(hidden):
    return 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))


def attend(weights, prefix, hidden, visible, num_heads, qk_norm):
    """Head by head, with the probabilities of all pairs of tokens."""

    def project(name):
        projected = hidden @ weights[f"{prefix}.{name}.weight"].T
        # The key has no bias, and must not have one even where it would change nothing.
        return projected if name == "k_proj" else projected + weights[f"{prefix}.{name}.bias"]

    assert f"{prefix}.k_proj.bias" not in weights
    head_dim = hidden.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        query, key, value = (project(name)[..., part] for name in ("q_proj", "k_proj", "v_proj"))
        if qk_norm:
            log_scale = weights[f"{prefix}.log_query_scale"][head].clamp(max=math.log(100))
            query = query / query.norm(dim=-1, keepdim=True) * log_scale.exp()
            key = key / key.norm(dim=-1, keepdim=True)
            scores = query @ key.mT
        else:
            scores = query @ key.mT * 0.25 / math.sqrt(head_dim)
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value)
    return torch.cat(heads, dim=-1) @ weights[f"{prefix}.o_proj.weight"].T + weights[f"{prefix}.o_proj.bias"]


def reference_logits(weights, config, class_labels, scale_inputs, sizes, blocks):
    """`sizes` are the tokens of the scales and `blocks` those of the blocks, both written out by the test."""
    qk_norm, num_heads, width = config.qk_norm, config.num_attention_heads, config.hidden_size
    epsilon = config.layer_norm_eps
    length = sum(sizes)
    level = torch.tensor([scale for scale, size in enumerate(sizes) for _ in range(size)])
    block = [number for number, size in enumerate(blocks) for _ in range(size)]
    visible = torch.tensor([[block[key] <= block[query] for key in range(length)] for query in range(length)])

    embedding = weights["embeddings.class_embedding.weight"][class_labels]  # (batch, hidden)
    start = embedding[:, None] + weights["embeddings.start_position"]
    words = scale_inputs @ weights["embeddings.input_proj.weight"].T + weights["embeddings.input_proj.bias"]
    hidden = torch.cat([start, words], dim=1)
    hidden = hidden + weights["embeddings.level_embedding"][level] + weights["embeddings.position_embedding"]

    def adaln(prefix, num_vectors):
        vectors = silu(embedding) @ weights[f"{prefix}.linear.weight"].T + weights[f"{prefix}.linear.bias"]
        return vectors.reshape(-1, num_vectors, 1, width).unbind(1)

    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        if config.shared_adaln:
            offsets = weights[f"{prefix}.adaln.offset"]
            vectors = [vector + offset for vector, offset in zip(adaln("shared_adaln", 6), offsets, strict=True)]
        else:
            vectors = adaln(f"{prefix}.adaln", 6)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors
        normed = layer_norm(hidden, epsilon) * (1 + scale1) + shift1
        hidden = hidden + gamma1 * attend(weights, f"{prefix}.attention", normed, visible, num_heads, qk_norm)
        normed = layer_norm(hidden, epsilon) * (1 + scale2) + shift2
        inner = gelu(normed @ weights[f"{prefix}.mlp.fc1.weight"].T + weights[f"{prefix}.mlp.fc1.bias"])
        outer = inner @ weights[f"{prefix}.mlp.fc2.weight"].T + weights[f"{prefix}.mlp.fc2.bias"]
        hidden = hidden + gamma2 * outer
    scale, shift = adaln("head_norm.adaln", 2)
    return (layer_norm(hidden, epsilon) * (1 + scale) + shift) @ weights["head.weight"].T + weights["head.bias"]


SCHEDULES = {
    "scales": ((1, 2, (2, 3)), None, [1, 4, 6], [1, 4, 6]),
    "raster": ((1, 2, (2, 3)), [1] * 11, [1, 4, 6], [1] * 11),
    "mixed": ((1, 2, (2, 3)), [2, 2, 1, 4, 2], [1, 4, 6], [2, 2, 1, 4, 2]),
    "one_scale": ((3,), None, [9], [9]),
    "raster_of_one_scale": (((2, 3),), [1] * 6, [6], [1] * 6),
    "equal_scales": ((2, 2, 2), None, [4, 4, 4], [4, 4, 4]),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln_per_layer", "shared_adaln"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk_norm", "plain"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_equal_the_mathematics(schedule, qk_norm, shared_adaln, attention):
    patch_nums, block_sizes, sizes, blocks = SCHEDULES[schedule]
    model = tiny_model(
        attention,
        patch_nums=patch_nums,
        block_sizes=block_sizes,
        qk_norm=qk_norm,
        shared_adaln=shared_adaln,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2.5,
    )
    inputs = tiny_inputs(model.config)
    weights = model.state_dict()
    expected = reference_logits(
        weights, model.config, inputs["class_labels"], inputs["scale_inputs"], sizes=sizes, blocks=blocks
    )
    with torch.no_grad():
        logits = model(inputs["class_labels"], inputs["scale_inputs"]).logits
    # The reference would be worthless without contrast between codes, tokens and images.
    assert min(expected.std(dim).mean() for dim in (0, 1, 2)) > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_block_by_block(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_epsilon_of_the_configuration_reaches_every_normalisation():
    # At 1e-6 it would hide below any tolerance.
    model = tiny_model(layer_norm_eps=0.3)
    inputs = tiny_inputs(model.config)
    expected = reference_logits(
        model.state_dict(), model.config, inputs["class_labels"], inputs["scale_inputs"], [1, 4, 6], [1, 4, 6]
    )
    with torch.no_grad():
        logits = model(inputs["class_labels"], inputs["scale_inputs"]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_scale_of_queries_is_capped_at_100():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.log_query_scale.fill_(math.log(100))
        expected = model(inputs["class_labels"], inputs["scale_inputs"]).logits
        for layer in model.layers:
            layer.attention.log_query_scale.fill_(9.0)
        logits = model(inputs["class_labels"], inputs["scale_inputs"]).logits
    torch.testing.assert_close(logits, expected)


def test_raster_order_is_plain_causal_attention():
    model = tiny_model(block_sizes=[1] * 11, num_hidden_layers=1)
    inputs = tiny_inputs(model.config)
    seen = []
    handle = model.layers[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        model(inputs["class_labels"], inputs["scale_inputs"])
    handle.remove()
    assert torch.equal(seen[0][0, 0], torch.ones(11, 11, dtype=torch.bool).tril())


def test_a_token_depends_on_its_own_and_earlier_blocks_alone():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    embedding = model.embeddings.class_embedding(inputs["class_labels"]).detach()
    scale_inputs = inputs["scale_inputs"].requires_grad_()
    logits = model(class_embeds=embedding, scale_inputs=scale_inputs).logits
    bounds = [0, 1, 5, 11]
    for block, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for token in range(begin, end):
            (gradient,) = torch.autograd.grad(
                functional.cross_entropy(logits[:, token], inputs["labels"][:, token]), scale_inputs, retain_graph=True
            )
            depends = gradient.abs().amax(dim=(0, 2)) > 0
            # The inputs begin with the second block.
            assert depends.tolist() == [position < bounds[block + 1] for position in range(1, 11)]
