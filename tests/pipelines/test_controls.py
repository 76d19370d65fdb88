# SPDX-License-Identifier: Apache-2.0
"""Control over sampling: guidance and filters by scale, logits processors, refiners, the best of several draws."""

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_var import VARConfig, VARTransformer
from pipelines.tiny import make_pipeline


PATCH_NUMS = (1, 2, 3, 4)
LENGTHS = [1, 4, 9, 16]


@pytest.fixture
def pipe():
    return make_pipeline(patch_nums=PATCH_NUMS)


def draw(pipe, labels=(0, 1), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipe(list(labels), generator=generator, output_type="pt", **options)


def tokens_seen(pipe) -> Counter:
    """How many tokens the layers computed, by batch size and length of the call."""
    seen = Counter()

    def count(module, args, kwargs, output):
        seen[tuple(output.logits.shape[:2])] += 1

    pipe.transformer.register_forward_hook(count, with_kwargs=True)
    return seen


def test_linear_guidance_as_a_callable_is_that_of_the_number(pipe):
    expected = draw(pipe, guidance_scale=3.0)
    found = draw(pipe, guidance_scale=lambda k, num_scales: 1 + 2.0 * k / (num_scales - 1))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.images, expected.images)


def test_a_callable_that_is_one_costs_half_and_changes_nothing(pipe):
    expected = draw(pipe, guidance_scale=1.0)
    seen = tokens_seen(pipe)
    found = draw(pipe, guidance_scale=lambda k, num_scales: 1.0)
    assert torch.equal(found.images, expected.images)
    assert seen == {(2, length): 1 for length in LENGTHS}


def test_the_unconditional_half_ends_with_the_last_guided_scale(pipe):
    # It is needed at the first scale, which is not guided: the second one reads its keys.
    seen = tokens_seen(pipe)
    found = draw(pipe, guidance_scale=lambda k, num_scales: 4.0 if k == 1 else 1.0)
    assert seen == {(4, 1): 1, (4, 4): 1, (2, 9): 1, (2, 16): 1}

    # The same by hand, with both halves to the end.
    def guide(pipeline, k, step, tensors):
        pipeline._guidance_scale = {0: 10.0, 1: 1.0, 2: 1.0}.get(k, 1.0)

    expected = draw(pipe, guidance_scale=10.0, callback_on_step_end=guide)
    assert torch.equal(found.codes, expected.codes)
    unguided = draw(pipe, guidance_scale=1.0)
    assert torch.equal(found.codes[:, :1], unguided.codes[:, :1])
    assert not torch.equal(found.codes, unguided.codes)


@pytest.mark.parametrize("name", ["top_k", "top_p", "temperature"])
def test_lists_hold_one_value_per_scale(pipe, name):
    off, on = {"top_k": (0, 1), "top_p": (1.0, 1e-6), "temperature": (1.0, 1e-4)}[name]
    constant = draw(pipe, **{name: off})
    assert torch.equal(draw(pipe, **{name: [off] * 4}).codes, constant.codes)
    # Greedy at the second scale: the same for all seeds, given the first one's codes.
    greedy = [draw(pipe, seed=seed, **{"top_k": [1, 1, 0, 0], name: [on, on, off, off]}).codes for seed in range(4)]
    assert len({tuple(codes[0, :5].tolist()) for codes in greedy}) == 1
    assert len({tuple(codes[0, 5:].tolist()) for codes in greedy}) == 4
    with pytest.raises(ValueError, match=f"`{name}` must be one value or 4, one per scale, got 3"):
        draw(pipe, **{name: [off] * 3})


class Forbid(LogitsProcessor):
    """Forbids the codes below 8, and notes what it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, scale, previous_logits):
        self.seen.append((scale, tuple(input_ids.shape), tuple(scores.shape), previous_logits))
        scores = scores.clone()
        scores[:, :8] = -torch.inf
        return scores


def test_processors_see_every_token_and_the_scale_before(pipe):
    codebook_size = pipe.transformer.config.codebook_size
    forbid = Forbid()
    for processor in (forbid, LogitsProcessorList([forbid])):
        forbid.seen.clear()
        codes = draw(pipe, guidance_scale=2.0, logits_processor=processor).codes
        assert codes.min() >= 8
        starts = [0, 1, 5, 14]
        for k, (scale, input_shape, score_shape, previous) in enumerate(forbid.seen):
            assert scale == k
            assert input_shape == (2 * LENGTHS[k], starts[k])
            assert score_shape == (2 * LENGTHS[k], codebook_size)
            assert (previous is None) if k == 0 else previous.shape == (2, LENGTHS[k - 1], codebook_size)
        # What the scale before predicted, not what a processor left of it.
        assert forbid.seen[2][3].isfinite().all()


def test_plain_processors_of_transformers_work(pipe):
    from transformers import TopKLogitsWarper

    assert torch.equal(
        draw(pipe, top_k=0, logits_processor=TopKLogitsWarper(5)).codes, draw(pipe, top_k=5, temperature=1.0).codes
    )
    with pytest.raises(ValueError, match="`logits_processor` must be a `LogitsProcessor`, got 3"):
        draw(pipe, logits_processor=3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_the_model_itself_as_refiner_changes_nothing(pipe, start, guidance_scale):
    expected = draw(pipe, guidance_scale=guidance_scale)
    seen = tokens_seen(pipe)
    found = draw(pipe, guidance_scale=guidance_scale, refiner=pipe.transformer, refiner_start=start)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.images, expected.images)
    # One pass over everything before, and no block twice.
    batch = 4 if guidance_scale > 1 else 2
    assert seen[batch, sum(LENGTHS[: start + 1])] == 1
    assert sum(seen.values()) == 4


def test_refiner_of_another_size_draws_the_last_scales(pipe):
    config = {**pipe.transformer.config.to_dict(), "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(1)
    refiner = VARTransformer(VARConfig(**config)).train()
    drafted, refined = draw(pipe), draw(pipe, refiner=refiner, refiner_start=2)
    assert torch.equal(refined.codes[:, :5], drafted.codes[:, :5])
    assert not torch.equal(refined.codes, drafted.codes)
    assert refiner.training
    other = VARTransformer(VARConfig(**{**config, "codebook_size": 7}))
    size = pipe.transformer.config.codebook_size
    for options, message in (
        ({"refiner": refiner}, "`refiner_start` must be a scale from 0 to 3, got None"),
        ({"refiner": refiner, "refiner_start": 4}, "`refiner_start` must be a scale from 0 to 3, got 4"),
        ({"refiner_start": 1}, "`refiner_start` = 1 needs a `refiner`"),
        ({"refiner": other, "refiner_start": 1}, f"codebook_size is {size} there, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, **options)


def test_best_of_several_draws_is_kept_for_each_image(pipe):
    generator = torch.Generator().manual_seed(0)
    single = [pipe([0, 1], generator=generator, output_type="pt") for _ in range(5)]
    seen = []

    def score(images, labels):
        seen.append(labels.tolist())
        return images.mean(dim=(1, 2, 3))

    best = draw(pipe, num_candidates=5, score_fn=score)
    scores = torch.stack([output.images.mean(dim=(1, 2, 3)) for output in single])  # (5, 2)
    assert scores.argmax(dim=0).tolist() != [0, 0]
    for image, candidate in enumerate(scores.argmax(dim=0).tolist()):
        assert torch.equal(best.images[image], single[candidate].images[image])
        assert torch.equal(best.codes[image], single[candidate].codes[image])
    assert seen == [[0, 1]] * 5
    for options, message in (
        ({"num_candidates": 3}, "`num_candidates` above 1 and `score_fn` go together"),
        ({"score_fn": score}, "`num_candidates` above 1 and `score_fn` go together"),
        ({"num_candidates": 0}, "`num_candidates` must be at least 1, got 0"),
        ({"num_candidates": 2, "score_fn": lambda images, labels: images}, "`score_fn` must return 2 finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, **options)


def test_class_embeddings_stand_for_labels(pipe):
    expected = draw(pipe, labels=[0, 2], guidance_scale=2.0)
    embeds = pipe.get_class_embeds([0, 2])
    generator = torch.Generator().manual_seed(0)
    found = pipe(class_embeds=embeds, guidance_scale=2.0, generator=generator, output_type="pt")
    assert torch.equal(found.images, expected.images)
    between = pipe(class_embeds=torch.lerp(*embeds, 0.5)[None], num_images_per_label=3, output_type="pt")
    assert len(between.images) == 3
    with pytest.raises(ValueError, match="one of `class_labels` and `class_embeds`"):
        pipe(1, class_embeds=embeds)
    with pytest.raises(ValueError, match=r"`class_embeds` must have the shape \(batch, \d+\), got \(2, 3\)"):
        pipe(class_embeds=torch.zeros(2, 3))


def test_progress_ends_with_the_image(pipe):
    output = draw(pipe)
    progress = pipe.decode_progress(output.codes, output_type="pt")
    assert len(progress) == 4
    torch.testing.assert_close(progress[-1], output.images)
    assert not torch.allclose(progress[0], progress[-1])
    latents = []

    def note(pipeline, k, step, tensors):
        latents.append(tensors["images"])

    draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["images"])
    for found, expected in zip(latents, progress, strict=True):
        torch.testing.assert_close(found, expected)


def test_progress_is_decoded_without_dropout():
    pipe = make_pipeline(patch_nums=PATCH_NUMS, vqvae={"dropout": 0.5})
    codes = draw(pipe).codes
    expected = pipe.decode_progress(codes, output_type="pt")
    pipe.vqvae.train()
    for found, image in zip(pipe.decode_progress(codes, output_type="pt"), expected, strict=True):
        assert torch.equal(found, image)
    assert pipe.vqvae.training
