# SPDX-License-Identifier: Apache-2.0
"""What training adds: dropout of classes and branches, the loss, gradients, and the initial weights."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from hf_var import VARCache, VARTransformer
from hf_var.compatibility import enable_activation_checkpointing
from priors.tiny import tiny_config, tiny_inputs, tiny_model


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_classes_are_dropped_in_training_only():
    model = tiny_model(class_dropout_prob=0.3)
    images = 2000
    labels = torch.full((images,), 2)
    with torch.no_grad():
        kept, dropped = model(torch.tensor([2, 5])).logits
        assert not torch.allclose(kept, dropped, atol=0.1)
        logits = model(labels).logits
        torch.testing.assert_close(logits, kept.expand_as(logits))
        torch.manual_seed(0)
        logits = model.train()(labels).logits
    is_dropped = torch.isclose(logits, dropped, atol=1e-4).all(dim=(1, 2))
    is_kept = torch.isclose(logits, kept, atol=1e-4).all(dim=(1, 2))
    assert (is_dropped ^ is_kept).all()
    # Four standard deviations of a binomial.
    assert abs(is_dropped.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / images)


def test_class_dropout_of_zero_leaves_the_random_numbers_alone():
    model = tiny_model(class_dropout_prob=0.0).train()
    state = torch.get_rng_state()
    model(torch.tensor([1]))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_leaves_the_random_numbers_alone():
    model = tiny_model(class_dropout_prob=0.5, drop_path_rate=0.5, dropout=0.5, attention_dropout=0.5)
    inputs = tiny_inputs(model.config)
    state = torch.get_rng_state()
    first, second = (model(**inputs).logits for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_drop_path_skips_branches_and_keeps_the_mean():
    model = tiny_model(num_hidden_layers=2, drop_path_rate=0.4)
    layer = model.layers[1]
    assert [each.drop_path.rate for each in model.layers] == [0, 0.4]
    hidden_states = torch.randn(1, 3, 32).expand(4000, -1, -1)
    condition = torch.randn(1, 32).expand(4000, -1)
    with torch.no_grad():
        expected = layer(hidden_states[:1], condition[:1])
        gates = layer.adaln(condition[:1])[:, :2]
        torch.manual_seed(0)
        output = layer.train()(hidden_states, condition)
    # Both branches are skipped together with probability 0.4 squared, and then nothing happens to the input.
    assert gates.abs().mean() > 0.1
    untouched = (output == hidden_states).all(dim=(1, 2)).float().mean()
    assert abs(untouched - 0.16) < 4 * math.sqrt(0.16 * 0.84 / 4000)
    # A kept branch is enlarged: the attention's share averages to itself where the second branch is skipped.
    only_attention = layer.adaln.linear
    with torch.no_grad():
        only_attention.weight[32:64] = 0
        only_attention.bias[32:64] = 0
        expected = layer.eval()(hidden_states[:1], condition[:1])
        output = layer.train()(hidden_states, condition)
    enlarged = hidden_states[:1] + (expected - hidden_states[:1]) / 0.6
    is_enlarged = torch.isclose(output, enlarged, atol=1e-4).all(dim=(1, 2))
    is_untouched = torch.isclose(output, hidden_states, atol=1e-6).all(dim=(1, 2))
    assert (is_enlarged ^ is_untouched).all()
    assert abs(is_untouched.float().mean() - 0.4) < 4 * math.sqrt(0.24 / 4000)


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_acts_in_training_only(field, attention):
    model = tiny_model(attention, class_dropout_prob=0.0, **{field: 0.5})
    plain = tiny_model(attention, class_dropout_prob=0.0)
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        expected = plain(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        torch.testing.assert_close(plain.train()(**inputs).logits, expected)
        assert (model.train()(**inputs).logits - expected).abs().mean() > 0.05


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_dropout_acts_on_either_branch(branch):
    layer = tiny_model(dropout=0.5).layers[0]
    hidden_states, condition = torch.randn(2, 3, 32), torch.randn(2, 32)
    # Close the gate of the other branch.
    closed = slice(32, 64) if branch == "attention" else slice(0, 32)
    with torch.no_grad():
        layer.adaln.linear.weight[closed] = layer.adaln.linear.bias[closed] = 0
        expected = layer(hidden_states, condition) - hidden_states
        share = (layer.train()(hidden_states, condition) - hidden_states) / expected
    # What is not dropped is doubled.
    is_dropped, is_doubled = share.abs() < 1e-3, (share - 2).abs() < 1e-2
    assert (is_dropped | is_doubled).all()
    assert is_dropped.any()
    assert is_doubled.any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_loss_is_the_mean_cross_entropy(label_smoothing):
    model = tiny_model(label_smoothing=label_smoothing)
    inputs = tiny_inputs(model.config)
    labels = inputs["labels"]
    labels[0, 3] = labels[2, 7:] = -100
    with torch.no_grad():
        output = model(**inputs)
    log_probabilities = output.logits.double().log_softmax(-1)
    losses = []
    for image in range(3):
        for token in range(11):
            if labels[image, token] != -100:
                scores = log_probabilities[image, token]
                losses.append(-(1 - label_smoothing) * scores[labels[image, token]] - label_smoothing * scores.mean())
    assert len(losses) == 28
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)
    assert output.loss.dtype == torch.float32
    assert model(inputs["class_labels"], inputs["scale_inputs"]).loss is None


def test_loss_of_a_block_alone():
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        logits = model(**inputs).logits
        loss = model(inputs["class_labels"], labels=inputs["labels"][:, :1]).loss
    torch.testing.assert_close(loss, functional.cross_entropy(logits[:, 0], inputs["labels"][:, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_fp32_in_half_precision(attention, dtype):
    model = tiny_model(attention)
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        expected = model(**inputs)
        with torch.autocast("cpu", dtype):
            automatic = model(**inputs)
        half = model.to(dtype)(**inputs)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for output in (automatic, half):
        assert output.logits.dtype == output.loss.dtype == torch.float32
        assert not torch.equal(output.logits, expected.logits)
        assert (output.logits - expected.logits).std() < 0.05 * expected.logits.std()


@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln_per_layer", "shared_adaln"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk_norm", "plain"])
def test_every_parameter_learns(qk_norm, shared_adaln):
    config = tiny_config(qk_norm=qk_norm, shared_adaln=shared_adaln, class_dropout_prob=0.0)
    # With the initial weights of real training, whose gates are nearly closed.
    model = VARTransformer(config).train()
    inputs = tiny_inputs(config)
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_autocast_training_steps_lower_the_loss():
    torch.manual_seed(0)
    model = tiny_model(class_dropout_prob=0.0, drop_path_rate=0.1).train()
    inputs = tiny_inputs(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln_per_layer", "shared_adaln"])
def test_gradient_checkpointing_changes_no_gradient(shared_adaln, use_reentrant):
    overrides = {"shared_adaln": shared_adaln, "drop_path_rate": 0.3, "dropout": 0.1}
    model, checkpointed = (tiny_model(**overrides).train() for _ in range(2))
    enable_activation_checkpointing(checkpointed, {"use_reentrant": use_reentrant})
    calls = []
    checkpointed.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    inputs = tiny_inputs(model.config)
    for each in (model, checkpointed):
        torch.manual_seed(0)
        each(**inputs).loss.backward()
    assert len(calls) == 2
    expected = gradients(model)
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("asked_for", ["VARCache", "DynamicCache", "use_cache"])
def test_checkpointed_training_does_without_a_cache(asked_for, use_reentrant):
    """The backward pass runs the layers again, and would find the blocks in the cache already."""
    model, checkpointed = (tiny_model(shared_adaln=True, class_dropout_prob=0.0).train() for _ in range(2))
    enable_activation_checkpointing(checkpointed, {"use_reentrant": use_reentrant})
    inputs = tiny_inputs(model.config)
    expected = model(**inputs)
    expected.loss.backward()
    cache = {"VARCache": VARCache(model.config), "DynamicCache": DynamicCache()}.get(asked_for)
    output = checkpointed(**inputs, cache=cache, use_cache=asked_for == "use_cache")
    assert torch.equal(output.logits, expected.logits)
    assert output.cache is None
    output.loss.backward()
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, gradients(model)[name], msg=name)
    if cache is not None:
        assert cache.get_seq_length() == 0
    # Without gradients nothing is run twice, so the same call fills it.
    with torch.no_grad():
        output = checkpointed(**inputs, cache=cache, use_cache=True)
    assert output.cache.get_seq_length() == 11
    assert torch.equal(output.logits, expected.logits)


def test_a_cache_that_checkpointed_layers_would_have_to_read_is_refused():
    model = tiny_model().train()
    enable_activation_checkpointing(model)
    inputs = tiny_inputs(model.config)
    cache = VARCache(model.config)
    with torch.no_grad():
        model(inputs["class_labels"], cache=cache)
    with pytest.raises(
        ValueError, match="`cache` must be empty where layers are checkpointed.* got one with 1 tokens"
    ):
        model(scale_inputs=inputs["scale_inputs"], cache=cache)
    with torch.no_grad():
        assert model(scale_inputs=inputs["scale_inputs"], cache=cache).logits.shape[1] == 10


EVERYTHING = slice(None)


def init_stds(shared_adaln, std, width, depth):
    """Ends of names, rows, and the standard deviation that the official initialisation gives them."""
    residual = std / math.sqrt(2 * depth)
    rows = [
        ("embeddings.class_embedding.weight", EVERYTHING, std),
        ("embeddings.input_proj.weight", EVERYTHING, std),
        ("embeddings.start_position", EVERYTHING, std),
        ("embeddings.level_embedding", EVERYTHING, std),
        ("embeddings.position_embedding", EVERYTHING, std),
        ("attention.q_proj.weight", EVERYTHING, std),
        ("attention.k_proj.weight", EVERYTHING, std),
        ("attention.v_proj.weight", EVERYTHING, std),
        ("attention.o_proj.weight", EVERYTHING, residual),
        ("mlp.fc1.weight", EVERYTHING, std),
        ("mlp.fc2.weight", EVERYTHING, residual),
        ("head_norm.adaln.linear.weight", EVERYTHING, 0.5 * std),
        ("head.weight", EVERYTHING, 0.02 * std),
    ]
    if shared_adaln:
        rows += [
            ("shared_adaln.linear.weight", EVERYTHING, std),
            (".adaln.offset", slice(None, 2), 1e-5 / math.sqrt(width)),
            (".adaln.offset", slice(2, None), 0.5 / math.sqrt(width)),
        ]
    else:
        for layer in range(depth):
            rows += [
                (f"layers.{layer}.adaln.linear.weight", slice(None, 2 * width), 1e-5 * std),
                (f"layers.{layer}.adaln.linear.weight", slice(2 * width, None), 0.5 * std),
            ]
    return rows


@pytest.mark.parametrize("shared_adaln", [False, True], ids=["adaln_per_layer", "shared_adaln"])
def test_initial_weights_follow_the_official_scheme(shared_adaln):
    torch.manual_seed(0)
    width, depth = 256, 4
    model = VARTransformer(
        tiny_config(
            hidden_size=width,
            num_hidden_layers=depth,
            shared_adaln=shared_adaln,
            codebook_size=512,
            latent_channels=32,
            num_labels=200,
        )
    )
    weights = dict(model.named_parameters())
    checked = set()
    for ending, rows, std in init_stds(shared_adaln, math.sqrt(1 / (3 * width)), width, depth):
        names = [name for name in weights if name.endswith(ending)]
        assert len(names) in (1, depth), ending
        checked.update(names)
        values = torch.cat([weights[name].detach()[rows].flatten() for name in names])
        # Five standard errors of a Gaussian's deviation and mean.
        error = 5 / math.sqrt(2 * values.numel())
        assert values.std().item() == pytest.approx(std, rel=error), (ending, rows)
        assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), (ending, rows)
    for name, parameter in weights.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("log_query_scale"):
            assert torch.equal(parameter, torch.full_like(parameter, math.log(4))), name
        else:
            assert name in checked, name


def test_factors_of_the_initialisation_come_from_the_configuration():
    torch.manual_seed(0)
    model = VARTransformer(
        tiny_config(
            hidden_size=64,
            initializer_range=0.3,
            initializer_head_factor=0.5,
            initializer_adaln_factor=0.2,
            initializer_adaln_gamma_factor=1e-3,
        )
    )
    linear = model.layers[0].adaln.linear.weight
    stds = (model.layers[0].mlp.fc1.weight.std(), model.head.weight.std(), linear[:128].std(), linear[128:].std())
    assert [std.item() for std in stds] == pytest.approx([0.3, 0.15, 3e-4, 0.06], rel=0.08)


def test_initial_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = VARTransformer(tiny_config(codebook_size=64))
    inputs = tiny_inputs(model.config)
    assert model(**inputs).loss.item() == pytest.approx(math.log(64), rel=1e-3)


def test_contrast_of_these_tests():
    """What every comparison here rests upon: the tiny model's predictions differ between codes, tokens and images."""
    model = tiny_model()
    with torch.no_grad():
        logits = model(**tiny_inputs(model.config)).logits
    assert min(logits.std(dim).mean() for dim in (0, 1, 2)) > 0.3


@pytest.mark.parametrize("condition_channels", [None, 5])
def test_a_dropped_embedding_is_the_unconditional_class(condition_channels):
    model = tiny_model(condition_channels=condition_channels).train()
    embeds = torch.randn(3, model.config.condition_size)
    inputs = tiny_inputs(model.config)
    inputs.pop("class_labels", None)
    unconditional = model.get_class_embeds(torch.full((3,), -1))
    with torch.no_grad():
        for probability, expected in ((1.0, unconditional), (0.0, embeds)):
            model.config.class_dropout_prob = probability
            found = model.train()(class_embeds=embeds, **inputs).logits
            torch.testing.assert_close(found, model.eval()(class_embeds=expected, **inputs).logits)
    # Every parameter has a gradient, which distributed training waits for.
    model.train()(class_embeds=embeds, **inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_embeddings_of_another_width_are_named():
    model = tiny_model(condition_channels=5)
    with pytest.raises(ValueError, match=r"`class_embeds` must have the shape \(batch, 5\), got \(2, 32\)"):
        model(class_embeds=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="`condition_channels` must be at least 1, got 0"):
        tiny_model(condition_channels=0)
