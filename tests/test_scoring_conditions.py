# SPDX-License-Identifier: Apache-2.0
"""Likelihoods under texts, embeddings and other images' codes: the same sums, whatever the condition is."""

import itertools

import pytest
import torch

from hf_var import EMOJI_CHECKPOINT, VARTextToImagePipeline
from hf_var.scoring import classify, log_likelihood
from pipelines.stacked import image_pipeline, make_raster, make_stacked, text_pipeline
from pipelines.texts import PROMPTS, embeddings_of, make_text_pipeline
from pipelines.tiny import make_pipeline, seeded


@pytest.fixture
def codes():
    """Of three images."""
    return torch.randint(32, (3, 21), generator=seeded())


def given_by(embeddings):
    return {name: value for name, value in embeddings.items() if not name.startswith("negative")}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"is_causal": True}, {"crop_conditioning": False}])
def test_texts_are_scored_by_the_teacher_forced_logits(codes, fields):
    pipe = make_text_pipeline(transformer=fields)
    found = log_likelihood(pipe, codes=codes, prompt=PROMPTS)
    states, _, pooled, _, mask, _ = pipe.encode_prompt(PROMPTS)
    crops = {"crop_sizes": torch.full((3, 2), 512)} if pipe.transformer.config.crop_conditioning else {}
    logits = pipe.transformer(
        states, mask, pooled, scale_inputs=pipe.vqvae.teacher_forcing(codes), **crops
    ).logits.double()
    expected = logits.log_softmax(dim=-1).gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(found.per_token.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.per_scale.double(), torch.stack([s.sum(1) for s in expected.split([1, 4, 16], 1)], 1)
    )
    torch.testing.assert_close(found.total.double(), expected.sum(dim=1))
    # The text matters, or the numbers above would say nothing.
    other = log_likelihood(pipe, codes=codes, prompt="")
    assert ((other.total - found.total).abs() > 0.01).all()


def test_one_text_serves_all_and_images_do_not_depend_on_their_batch(codes):
    pipe = make_text_pipeline()
    one_for_all = log_likelihood(pipe, codes=codes, prompt=PROMPTS[0])
    repeated = log_likelihood(pipe, codes=codes, prompt=PROMPTS[:1] * 3, batch_size=2)
    torch.testing.assert_close(one_for_all.per_token, repeated.per_token, atol=1e-5, rtol=1e-5)
    single = log_likelihood(pipe, codes=codes[1:2], prompt=PROMPTS[0])
    torch.testing.assert_close(single.per_token, one_for_all.per_token[1:2], atol=1e-5, rtol=1e-5)


def test_embeddings_are_scored_like_their_texts(codes):
    pipe = make_text_pipeline()
    expected = log_likelihood(pipe, codes=codes, prompt=PROMPTS)
    embeddings = given_by(embeddings_of(pipe, PROMPTS))
    found = log_likelihood(make_text_pipeline(has_encoders=False), codes=codes, **embeddings)
    torch.testing.assert_close(found.per_token, expected.per_token)
    sizes = log_likelihood(pipe, codes=codes, prompt=PROMPTS, original_size=(300, 900))
    assert not torch.allclose(sizes.total, expected.total)


def test_probabilities_under_a_text_add_up_to_one():
    pipe = make_text_pipeline(codebook_size=3, patch_nums=(1, 2))
    codes = torch.tensor(list(itertools.product(range(3), repeat=5)))
    total = log_likelihood(pipe, codes=codes, prompt=PROMPTS[0], batch_size=100).total.double()
    assert total.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_best_of_several_texts(codes):
    pipe = make_text_pipeline()
    found = classify(pipe, codes=codes, prompt=PROMPTS, batch_size=4)
    columns = [log_likelihood(pipe, codes=codes, prompt=text).total for text in PROMPTS]
    torch.testing.assert_close(found.log_likelihood, torch.stack(columns, dim=1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.posterior, found.log_likelihood.softmax(dim=1))
    assert found.label_names == [PROMPTS[number] for number in found.label_ids.tolist()]
    weighted = classify(pipe, codes=codes, prompt=PROMPTS, prior=[0, 1, 0])
    assert weighted.label_names == [PROMPTS[1]] * 3
    embedded = classify(pipe, codes=codes, **given_by(embeddings_of(pipe, PROMPTS)))
    torch.testing.assert_close(embedded.posterior, found.posterior, atol=1e-4, rtol=1e-4)
    assert embedded.label_names == [str(number) for number in found.label_ids.tolist()]


def test_emoji_are_taken_for_what_was_asked_for():
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red heart", "a green apple", "smiling face with sunglasses"]
    images = pipe(prompts, generator=seeded()).images
    assert classify(pipe, images, prompt=prompts).label_names == prompts


@torch.no_grad()
def test_class_embeddings_are_scored_like_their_labels(codes):
    pipe = make_pipeline()
    embeddings = pipe.get_class_embeds([0, 3, None])
    expected = log_likelihood(pipe, codes=codes, class_labels=[0, 3, None])
    found = log_likelihood(pipe, codes=codes, class_embeds=embeddings)
    torch.testing.assert_close(found.per_token, expected.per_token)
    raster = make_raster()
    codes = codes[:, :16]
    expected = log_likelihood(raster, codes=codes, class_labels=2)
    found = log_likelihood(raster, codes=codes, class_embeds=raster.prior.get_class_embeds(torch.tensor([2])))
    torch.testing.assert_close(found.per_token, expected.per_token)


def test_prompts_of_classes_are_labels(codes):
    pipe = make_pipeline()
    found = log_likelihood(pipe, codes=codes, prompt=["goldfish", "3", ""])
    expected = log_likelihood(pipe, codes=codes, class_labels=[1, 3, None])
    assert torch.equal(found.per_token, expected.per_token)
    assert classify(pipe, codes=codes, prompt=["goldfish"]).label_names == ["goldfish"] * 3
    with pytest.raises(ValueError, match="did you mean 'goldfish'"):
        log_likelihood(pipe, codes=codes, prompt="goldfisch")


def test_models_of_embeddings(codes):
    pipe = make_pipeline(transformer={"num_labels": 0, "condition_channels": 8})
    vectors = torch.randn(3, 8, generator=seeded())
    found = log_likelihood(pipe, codes=codes, class_embeds=vectors)
    assert not torch.allclose(found.total, log_likelihood(pipe, codes=codes, class_embeds=vectors.flip(0)).total)
    assert not torch.allclose(found.total, log_likelihood(pipe, codes=codes).total)
    best = classify(pipe, codes=codes, class_embeds=vectors)
    torch.testing.assert_close(best.log_likelihood.diagonal(), found.total, atol=1e-4, rtol=1e-5)


def test_stacks_are_scored_under_texts_and_images():
    pipe = text_pipeline()
    codes = torch.randint(
        pipe.prior.config.codebook_size, (2, sum(pipe.vqvae.config.scale_lengths)), generator=seeded()
    )
    thin, three = (log_likelihood(pipe, codes=codes, prompt=text) for text in ("a thin three", "a three"))
    assert not torch.allclose(thin.total, three.total)
    best = classify(pipe, codes=codes, prompt=["a thin three", "a three"])
    torch.testing.assert_close(
        best.log_likelihood, torch.stack([thin.total, three.total], dim=1), atol=1e-4, rtol=1e-5
    )

    pipe = image_pipeline()
    codes = torch.randint(
        pipe.prior.config.codebook_size, (2, sum(pipe.vqvae.config.scale_lengths)), generator=seeded()
    )
    height, width = pipe.condition_vqvae.config.image_size
    images = torch.rand(2, 3, height, width, generator=seeded())
    found = log_likelihood(pipe, codes=codes, condition_image=images)
    by_codes = log_likelihood(pipe, codes=codes, condition_codes=pipe.encode_conditions(images))
    assert torch.equal(found.per_token, by_codes.per_token)
    assert not torch.allclose(found.total, log_likelihood(pipe, codes=codes, condition_image=images.flip(0)).total)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "`prompt` must be a text or a list of texts, got None"),
        ({"prompt": ["a", "b"]}, ValueError, "`prompt` must be one condition or 3, one per image, got 2"),
        ({"prompt": 3}, ValueError, "`prompt` must be a text"),
        ({"prompt": "a", "class_labels": 3}, ValueError, "`class_labels` must be None for a pipeline of texts"),
        ({"prompt_embeds": torch.zeros(1, 4, 40)}, ValueError, "`pooled_prompt_embeds` must be passed beside"),
        ({"class_embeds": torch.zeros(1, 4)}, TypeError, "`log_likelihood` got an unexpected keyword argument"),
        ({"prompts": "a"}, TypeError, "did you mean `prompt`"),
    ],
)
def test_wrong_conditions_of_texts(codes, options, error, message):
    with pytest.raises(error, match=message):
        log_likelihood(make_text_pipeline(), codes=codes, **options)


def test_conditions_that_a_pipeline_does_not_know(codes):
    with pytest.raises(TypeError, match="unexpected keyword argument 'condition_codes'"):
        classify(make_pipeline(), codes=codes, condition_codes=codes)
    with pytest.raises(ValueError, match="got num_labels=0: pass `prompt`"):
        classify(make_text_pipeline(), codes=codes)
    stacked = make_stacked()
    codes = torch.zeros(1, sum(stacked.vqvae.config.scale_lengths), dtype=torch.long)
    with pytest.raises(ValueError, match="`condition_codes` must be integers of the shape"):
        log_likelihood(stacked, codes=codes, condition_codes="a three")
    both = torch.zeros(1, 21, dtype=torch.long)
    with pytest.raises(ValueError, match="Pass one of `class_labels` and `class_embeds`, not both"):
        log_likelihood(make_pipeline(), codes=both, class_labels=1, class_embeds=torch.zeros(1, 32))
