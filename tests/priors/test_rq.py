# SPDX-License-Identifier: Apache-2.0
"""What an RQ-Transformer computes, whatever its weights: what each code sees, caches, conditions, losses."""

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.cache_utils import Cache

from hf_var import VQVAEConfig, VQVAEModel, stack_codes, unstack_codes
from hf_var.conversion import export_taming_gpt
from hf_var.priors.cache import VARCacheLayer
from priors.rq import KINDS, condition_of, rq_inputs, rq_model, sample_codes, stacks_of


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return rq_model(kind)


@pytest.fixture
def inputs(model):
    return rq_inputs(model.config)


def num_read(config):
    return config.condition_length + config.num_positions - 1


def buffers(config):
    """A cache that hands out just what it holds, in buffers of the full length."""
    return Cache(layers=[VARCacheLayer(num_read(config)) for _ in range(config.num_hidden_layers)])


CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config, num_read(config)),
    "buffers": buffers,
}


def contexts_by_calls(model, inputs, calls, cache):
    """Contexts of all positions, where the first call reads the condition and each reads so many positions as `calls` says."""
    contexts, first, condition = [], 0, condition_of(inputs)
    if not condition:
        condition = {"class_labels": torch.full((len(inputs["labels"]),), -1)}
    stacks = {name: inputs[name] for name in ("codes", "code_vectors") if name in inputs}
    for length in calls:
        read = {name: values[:, first : first + length] for name, values in stacks.items()} if length else {}
        contexts.append(model(**condition, **read, cache=cache).context)
        first, condition = first + length, {}
    return torch.cat(contexts, dim=1)  # (batch, positions, hidden)


# --- caches ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("calls", [[0, 1, 1, 1, 1, 1], [3, 1, 1], [0, 2, 3], [5]], ids=str)
def test_cached_equals_uncached(model, inputs, make_cache, calls):
    expected = model(**inputs).context
    cache = make_cache(model.config)
    torch.testing.assert_close(contexts_by_calls(model, inputs, calls, cache), expected, **CLOSE)
    assert int(cache.get_seq_length()) == num_read(model.config)


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [None, DynamicCache, StaticCache], ids=str)
def test_depth_by_depth_equals_teacher_forcing(model, inputs, make_cache):
    output, config = model(**inputs), model.config
    for position in range(config.num_positions):
        cache = make_cache
        if make_cache is not None:
            cache = DynamicCache() if make_cache is DynamicCache else StaticCache(config.depth_config, config.depth)
        for depth in range(config.depth):
            before = inputs["labels"][:, position, :depth]
            read = stacks_of(config, before if depth > 0 else None)
            logits = model.predict_depth(output.context[:, position], **read, cache=cache)
            torch.testing.assert_close(logits, output.logits[:, position, depth], **CLOSE)


@torch.no_grad()
def test_a_depth_cache_may_lag_behind(model, inputs):
    if model.config.depth == 1:
        pytest.skip("one depth")
    output, cache = model(**inputs), DynamicCache()
    read = stacks_of(model.config, inputs["labels"][:, 2, :2])
    logits = model.predict_depth(output.context[:, 2], **read, cache=cache)
    torch.testing.assert_close(logits, output.logits[:, 2, 2], **CLOSE)
    assert cache.get_seq_length() == 3


def test_use_cache_makes_a_cache_under_both_names(model, inputs):
    output = model(**condition_of(inputs), use_cache=True)
    assert output.cache is output.past_key_values is output["past_key_values"]
    assert output.cache.get_seq_length() == model.config.condition_length
    assert output.logits is None
    model.config.use_cache = True
    assert model(**condition_of(inputs)).cache.get_seq_length() == model.config.condition_length
    assert model(**inputs, use_cache=False).cache is None
    cache = DynamicCache()
    assert model(**condition_of(inputs), past_key_values=cache).cache is cache


# --- what a code sees ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_code_changes_only_what_comes_after_it(model, inputs):
    config, codes = model.config, inputs.pop("labels")
    expected = model(**inputs).logits.flatten(1, 2)
    for position in (0, 2, config.num_positions - 1):
        for depth in range(config.depth):
            changed = codes.clone()
            changed[:, position, depth] = (changed[:, position, depth] + 1) % config.codebook_size
            logits = model(**{**inputs, **stacks_of(config, changed)}).logits.flatten(1, 2)
            difference = (logits - expected).abs().amax(dim=(0, 2)) > 1e-6
            index = position * config.depth + depth
            assert not difference[: index + 1].any()
            assert difference[index + 1 : index + 2].all()
            # Each code reaches the end of the image.
            assert difference[-1] == (index + 1 < len(difference))


@torch.no_grad()
def test_a_batch_equals_its_images(model, inputs):
    logits = model(**inputs).logits
    for image in range(3):
        alone = model(**{name: values[image : image + 1] for name, values in inputs.items()}).logits
        torch.testing.assert_close(alone, logits[image : image + 1], **CLOSE)


@torch.no_grad()
def test_fewer_positions_are_the_beginning(model, inputs):
    expected = model(**inputs)
    condition = condition_of(inputs)
    for length in (1, 4):
        output = model(**condition, **stacks_of(model.config, inputs["labels"][:, :length]))
        torch.testing.assert_close(output.logits, expected.logits[:, :length], **CLOSE)
        torch.testing.assert_close(output.context, expected.context[:, :length], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, "eager") for kind in KINDS]
    # Its kernels are compiled at the first use.
    + [pytest.param(kind, "flex_attention", marks=pytest.mark.slow) for kind in ("classes", "bidirectional")],
)
def test_attention_implementations_agree(kind, attention):
    model = rq_model(kind)
    inputs = rq_inputs(model.config)
    expected = model(**inputs).logits
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    contexts = contexts_by_calls(model, inputs, [0, 2, 1, 2], DynamicCache())
    torch.testing.assert_close(contexts, model(**inputs).context, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("is_cumulative", [True, False])
@pytest.mark.parametrize("kind", ["classes", "shared_tokens"])
def test_a_depth_reads_the_sum_of_the_codes_before_or_the_last_one(kind, is_cumulative):
    embeddings = rq_model(kind, cumulative_depth_inputs=is_cumulative).embeddings
    context, codes = torch.randn(3, 32), torch.randint(11, (3, 2))
    vectors = torch.randn(3, 2, 4)
    stacks = codes if kind == "shared_tokens" else vectors
    tokens = embeddings.depth_inputs(context, stacks) - embeddings.depth_position_embedding.weight
    last = vectors[:, 0] + vectors[:, 1] if is_cumulative else vectors[:, 1]
    if kind == "classes":
        expected = [context, embeddings.depth_proj(vectors[:, 0]), embeddings.depth_proj(last)]
    else:
        first, second = embeddings.code_embedding(codes).unbind(1)
        expected = [context, first, first + second if is_cumulative else second]
    torch.testing.assert_close(tokens, torch.stack(expected, dim=1), **CLOSE)


# --- an independent implementation -----------------------------------------------------------------------------------


def as_gpt2(model):
    """transformers' GPT-2 with the weights of `model`."""
    config = model.config
    names = [
        ("tok_emb.weight", "transformer.wte.weight"),
        ("pos_emb", "transformer.wpe.weight"),
        ("ln_f.", "transformer.ln_f."),
        ("head.", "lm_head."),
        ("blocks.", "transformer.h."),
        (".ln1.", ".ln_1."),
        (".ln2.", ".ln_2."),
        (".attn.proj.", ".attn.c_proj."),
        (".mlp.0.", ".mlp.c_fc."),
        (".mlp.2.", ".mlp.c_proj."),
    ]
    weights, fused = {}, {}
    for name, tensor in export_taming_gpt(model).items():
        for old, new in names:
            name = name.replace(old, new)
        if any(part in name for part in ("query", "key", "value")):
            fused.setdefault(name.replace("query", "c_attn").replace("key", "c_attn").replace("value", "c_attn"), {})[
                name.split(".")[-2]
            ] = tensor
        else:
            is_conv = ".h." in name and name.endswith("weight") and ".ln_" not in name
            weights[name] = tensor.T if is_conv else tensor.squeeze(0) if "wpe" in name else tensor
    for name, parts in fused.items():
        joined = torch.cat([parts["query"], parts["key"], parts["value"]])
        weights[name] = joined.T if name.endswith("weight") else joined
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.codebook_size,
            n_positions=len(weights["transformer.wpe.weight"]),
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            activation_function="gelu",
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    gpt2.load_state_dict(weights)
    return gpt2.eval()


@torch.no_grad()
def test_one_depth_is_gpt2():
    model = rq_model("prefix_gpt")
    inputs = rq_inputs(model.config)
    gpt2, prefix = as_gpt2(model), inputs["condition_ids"]
    sequence = torch.cat([prefix, inputs["codes"][:, :-1, 0]], dim=1)
    logits = gpt2(sequence).logits
    output = model(**inputs)
    torch.testing.assert_close(output.logits[:, :, 0], logits[:, model.config.condition_length - 1 :], **CLOSE)
    torch.testing.assert_close(output.condition_logits, logits[:, : model.config.condition_length - 1], **CLOSE)
    drawn = gpt2.generate(prefix, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, prefix.shape[1] :]
    assert torch.equal(sample_codes(model, {"condition_ids": prefix}, top_k=1)[..., 0], drawn)


# --- conditions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classes", "guided", "tokens", "gpt"])
def test_a_class_is_a_condition_of_one_token(model, inputs):
    labels = inputs.pop("class_labels")
    expected = model(labels, **inputs).logits
    assert torch.equal(model(condition_ids=labels[:, None], **inputs).logits, expected)
    assert not torch.allclose(model((labels + 1) % 5, **inputs).logits, expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["guided", "text"])
def test_unconditional_rows(model, inputs):
    condition = condition_of(inputs)
    others = {name: values for name, values in inputs.items() if name not in condition}
    expected = model(**others).logits
    for name, values in condition.items():
        assert torch.equal(model(**others, **{name: torch.full_like(values, -1)}).logits, expected)
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)
    if "class_labels" in condition:
        assert torch.equal(model(torch.full((3,), 5), **others).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unconditional", "unconditional_gpt"])
def test_unconditional_models(model, inputs):
    expected = model(**inputs).logits
    for label in (-1, 0):
        assert torch.equal(model(torch.full((3,), label), **inputs).logits, expected)
    assert model(use_cache=True).context.shape == (1, 1, 32)


@pytest.mark.parametrize("kind", ["guided", "text"])
def test_class_dropout_acts_in_training_only(model, inputs):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config.class_dropout_prob = 1 - 1e-9
    expected = model(**{name: values for name, values in inputs.items() if name not in condition_of(inputs)})
    dropped = model.train()(**inputs)
    assert torch.equal(dropped.logits, expected.logits)
    # What was dropped is not to be predicted.
    assert torch.isfinite(dropped.loss)
    model.config.class_dropout_prob = 0.5
    logits = torch.stack([model(**inputs).logits for _ in range(20)])
    is_dropped = (logits == expected.logits).flatten(2).all(-1)
    assert 0.2 < is_dropped.float().mean() < 0.8
    assert not (model.eval()(**inputs).logits == expected.logits).flatten(1).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize(("is_bidirectional", "changes"), [(True, True), (False, False)])
def test_bidirectional_condition(is_bidirectional, changes):
    model = rq_model("bidirectional", bidirectional_condition=is_bidirectional)
    inputs = rq_inputs(model.config)
    before = model(**inputs, output_hidden_states=True).hidden_states[-1]
    inputs["condition_ids"][:, -1] = (inputs["condition_ids"][:, -1] + 1) % 7
    difference = (model(**inputs, output_hidden_states=True).hidden_states[-1] - before).abs().amax(dim=(0, 2)) > 1e-6
    assert difference[:3].tolist() == [changes] * 3
    assert difference[3:].all()


def test_a_bidirectional_condition_has_no_flash_attention():
    model = rq_model("bidirectional")
    inputs = rq_inputs(model.config)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' has no mask for `bidirectional_condition`"):
        model(**inputs)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_soft_labels_of_one_code_are_labels(model, inputs):
    expected = model(**inputs).loss
    codes = inputs.pop("labels")
    soft_labels = functional.one_hot(codes, model.config.codebook_size).float()
    torch.testing.assert_close(model(**inputs, soft_labels=soft_labels).loss, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["classes", "gpt"])
def test_loss_is_the_mean_of_the_labels_that_count(model, inputs):
    labels = inputs["labels"].clone()
    labels[:, 2:] = -100
    output = model(**{**inputs, "labels": labels})
    log_probs = output.logits[:, :2].log_softmax(-1).gather(-1, labels[:, :2, :, None])
    torch.testing.assert_close(output.loss, -log_probs.mean(), **CLOSE)
    smooth = rq_model("classes", label_smoothing=0.1)
    expected = functional.cross_entropy(
        smooth(**rq_inputs(smooth.config)).logits.flatten(0, 2),
        rq_inputs(smooth.config)["labels"].flatten(),
        label_smoothing=0.1,
    )
    torch.testing.assert_close(smooth(**rq_inputs(smooth.config)).loss, expected)


@pytest.mark.parametrize("kind", ["text", "prefix_gpt"])
def test_condition_loss_has_its_weight(model, inputs):
    output = model(**inputs)
    image = functional.cross_entropy(output.logits.flatten(0, 2), inputs["labels"].flatten())
    condition = functional.cross_entropy(
        output.condition_logits.flatten(0, 1), inputs["condition_ids"][:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, 0.9 * image + 0.1 * condition)
    if model.config.unconditional_id is not None:
        inputs["condition_ids"][0] = -1
        output = model(**inputs)
        image = functional.cross_entropy(output.logits.flatten(0, 2), inputs["labels"].flatten())
        logits, targets = output.condition_logits[1:].flatten(0, 1), inputs["condition_ids"][1:, 1:].flatten()
        torch.testing.assert_close(output.loss, 0.9 * image + 0.1 * functional.cross_entropy(logits, targets))


# --- stacks ----------------------------------------------------------------------------------------------------------


def test_stacks_are_those_of_the_tokenizer():
    config = VQVAEConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=4,
        codebook_size=11,
        patch_nums=[(2, 3)] * 3,
        refinement_ratio=0.0,
    )
    vqvae = VQVAEModel(config).eval()
    codes = torch.arange(36).view(2, 18) % 11
    stacks = stack_codes(codes, 3)
    assert stacks.shape == (2, 6, 3)
    assert torch.equal(stacks[0, 4], codes[0, [4, 10, 16]])
    assert torch.equal(unstack_codes(stacks), codes)
    vectors = stack_codes(vqvae.code_vectors(codes), 3)
    assert torch.equal(vectors, vqvae.code_vectors(stacks))
    assert torch.equal(unstack_codes(vectors), vqvae.code_vectors(codes))
    # What the transformer reads of a position is its latent.
    latents = vqvae.latents(codes).flatten(2).mT
    torch.testing.assert_close(vectors.sum(dim=2), latents, **CLOSE)
    output = rq_model("unconditional")(code_vectors=vectors, labels=stacks)
    assert output.logits.shape == (2, 6, 3, 11)
    with pytest.raises(
        ValueError, match=r"`codes` must have the shape \(batch, 4 \* positions\) for stacks of 4, got"
    ):
        stack_codes(codes, 4)
