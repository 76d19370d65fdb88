# SPDX-License-Identifier: Apache-2.0
"""Likelihoods: sums over tokens by hand, sums over all code sequences, and Bayes' rule on top of them."""

import importlib
import itertools
import math
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import DIGITS_CHECKPOINT, VARCache, VARPipeline
from hf_var.scoring import classify, log_likelihood
from pipelines.tiny import make_pipeline, seeded


LENGTHS = [1, 4, 16]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def pipe():
    return make_pipeline()


@pytest.fixture
def codes():
    """Of five images."""
    return torch.randint(32, (5, 21), generator=seeded())


@pytest.fixture
def images():
    """Five of 8x8 pixels, of 8 bits, `(batch, height, width, channels)` in [0, 1]."""
    return (np.random.default_rng(0).integers(256, size=(5, 8, 8, 3)) / 255).astype(np.float32)


def pictures(images):
    return [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in images]


def calls_of(model):
    """Batch sizes of the calls of a module, noted as they come."""
    sizes = []
    model.register_forward_hook(lambda module, args, kwargs, output: sizes.append(len(output[0])), with_kwargs=True)
    return sizes


@torch.no_grad()
def test_it_is_the_sum_of_teacher_forced_log_probabilities(pipe, codes):
    labels = [3, 0, 0, 4, 5]
    found = log_likelihood(pipe, codes=codes, class_labels=labels)
    logits = pipe.transformer(torch.tensor(labels), pipe.vqvae.teacher_forcing(codes)).logits.double()
    for image, tokens in enumerate(codes.tolist()):
        expected = [
            logits[image, position, token].item() - math.log(logits[image, position].exp().sum().item())
            for position, token in enumerate(tokens)
        ]
        assert found.per_token[image].tolist() == pytest.approx(expected, abs=1e-5)
        assert found.per_scale[image].tolist() == pytest.approx(
            [sum(expected[:1]), sum(expected[1:5]), sum(expected[5:])], rel=1e-5
        )
        assert found.total[image].item() == pytest.approx(sum(expected), rel=1e-5)
    assert torch.equal(found.codes, codes)
    # The model has an opinion, or the numbers above would say nothing.
    assert found.per_token.std() > 0.5


@pytest.mark.parametrize("label", [0, 2, None])
def test_probabilities_of_all_code_sequences_add_up_to_one(label):
    pipe = make_pipeline(codebook_size=3, patch_nums=(1, 2))
    codes = torch.tensor(list(itertools.product(range(3), repeat=5)))  # (243, 5)
    found = log_likelihood(pipe, codes=codes, class_labels=label, batch_size=100)
    probabilities = found.total.double().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert probabilities.max() > 5 / 243
    # So do those of the second scale, given each code of the first.
    assert found.per_scale[:, 1].double().exp().view(3, 81).sum(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)


def test_drawn_codes_come_as_often_as_their_likelihood_says():
    # What links scoring with sampling: two ways through the model that share little code.
    pipe = make_pipeline(codebook_size=2, patch_nums=(1, (1, 2)))
    number = 4000
    drawn = pipe(
        2,
        num_images_per_label=number,
        guidance_scale=1.0,
        top_k=0,
        top_p=1.0,
        generator=seeded(),
        output_type="latent",
    ).codes
    codes = torch.tensor(list(itertools.product(range(2), repeat=3)))
    expected = log_likelihood(pipe, codes=codes, class_labels=2).total.exp() * number
    counts = (drawn[:, None] == codes).all(dim=2).sum(dim=0)
    # Chi-square with 7 degrees of freedom: above 24.3 once in a thousand seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 24.3
    other = log_likelihood(pipe, codes=codes, class_labels=3).total.exp() * number
    assert ((counts - other) ** 2 / other).sum() > 100


@torch.no_grad()
def test_one_pass_equals_stepping_with_the_cache(pipe, codes):
    labels = torch.tensor([0, 1, 2, 3, 5])
    cache, latents, scale_inputs, parts = VARCache(pipe.transformer.config), None, None, []
    for k, scale_codes in enumerate(codes.split(LENGTHS, dim=1)):
        logits = pipe.transformer(labels if k == 0 else None, scale_inputs, cache=cache).logits
        parts.append(logits.log_softmax(dim=-1).gather(-1, scale_codes[..., None])[..., 0])
        latents, scale_inputs = pipe.vqvae.next_scale(latents, scale_codes, k)
    found = log_likelihood(pipe, codes=codes, class_labels=labels)
    torch.testing.assert_close(found.per_token, torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, np.int64(2), 7, 10**30])
def test_the_batch_size_does_not_matter(pipe, images, batch_size):
    labels = [0, 3, None, 1, 2]
    expected = log_likelihood(pipe, images, labels)
    sizes = calls_of(pipe.transformer)
    found = log_likelihood(pipe, images, labels, batch_size=batch_size)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.per_token, expected.per_token, atol=1e-5, rtol=1e-5)
    assert sum(sizes) == 5
    assert max(sizes) <= batch_size

    posterior = classify(pipe, images).posterior
    sizes.clear()
    torch.testing.assert_close(classify(pipe, images, batch_size=batch_size).posterior, posterior)
    assert sum(sizes) == 25
    assert max(sizes) <= batch_size


def test_images_are_encoded_once_and_scored_like_their_codes(pipe, images):
    encoded = calls_of(pipe.vqvae.encoder)
    found = classify(pipe, images)
    assert len(encoded) == 1
    codes = log_likelihood(pipe, images).codes
    assert len(set(codes[:, 1].tolist())) > 1
    for given in (pictures(images), torch.from_numpy(images).movedim(-1, 1), list(images)):
        assert torch.equal(log_likelihood(pipe, given).codes, codes)
    encoded.clear()
    by_codes = classify(pipe, codes=codes)
    assert encoded == []
    assert torch.equal(by_codes.posterior, found.posterior)


def test_labels_are_ids_names_or_none(pipe, codes):
    def total(labels):
        return log_likelihood(pipe, codes=codes, class_labels=labels).total

    assert torch.equal(total("goldfish"), total([1] * 5))
    assert torch.equal(total(None), total(-1))
    assert torch.equal(total(None), total([5] * 5))
    assert torch.equal(total([None, 1, 1, 1, 1])[1:], total(1)[1:])
    assert not torch.allclose(total(None), total(1))
    table = classify(pipe, codes=codes).log_likelihood
    torch.testing.assert_close(table, torch.stack([total(label) for label in range(5)], dim=1))


def test_models_in_training_are_scored_without_dropout_and_stay_in_training(images):
    pipe = make_pipeline(
        transformer={"class_dropout_prob": 0.9, "dropout": 0.5, "label_smoothing": 0.3}, vqvae={"dropout": 0.5}
    )
    codes = log_likelihood(pipe, images).codes
    expected = classify(pipe, codes=codes).log_likelihood
    pipe.transformer.train()
    pipe.vqvae.train()
    assert not torch.equal(pipe.vqvae.encode(torch.from_numpy(images).movedim(-1, 1) * 2 - 1).codes, codes)
    assert torch.equal(log_likelihood(pipe, images).codes, codes)
    assert torch.equal(classify(pipe, codes=codes).log_likelihood, expected)
    assert all(module.training for model in pipe.components.values() for module in model.modules())
    assert not log_likelihood(pipe, codes=codes).total.requires_grad


@pytest.mark.parametrize("schedule", [(4,), (1, (1, 2), (2, 4)), (2, 2, 2)])
def test_other_schedules(schedule):
    pipe = make_pipeline(patch_nums=schedule)
    codes = torch.randint(32, (2, pipe.transformer.config.length), generator=seeded())
    found = log_likelihood(pipe, codes=codes, class_labels=[0, 1])
    assert found.per_scale.shape == (2, len(schedule))
    torch.testing.assert_close(found.per_scale.sum(dim=1), found.per_token.sum(dim=1))


def test_offloaded_models(pipe, images):
    expected = classify(pipe, images)
    for component in pipe.components.values():
        accelerate.cpu_offload(component, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(classify(pipe, images).posterior, expected.posterior)
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}


def test_half_precision_is_summed_up_in_full(pipe, codes):
    expected = log_likelihood(pipe, codes=codes, class_labels=1)
    pipe.to(torch.bfloat16)
    found = log_likelihood(pipe, codes=codes, class_labels=1)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, expected.total, rtol=0.05, atol=0.5)
    torch.testing.assert_close(found.total, found.per_token.sum(dim=1))


# --------------------------------------------------------------------------------------------------------------------
# Bayes' rule


def test_the_posterior_is_that_of_bayes(pipe, codes):
    found = classify(pipe, codes=codes)
    likelihood = (found.log_likelihood.double() - found.log_likelihood.double().max()).exp()
    torch.testing.assert_close(found.posterior.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(
        found.posterior.double(), likelihood / likelihood.sum(1, keepdim=True), atol=1e-5, rtol=0
    )
    assert torch.equal(found.label_ids, found.log_likelihood.argmax(dim=1))
    assert found.label_names == [pipe.transformer.config.id2label[label] for label in found.label_ids.tolist()]

    # The prior that evens the first image's likelihoods out leaves every class equally probable.
    prior = 1 / likelihood[0]
    evened = classify(pipe, codes=codes, prior=prior)
    assert evened.posterior[0].tolist() == pytest.approx([0.2] * 5, abs=1e-4)
    weighted = likelihood * prior
    torch.testing.assert_close(evened.posterior.double(), weighted / weighted.sum(1, keepdim=True), atol=1e-4, rtol=0)
    assert torch.equal(evened.log_likelihood, found.log_likelihood)
    # Up to a factor.
    for same in (np.full(5, 7.0), [0.2] * 5, torch.ones(5)):
        torch.testing.assert_close(classify(pipe, codes=codes, prior=same).posterior, found.posterior)


def test_classes_of_prior_zero_are_left_out(pipe, codes):
    everything = classify(pipe, codes=codes)
    sizes = calls_of(pipe.transformer)
    found = classify(pipe, codes=codes, prior=[0, 0.5, 0, 0.5, 0])
    assert sum(sizes) == 10
    assert torch.equal(found.posterior[:, [0, 2, 4]], torch.zeros(5, 3))
    assert found.log_likelihood[:, [0, 2, 4]].isnan().all()
    kept = everything.posterior[:, [1, 3]]
    torch.testing.assert_close(found.posterior[:, [1, 3]], kept / kept.sum(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert set(found.label_ids.tolist()) <= {1, 3}


def test_real_digits_are_classified_by_a_model_that_only_draws(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("digits_classification")
    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    _, (images, labels) = benchmark.load_halves()
    few = slice(None, None, 15)
    figures = benchmark.measure(pipe, benchmark.enlarge(images[few]), labels[few])
    assert figures["images"] == 60
    assert figures["accuracy"] > 0.9
    assert figures["up_to_this_scale"][-1] == figures["accuracy"]
    # One token tells little.
    assert figures["up_to_this_scale"][0] < 0.6


# --------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Pass exactly one of `images` and `codes`"),
        ({"codes": torch.zeros(2, 21).long(), "images": torch.zeros(2, 3, 8, 8)}, "Pass exactly one of"),
        (
            {"codes": torch.zeros(2, 20).long()},
            r"`codes` must be integers of the shape \(batch, 21\), got .* \(2, 20\)",
        ),
        ({"codes": torch.zeros(2, 21)}, "`codes` must be integers of the shape .* got torch.float32"),
        ({"codes": torch.zeros(0, 21).long()}, r"`codes` must be integers of the shape \(batch, 21\)"),
        ({"codes": torch.full((2, 21), 32)}, r"`codes` must be in \[0, 32\), got values from 32 to 32"),
        ({"codes": torch.full((2, 21), -1)}, r"`codes` must be in \[0, 32\), got values from -1 to -1"),
        ({"images": torch.zeros(2, 1, 8, 8)}, r"`images` must have the shape \(batch, 3, height, width\)"),
        ({"images": torch.zeros(2, 3, 8, 8) - 1}, r"`images` must be in \[0, 1\]"),
        ({"images": []}, "`images` must be at least one image"),
        ({"images": torch.zeros(2, 3, 8, 8), "batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_wrong_input_of_either(pipe, options, message):
    for function in (log_likelihood, classify):
        with pytest.raises(ValueError, match=message):
            function(pipe, **options)


def test_wrong_labels_priors_and_models(pipe, codes):
    for labels, message in (
        ([0, 1], "`class_labels` must be one label or 5, one per image, got 2"),
        (6, r"`class_labels` must be in \[0, 5\)"),
        ("goldfisch", "did you mean 'goldfish'"),
    ):
        with pytest.raises(ValueError, match=message):
            log_likelihood(pipe, codes=codes, class_labels=labels)
    for prior in ([1, 1], [1, 1, 1, 1, -1], [0] * 5, [1, 1, 1, 1, math.nan], [1, 1, 1, 1, math.inf], [[1] * 5]):
        with pytest.raises(ValueError, match="`prior` must hold 5 numbers of at least 0, one per label and not all 0"):
            classify(pipe, codes=codes, prior=prior)
    unconditional = make_pipeline(transformer={"num_labels": 0})
    assert log_likelihood(unconditional, codes=codes).total.shape == (5,)
    with pytest.raises(ValueError, match="`pipe` must have a transformer of several classes, got num_labels=0"):
        classify(unconditional, codes=codes)
    with pytest.raises(ValueError, match="`pipe` must be a pipeline such as `VARPipeline`, got VARTransformer"):
        log_likelihood(pipe.transformer, codes=codes)
