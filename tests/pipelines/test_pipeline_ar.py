# SPDX-License-Identifier: Apache-2.0
"""Position by position: the pipeline of raster-order priors, for one level and for two."""

import inspect

import pytest
import torch
from diffusers import DiffusionPipeline

from hf_var import ARPipeline, VARPipeline
from hf_var.pipelines.sampling import filter_logits
from hf_var.scoring import classify, log_likelihood
from pipelines.tiny import seeded
from pipelines.tiny_ar import LABELS, make_pipeline, make_pixelcnn, make_pixelsnail, make_tokenizer


def naive_codes(pipe, labels, seed, weight=1.0, top_k=0, temperature=1.0):
    """The whole map again for every code, by `torch.multinomial`."""
    source, levels = seeded(seed), []
    labels = torch.tensor(labels)
    for prior in pipe.priors:
        codes = torch.zeros(len(labels), prior.config.length, dtype=torch.long)
        condition = {"condition_codes": levels[-1]} if levels else {}
        for place in range(prior.config.length):
            logits = prior(codes, labels, **condition).logits[:, place]
            if weight != 1:
                without = prior(codes, torch.full_like(labels, -1), **condition).logits[:, place]
                logits = weight * logits + (1 - weight) * without
            probabilities = filter_logits(logits / temperature, top_k, 0).softmax(-1)
            codes[:, place] = torch.multinomial(probabilities, 1, generator=source)[:, 0]
        levels.append(codes)
    return torch.cat(levels, dim=1)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("options", [{}, {"weight": 3.0}, {"top_k": 4, "temperature": 0.7}])
def test_samples_are_those_of_the_naive_loop(levels, options):
    pipe = make_pipeline(levels)
    arguments = {"guidance_scale" if name == "weight" else name: value for name, value in options.items()}
    codes = pipe([0, 1, 2, 2], generator=seeded(), **arguments).codes
    assert codes.equal(naive_codes(pipe, [0, 1, 2, 2], 0, **options))
    assert len(codes.unique()) > 4


@pytest.mark.parametrize("levels", [1, 2])
def test_images_are_those_of_the_codes(levels):
    pipe = make_pipeline(levels)
    output = pipe(["LABEL_1", 2], num_images_per_label=2, generator=seeded(), output_type="pt")
    assert output.images.shape == (4, 1, 8, 8)
    assert output.images.std() > 0.01
    torch.testing.assert_close(output.images, pipe.vqvae.decode(output.codes).sample / 2 + 0.5)
    latents = pipe(["LABEL_1", 2], num_images_per_label=2, generator=seeded(), output_type="latent").images
    torch.testing.assert_close(pipe.vqvae.decode(latents=latents).sample / 2 + 0.5, output.images)


def test_a_generator_for_each_image_makes_it_independent_of_its_batch():
    pipe = make_pipeline(2)
    together = pipe([0, 1, 2], generator=[seeded(seed) for seed in (5, 6, 7)], guidance_scale=2.0).codes
    alone = [pipe(label, generator=[seeded(5 + label)], guidance_scale=2.0).codes for label in range(3)]
    assert together.equal(torch.cat(alone))


def test_values_per_level():
    pipe = make_pipeline(2)
    # One code is left to choose from in the coarse level, all in the fine one.
    codes = pipe([0] * 32, generator=seeded(), top_k=[1, 0]).codes
    assert len(codes[:, :4].unique(dim=0)) == 1
    assert len(codes[:, 4:].unique(dim=0)) > 20
    weights = []
    pipe(0, generator=seeded(), guidance_scale=lambda k, levels: weights.append((k, levels)) or 1.0)
    assert set(weights) == {(0, 2), (1, 2)}
    with pytest.raises(ValueError, match="`temperature` must be one value or 2, one per scale, got 3"):
        pipe(0, temperature=[1.0, 1.0, 1.0])


def test_a_model_without_classes():
    pipe = ARPipeline(make_tokenizer(), make_pixelcnn(num_labels=0, class_dropout_prob=0.0))
    assert pipe(generator=seeded(), guidance_scale=3.0).codes.equal(pipe(generator=seeded()).codes)
    with pytest.raises(ValueError, match="`class_labels` must be left out"):
        pipe(1)


# --- callbacks and candidates ----------------------------------------------------------------------------------------


def test_callbacks_see_every_row():
    pipe, seen = make_pipeline(2), []

    def look(pipe, step, k, tensors):
        seen.append((step, k, tensors["codes"].shape[1], tensors["images"].shape))
        assert pipe.num_timesteps == 6
        assert pipe.guidance_scale == 1.5

    arguments = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["codes", "images"]}
    codes = pipe([0, 1], generator=seeded(), guidance_scale=1.5, **arguments).codes
    image = torch.Size([2, 1, 8, 8])
    assert seen == [(0, 0, 2, image), (1, 0, 4, image), *((2 + row, 1, 8 + 4 * row, image) for row in range(4))]
    assert codes.equal(pipe([0, 1], generator=seeded(), guidance_scale=1.5).codes)


def test_an_interrupted_call_returns_what_there_is():
    pipe = make_pipeline(2)

    def stop(pipe, step, k, tensors):
        assert tensors.keys() == {"codes"}
        pipe._interrupt = step == 3

    output = pipe([0, 1], generator=seeded(), callback_on_step_end=stop, output_type="pt")
    whole = pipe([0, 1], generator=seeded()).codes
    assert output.codes.equal(whole[:, :12])
    assert output.images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("candidate", [0, 1])
def test_an_interrupt_ends_the_candidates_as_well(candidate):
    pipe, rows = make_pipeline(2), []

    def stop(pipe, step, k, tensors):
        rows.append(step)
        pipe._interrupt = len(rows) == 6 * candidate + 2

    arguments = {"num_candidates": 3, "score_fn": lambda images, labels: images.mean((1, 2, 3))}
    codes = pipe([0, 1], generator=seeded(), callback_on_step_end=stop, **arguments).codes
    whole = pipe([0, 1], generator=seeded()).codes
    assert len(rows) == 6 * candidate + 2
    assert codes.equal(whole if candidate else whole[:, :4])


def test_missing_codes_are_vectors_of_zeros():
    pipe = make_pipeline(2)
    codes = pipe([0, 1], generator=seeded()).codes
    first, last = pipe.decode_progress(codes, output_type="pt")
    vqvae = pipe.vqvae
    torch.testing.assert_close(first, vqvae.decode(codes, num_scales=1).sample / 2 + 0.5)
    torch.testing.assert_close(last, vqvae.decode(codes).sample / 2 + 0.5)
    with pytest.raises(ValueError, match=r"`codes` must be integers of the shape \(batch, 20\)"):
        pipe.decode_progress(codes[:, :4])


def test_the_best_of_several_candidates_is_kept():
    pipe = make_pipeline()

    def brightness(images, labels):
        assert labels.tolist() == [0, 2]
        return images.mean(dim=(1, 2, 3))

    best = pipe([0, 2], generator=seeded(), num_candidates=8, score_fn=brightness, output_type="pt")
    source = seeded()
    each = [pipe([0, 2], generator=source, output_type="pt") for _ in range(8)]
    scores = torch.stack([output.images.mean(dim=(1, 2, 3)) for output in each])
    for index, winner in enumerate(scores.argmax(dim=0).tolist()):
        assert best.images[index].equal(each[winner].images[index])
        assert best.codes[index].equal(each[winner].codes[index])


# --- folders and likelihoods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2])
def test_a_folder_gives_the_same_pipeline(tmp_path, levels):
    pipe = make_pipeline(levels, guidance_scale=1.5, temperature=0.9)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is ARPipeline
    assert loaded.config["guidance_scale"] == 1.5
    loaded.set_progress_bar_config(disable=True)
    assert loaded([1, 2], generator=seeded()).codes.equal(pipe([1, 2], generator=seeded()).codes)


@pytest.mark.parametrize("levels", [1, 2])
def test_likelihoods_are_those_that_sampling_follows(levels):
    pipe = make_pipeline(levels)
    codes = pipe([0, 1], generator=seeded()).codes
    found = log_likelihood(pipe, codes=codes, class_labels=[0, 1])
    sizes = pipe.vqvae.config.scale_lengths
    assert found.per_scale.shape == (2, levels)
    pieces, previous, expected = codes.split(sizes, dim=1), {}, []
    for prior, level in zip(pipe.priors, pieces, strict=True):
        logits = prior(level, torch.tensor([0, 1]), **previous).logits.log_softmax(-1)
        expected.append(logits.gather(2, level[..., None])[..., 0])
        previous = {"condition_codes": level}
    torch.testing.assert_close(found.per_token, torch.cat(expected, dim=1))
    torch.testing.assert_close(found.total, torch.cat(expected, dim=1).sum(dim=1))


def test_classification_is_bayes_rule():
    pipe = make_pipeline(2)
    codes = pipe([0, 1, 2], generator=seeded()).codes
    found = classify(pipe, codes=codes, batch_size=2)
    totals = torch.stack(
        [log_likelihood(pipe, codes=codes, class_labels=label).total for label in range(LABELS)], dim=1
    )
    torch.testing.assert_close(found.posterior, totals.softmax(dim=1))
    assert totals.std(dim=1).min() > 0.1
    assert found.label_names == [pipe.id2label[label] for label in found.label_ids.tolist()]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"prior": lambda: make_pixelcnn(map_size=2)}, r"map_size is \(2, 2\) in the prior, .* needs \(4, 4\)"),
        ({"vqvae": lambda: make_tokenizer(codebook_size=16)}, "codebook_size is 12 in the prior, .* needs 16"),
        ({"vqvae": lambda: make_tokenizer((2, 4))}, "`vqvae` has 2 levels, which need as many priors, got prior"),
        ({"bottom_prior": make_pixelcnn}, "`vqvae` has 1 levels, .* got prior, bottom_prior"),
        ({"vqvae": make_pixelcnn}, "`vqvae` must be a tokenizer"),
        ({"prior": make_tokenizer}, "map_size is None in the prior"),
        ({"prior": lambda: torch.nn.Linear(1, 1)}, "map_size is None in the prior"),
        ({"prior": lambda: make_pixelsnail(map_size=4, condition_map_size=2)}, "condition_map_size is .* needs None"),
        ({"temperature": 0.0}, "`temperature` must be a number above 0"),
    ],
)
def test_models_that_do_not_belong_together(parts, message):
    made = {name: part() if callable(part) else part for name, part in parts.items()}
    with pytest.raises(ValueError, match=message):
        ARPipeline(**{"vqvae": make_tokenizer(), "prior": make_pixelcnn()} | made)


def test_levels_that_do_not_belong_together():
    tokenizer, top = make_tokenizer((2, 4)), make_pixelsnail(map_size=2)
    with pytest.raises(ValueError, match=r"`bottom_prior` .* condition_map_size is None in the prior, .* \(2, 2\)"):
        ARPipeline(tokenizer, top, bottom_prior=make_pixelsnail(map_size=4))
    other = make_pixelsnail(map_size=4, condition_map_size=2, num_labels=2)
    with pytest.raises(ValueError, match="`bottom_prior` must have the labels of `prior`"):
        ARPipeline(tokenizer, top, bottom_prior=other)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_labels": 3 + 1}, ValueError, "`class_labels` must be in"),
        ({"top_k": 13}, ValueError, "`top_k` must be from 1 to codebook_size=12"),
        ({"output_type": "jpg"}, ValueError, "`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, ValueError, "must be among"),
        ({"smooth": True}, TypeError, "unexpected keyword argument 'smooth'"),
        ({"class_embeds": torch.zeros(1, 4)}, ValueError, "`class_embeds` need a VARTransformer"),
        ({"generator": [seeded()] * 2}, ValueError, "`generator` must be one generator or 1"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make_pipeline()(**{"class_labels": 1} | arguments)


def test_a_prior_that_never_saw_images_without_a_class():
    pipe = ARPipeline(make_tokenizer(), make_pixelcnn(class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="`class_labels` must be classes: .* without class dropout"):
        pipe()
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 for a prior .* without class dropout, got 2.0"):
        pipe(1, guidance_scale=2.0)
    assert pipe(1, generator=seeded()).codes.shape == (1, 16)
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 for a prior .* without class dropout, got 1.5"):
        ARPipeline(make_tokenizer(), make_pixelcnn(class_dropout_prob=0.0), guidance_scale=1.5)


def test_a_fine_prior_that_never_saw_images_without_a_class():
    fine = make_pixelsnail(1, map_size=4, condition_map_size=2, attention=False, class_dropout_prob=0.0)
    pipe = ARPipeline(make_tokenizer((2, 4)), make_pixelsnail(map_size=2), bottom_prior=fine)
    for arguments in ({"class_labels": None}, {"class_labels": 1, "guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="without class dropout"):
            pipe(**arguments, callback_on_step_end=lambda *seen: pytest.fail("nothing is sampled before the check"))
    assert pipe(1, generator=seeded(), guidance_scale=lambda k, levels: 2.0 - k).codes.shape == (1, 20)


def test_defaults_that_help_shows():
    shown = inspect.signature(ARPipeline.__call__).parameters
    assert shown["callback_on_step_end_tensor_inputs"].default == ("codes",)
    assert "smooth" not in shown


def test_a_pipeline_of_other_models():
    with pytest.raises(ValueError, match="`pipeline` must have transformer for a VARPipeline, got a ARPipeline"):
        VARPipeline.from_pipe(make_pipeline())
