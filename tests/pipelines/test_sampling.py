# SPDX-License-Identifier: Apache-2.0
"""The functions between logits and codes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hf_var.pipelines.sampling import apply_guidance, draw_codes, filter_logits, guidance_weight, smooth_weights
from pipelines.tiny import seeded


FILTERS = [(0, 0.3), (0, 0.96), (1, 0.0), (7, 0.0), (7, 1.0), (30, 0.5), (30, 0.96), (100, 0.9), (3, 0.001)]


def warp(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """transformers' warpers, which want two dimensions and have no value for "off"."""
    warped = logits.flatten(0, -2)
    if top_k > 0:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if 0 < top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    return warped.view(logits.shape)


class SeenSorts(TorchDispatchMode):
    """Notes how many values every sorting operation gives back, per row."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("sort", "topk", "kthvalue")):
            self.lengths.append(result[0].shape[-1])
        return result


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("spread", [0.3, 2.0, 12.0])
def test_filter_agrees_with_transformers(top_k, top_p, spread):
    logits = torch.randn(4, 50, 100, generator=seeded()) * spread
    before = logits.clone()
    filtered = filter_logits(logits, top_k, top_p)
    assert torch.equal(filtered, warp(logits, top_k, top_p))
    assert torch.equal(logits, before)
    assert not torch.isinf(filtered).all(dim=-1).any()


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filter_keeps_as_many_ties_as_transformers(top_k, top_p):
    # A handful of values over a hundred codes, so that both boundaries fall between equal logits. Which of these
    # transformers keeps is left to an unstable sort.
    logits = torch.randn(4, 50, 100, generator=seeded()).round()
    kept, expected = filter_logits(logits, top_k, top_p), warp(logits, top_k, top_p)
    assert torch.equal(kept.sort().values, expected.sort().values)


def test_top_k_keeps_codes_as_likely_as_the_last_one():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = filter_logits(logits, top_k=2, top_p=0.0).isfinite()
    assert kept.tolist() == [[True, False, True, True, False]]


def test_top_p_keeps_the_smallest_set_that_holds_it():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().view(1, 1, 4)
    for top_p, kept in ((0.01, 1), (0.35, 1), (0.45, 2), (0.65, 2), (0.75, 3), (0.95, 4)):
        finite = filter_logits(logits, top_k=0, top_p=top_p).isfinite()
        assert int(finite.sum()) == kept, top_p
        assert bool(finite[0, 0, 0])


def test_top_p_counts_the_survivors_of_top_k_alone():
    # Of the two survivors the first has 0.57: with the whole codebook's probabilities (0.4) both would stay.
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().view(1, 1, 4)
    assert filter_logits(logits, top_k=2, top_p=0.5).isfinite().tolist() == [[[True, False, False, False]]]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (0, 1.0), (64, 0.0), (64, 1.0)])
def test_filter_is_off_at_its_limits(top_k, top_p):
    logits = torch.randn(2, 5, 64, generator=seeded())
    with SeenSorts() as sorts:
        assert torch.equal(filter_logits(logits, top_k, top_p), logits)
    assert sorts.lengths == []


def test_filter_sorts_the_survivors_of_top_k_alone():
    logits = torch.randn(2, 5, 4096, generator=seeded())
    with SeenSorts() as sorts:
        filter_logits(logits, 900, 0.96)
    assert sorts.lengths == [900]


@pytest.mark.parametrize("num_scales", [2, 3, 10])
def test_guidance_weight_grows_linearly_from_one(num_scales):
    weights = [guidance_weight(5.0, k, num_scales) for k in range(num_scales)]
    assert weights == pytest.approx([1 + 4 * k / (num_scales - 1) for k in range(num_scales)])
    assert weights[0] == 1
    assert weights[-1] == 5


def test_guidance_weight_of_a_single_scale_is_the_guidance_scale():
    assert guidance_weight(2.5, 0, 1) == 2.5


def test_guidance_moves_away_from_the_unconditional_logits():
    conditional, unconditional = torch.randn(2, 3, 5, 7, generator=seeded())
    both = torch.cat([conditional, unconditional])
    torch.testing.assert_close(apply_guidance(both, 2.5), unconditional + 2.5 * (conditional - unconditional))
    assert torch.equal(apply_guidance(both, 1), conditional)
    assert torch.equal(apply_guidance(both, 0), unconditional)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 4, 9), (2, 256, 4096), (5, 1, 33)])
@pytest.mark.parametrize("top_k", [0, 2])
def test_draws_are_one_multinomial_per_scale(shape, dtype, top_k):
    logits = filter_logits(torch.randn(shape, generator=seeded()) * 3, top_k, 0.0).to(dtype)
    generator, twin = seeded(1), seeded(1)
    for _ in range(3):
        expected = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=twin).view(shape[:2])
        assert torch.equal(draw_codes(logits, generator), expected)
    # As many numbers were taken.
    assert torch.equal(generator.get_state(), twin.get_state())


def test_draws_without_a_generator_are_those_of_the_global_one():
    logits = torch.randn(3, 4, 9, generator=seeded())
    state = torch.get_rng_state()
    expected = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(3, 4)
    torch.set_rng_state(state)
    assert torch.equal(draw_codes(logits), expected)


@pytest.mark.parametrize("generator", [None, [torch.Generator(), torch.Generator()]], ids=["global", "list"])
def test_logits_that_are_no_numbers_are_refused(generator):
    logits = torch.randn(2, 4, 9, generator=seeded())
    logits[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="`logits` must be numbers, got nan"):
        draw_codes(logits, generator)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    codes = draw_codes(probabilities.log().expand(10, 2000, 4), seeded())
    frequencies = codes.flatten().bincount(minlength=4) / codes.numel()
    # Four standard deviations of the largest frequency.
    torch.testing.assert_close(frequencies, probabilities, atol=4 * (0.25 / 20000) ** 0.5, rtol=0)
    assert frequencies[3] == 0


def test_draws_with_a_list_of_generators_are_those_of_single_images():
    logits = torch.randn(3, 4, 9, generator=seeded())
    together = draw_codes(logits, [seeded(seed) for seed in range(3)])
    alone = [draw_codes(logits[seed : seed + 1], seeded(seed)) for seed in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("num_scales", [1, 2, 10])
def test_smooth_weights_mix_the_codes_that_the_filter_left(num_scales):
    logits = filter_logits(torch.randn(2, 50, 20, generator=seeded()), top_k=5, top_p=0.0)
    for k in range(num_scales):
        weights = smooth_weights(logits, k, num_scales, seeded())
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 50))
        assert bool((weights[logits.isinf()] == 0).all())


def test_smooth_weights_become_sharper_with_the_scale():
    logits = torch.randn(2, 500, 20, generator=seeded())
    largest = [smooth_weights(logits, k, 4, seeded()).amax(-1).mean().item() for k in range(4)]
    assert largest == sorted(largest)
    assert largest[0] < 0.95
    assert largest[-1] > 0.99


def test_smooth_weights_prefer_likely_codes():
    # The largest of logits plus Gumbel noise is a draw; the first scale leaves the logits as they are.
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    chosen = smooth_weights(probabilities.log().expand(10, 2000, 3), 0, 4, seeded()).argmax(-1)
    frequencies = chosen.flatten().bincount(minlength=3) / chosen.numel()
    torch.testing.assert_close(frequencies, probabilities, atol=4 * (0.25 / 20000) ** 0.5, rtol=0)


def test_smooth_weights_with_a_list_of_generators_are_those_of_single_images():
    logits = torch.randn(3, 4, 9, generator=seeded())
    together = smooth_weights(logits, 1, 3, [seeded(seed) for seed in range(3)])
    alone = [smooth_weights(logits[seed : seed + 1], 1, 3, seeded(seed)) for seed in range(3)]
    assert torch.equal(together, torch.cat(alone))
