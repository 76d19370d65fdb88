# SPDX-License-Identifier: Apache-2.0
"""The cache of rows: equal to the whole map, and at constant work."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_var import RowCache
from hf_var.priors.causal_layers import MaskedConv2d, WeightNormConv2d
from priors.pixels import KINDS, condition_of, draws, greedy, pixel_inputs, pixel_prior, sample_by_rows, sample_naively


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=KINDS)
def model(request):
    return pixel_prior(request.param)


def rows_of(codes, config, first, last):
    return codes[:, first * config.width : last * config.width]


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 2])
def test_rows_after_finished_ones_equal_the_whole_map(model, num_rows):
    config, cache = model.config, RowCache()
    inputs = pixel_inputs(config)
    expected = model(**inputs).logits
    for first in range(0, config.height, num_rows):
        last = min(first + num_rows, config.height)
        rows = rows_of(inputs["codes"], config, first, last)
        condition = {} if first else condition_of(inputs)
        # Rows may come again, filled differently, and not all of them at once.
        model(torch.zeros_like(rows[:, : config.width]), cache=cache, **condition)
        logits = model(rows, cache=cache).logits
        torch.testing.assert_close(logits, rows_of(expected, config, first, last), **CLOSE)
        cache.finish_rows()
        assert cache.num_rows == last


@pytest.mark.parametrize("choose", ["greedy", "drawn"])
def test_sampled_codes_equal_those_of_whole_maps(model, choose):
    condition = condition_of(pixel_inputs(model.config))

    def choice():
        return greedy if choose == "greedy" else draws(temperature=0.8, seed=1)

    expected = sample_naively(model, 3, choice(), **condition)
    assert len(set(expected.flatten().tolist())) > (1 if choose == "greedy" else 3)
    assert torch.equal(sample_by_rows(model, 3, choice(), **condition), expected)


@torch.no_grad()
def test_a_later_condition_is_ignored():
    for kind in ("cnn", "snail_classes", "snail_fine"):
        model = pixel_prior(kind)
        inputs, cache = pixel_inputs(model.config), RowCache()
        first = rows_of(inputs["codes"], model.config, 0, 1)
        expected = model(first, cache=cache, **condition_of(inputs)).logits
        other = {name: (values + 1).clamp(max=3) for name, values in condition_of(inputs).items()}
        assert torch.equal(model(first, cache=cache, **other).logits, expected)


@torch.no_grad()
def test_chosen_maps_go_on_alone(model):
    config, cache = model.config, RowCache()
    inputs = pixel_inputs(config)
    expected = model(**inputs).logits
    chosen = torch.tensor([2, 0])
    model(rows_of(inputs["codes"], config, 0, 1), cache=cache, **condition_of(inputs))
    cache.finish_rows()
    model(rows_of(inputs["codes"], config, 1, 2), cache=cache)
    cache.batch_select_indices(chosen)
    assert cache.batch_size == 2
    logits = model(rows_of(inputs["codes"], config, 1, 2)[chosen], cache=cache).logits
    torch.testing.assert_close(logits, rows_of(expected, config, 1, 2)[chosen], **CLOSE)
    cache.finish_rows()
    logits = model(rows_of(inputs["codes"], config, 2, 3)[chosen], cache=cache).logits
    torch.testing.assert_close(logits, rows_of(expected, config, 2, 3)[chosen], **CLOSE)


@torch.no_grad()
def test_maps_chosen_between_a_call_and_its_end():
    model = pixel_prior("snail_fine")
    inputs, cache, config = pixel_inputs(model.config), RowCache(), model.config
    model(rows_of(inputs["codes"], config, 0, 1), cache=cache, **condition_of(inputs))
    cache.batch_select_indices(torch.tensor([1]))
    cache.finish_rows()
    logits = model(rows_of(inputs["codes"], config, 1, 2)[1:2], cache=cache).logits
    torch.testing.assert_close(logits, rows_of(model(**inputs).logits, config, 1, 2)[1:2], **CLOSE)


@torch.no_grad()
def test_a_reset_cache_is_a_new_one(model):
    cache = RowCache()
    for batch_size in (2, 3):
        inputs = pixel_inputs(model.config, batch_size)
        first = rows_of(inputs["codes"], model.config, 0, 1)
        expected = model(first, **condition_of(inputs)).logits
        assert torch.equal(model(first, cache=cache, **condition_of(inputs)).logits, expected)
        assert cache.batch_size == batch_size
        cache.finish_rows()
        cache.reset()
        assert (cache.num_rows, cache.batch_size, cache.condition) == (0, -1, None)


def flops_per_row(model):
    """Multiplications of every row of a map, the first call of a row and the rest."""
    inputs, cache, config = pixel_inputs(model.config, 1), RowCache(), model.config
    counts = []
    with torch.no_grad():
        model(rows_of(inputs["codes"], config, 0, 1), cache=cache, **condition_of(inputs))
        for row in range(config.height):
            with FlopCounterMode(display=False) as counter:
                model(rows_of(inputs["codes"], config, row, row + 1), cache=cache)
            counts.append(counter.get_total_flops())
            cache.finish_rows()
    return counts


@pytest.mark.parametrize("kind", ["cnn", "snail_fine"])
def test_work_of_a_row_does_not_grow_with_the_map(kind):
    coarse = {"condition_map_size": (6, 3)} if kind == "snail_fine" else {}
    heights = [6, 12]
    low, high = (flops_per_row(pixel_prior(kind, map_size=(height, 6), **coarse)) for height in heights)
    assert len(high) == 12
    assert set(low) == set(high)
    assert len(set(high)) == 1
    model = pixel_prior(kind, map_size=(12, 6), **coarse)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        inputs = pixel_inputs(model.config, 1)
        model(**inputs)
    # The whole map costs about its rows, plus what is computed once.
    assert high[0] * 12 <= counter.get_total_flops() < high[0] * 12 * 1.4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cnn", "snail_wide", "snail_fine_classes"])
def test_weights_are_made_once_for_all_rows(kind, monkeypatch):
    model, made = pixel_prior(kind), []
    for convolution in (MaskedConv2d, WeightNormConv2d):
        make_weight = convolution.effective_weight

        def count(layer, make_weight=make_weight):
            made.append(layer)
            return make_weight(layer)

        monkeypatch.setattr(convolution, "effective_weight", count)
    inputs, cache = pixel_inputs(model.config), RowCache()
    for row in range(2):
        model(rows_of(inputs["codes"], model.config, row, row + 1), cache=cache, **condition_of(inputs))
        cache.finish_rows()
    assert len(made) == len(set(made)) == sum(isinstance(module, MaskedConv2d) for module in model.modules())


def test_attention_alone_grows_with_finished_rows():
    counts = flops_per_row(pixel_prior("snail", map_size=(8, 6)))
    steps = {later - earlier for earlier, later in zip(counts[:-1], counts[1:], strict=True)}
    # Scores and values of 6 x 6 further pairs in 2 blocks of 8 channels.
    assert steps == {2 * 2 * 2 * 6 * 6 * 8}


@torch.no_grad()
def test_what_is_kept_does_not_grow_with_the_map_but_for_attention():
    for kind, grows in (("cnn", False), ("snail_fine", False), ("snail", True)):
        model = pixel_prior(kind)
        config, inputs, cache = model.config, pixel_inputs(model.config), RowCache()
        sizes = []
        for row in range(config.height):
            rows = rows_of(inputs["codes"], config, row, row + 1)
            model(rows, cache=cache, **({} if row else condition_of(inputs)))
            cache.finish_rows()
            sizes.append(sum(states.untyped_storage().nbytes() for states in cache._finished.values()))
        assert (sizes[-1] > sizes[0]) == grows
        assert grows or len(set(sizes)) == 1


@torch.no_grad()
def test_misuse_is_refused():
    model = pixel_prior("cnn_unconditional")
    codes, cache, width = pixel_inputs(model.config)["codes"], RowCache(), model.config.width
    with pytest.raises(ValueError, match="`finish_rows` needs a call"):
        cache.finish_rows()
    model(codes, cache=cache)
    cache.finish_rows()
    with pytest.raises(ValueError, match="`finish_rows` needs a call"):
        cache.finish_rows()
    with pytest.raises(ValueError, match="`cache` is full: it holds all 5 rows"):
        model(codes[:, :width], cache=cache)
    cache.reset()
    model(codes[:, :width], cache=cache)
    cache.finish_rows()
    with pytest.raises(ValueError, match=r"`codes` must have the shape \(batch, n\) with 1 to 4 whole rows"):
        model(codes, cache=cache)
    with pytest.raises(ValueError, match=r"same batch size, got \{'codes': 2, 'cache': 3\}"):
        model(codes[:2, :width], cache=cache)
    with pytest.raises(ValueError, match="`cache` must be None in training mode"):
        model.train()(codes[:, :width], cache=cache)
