# SPDX-License-Identifier: Apache-2.0
"""Hooks of layers: what they are told, what they may change, and the pruning and the budget that ship."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from hf_var import CacheBudget, LayerCall, LayerHook, TokenPruning, VARCache
from priors.text import TEXT, text_inputs, text_model
from priors.tiny import block_inputs, logits_by_calls, tiny_inputs, tiny_model


SIZES = [(1, 1), (2, 2), (2, 3)]
LENGTHS = [1, 4, 6]


class Recorder(LayerHook):
    """Keeps what it is told, and what goes in and out."""

    def __init__(self):
        self.calls, self.inputs, self.outputs, self.runs, self.keys = [], {}, {}, {}, {}

    def run_layer(self, run, hidden_states, call):
        def run_recorded(states, tokens=None):
            found = run(states, tokens)
            self.runs[key] = states, tokens, found
            return found

        key = call.scales[-1], call.layer_idx
        self.calls.append((list(call.scales), call.layer_idx))
        self.inputs[key] = hidden_states
        self.outputs[key] = run_recorded(hidden_states)
        return self.outputs[key]

    def keep_keys(self, query, key, value, scaling, call):
        self.keys[call.scales[-1], call.layer_idx] = query, key, value
        return None


class KeptKeys(LayerHook):
    """Keeps the keys at the same places everywhere."""

    def __init__(self, places):
        self.places = places

    def keep_keys(self, query, key, value, scaling, call):
        places = torch.tensor([place for place in self.places if place < key.shape[2]])
        return places.expand(*key.shape[:2], -1)


@torch.no_grad()
def logits_of(model, inputs, hooks, calls=(1, 1, 1), cache=None):
    """Logits of all tokens, and the cache."""
    cache = VARCache(model.config, hooks) if cache is None else cache
    if "class_labels" in inputs:
        return logits_by_calls(model, inputs, list(calls), cache), cache
    logits, first = [], 0
    for number in calls:
        text = {name: inputs[name] for name in TEXT if name in inputs} if first == 0 else {}
        scale_inputs = block_inputs(model.config, inputs["scale_inputs"], first, first + number)
        logits.append(model(**text, scale_inputs=scale_inputs, cache=cache).logits)
        first += number
    return torch.cat(logits, dim=1), cache


MODELS = {
    "qk_norm": lambda **options: tiny_model(qk_norm=True, **options),
    "plain_attention": lambda **options: tiny_model(qk_norm=False, **options),
    "shared_adaln": lambda **options: tiny_model(shared_adaln=True, **options),
    "text": lambda **options: text_model(is_causal=True, **options),
    "text_own_scale": lambda **options: text_model(is_causal=False, **options),
}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def inputs(model):
    return inputs_of(model)


def inputs_of(model):
    is_text = model.config.model_type == text_model().config.model_type
    return text_inputs(model.config) if is_text else tiny_inputs(model.config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("calls", [(1, 1, 1), (2, 1)])
@pytest.mark.parametrize("name", list(MODELS))
def test_full_budgets_and_shares_change_no_bit(name, attention, calls):
    model = MODELS[name](attention=attention)
    inputs = inputs_of(model)
    expected, _ = logits_of(model, inputs, None, calls)
    choices = [[LayerHook()], [Recorder()], [TokenPruning([1.0, 1.0])], [TokenPruning([0.5], first_layer=1)]]
    if model.config.is_causal:
        choices += [[CacheBudget(11)], [CacheBudget([1, 5, 1])], [TokenPruning([1.0]), CacheBudget(11)]]
    changed = 0
    for hooks in choices:
        found, _ = logits_of(model, inputs, hooks, calls)
        if isinstance(hooks[0], TokenPruning) and hooks[0].shares != [1.0] * len(hooks[0].shares):
            # The tokens before are as they were.
            assert torch.equal(found[:, :5], expected[:, :5])
            changed += not torch.equal(found, expected)
        else:
            assert torch.equal(found, expected), hooks
    assert changed == 1


def test_hooks_are_told_layer_and_scales(model, inputs):
    for calls, scales in (((1, 1, 1), [[0], [1], [2]]), ((2, 1), [[0, 1], [2]]), ((3,), [[0, 1, 2]])):
        recorder = Recorder()
        logits_of(model, inputs, [recorder], calls)
        assert recorder.calls == [(each, layer_idx) for each in scales for layer_idx in range(2)]
        # The last scale's keys are of no use, and models of single scales keep none.
        asked = [(each[-1], layer_idx) for each in scales[:-1] for layer_idx in range(2)]
        assert list(recorder.keys) == (asked if model.config.is_causal else [])
        for (scale, _), hidden_states in recorder.inputs.items():
            length = sum(LENGTHS[each] for each in next(each for each in scales if each[-1] == scale))
            assert hidden_states.shape == (3, length, 32)
    if model.config.is_causal:
        recorder = Recorder()
        logits_of(model, inputs, [recorder])
        query, key, value = recorder.keys[1, 0]
        assert query.shape == (3, 2, 4, 16)
        assert key.shape == value.shape == (3, 2, 5, 16)


def test_pruned_tokens_get_what_the_layer_added_at_the_scale_before(model, inputs):
    outer, inner = Recorder(), Recorder()
    logits_of(model, inputs, [outer, TokenPruning([0.5]), inner])
    for layer_idx in range(2):
        given, found = outer.inputs[2, layer_idx], outer.outputs[2, layer_idx]
        distances = (given - given.mean(dim=1, keepdim=True)).square().sum(dim=-1)
        chosen = distances.argsort(dim=1, descending=True)[:, :3].sort(dim=1).values
        states, tokens, run = inner.runs[2, layer_idx]
        assert tokens is None  # of those that this hook knows, all
        rows = torch.arange(3)[:, None]
        assert torch.equal(states, given[rows, chosen])
        assert torch.equal(found[rows, chosen], run)
        added = outer.outputs[1, layer_idx] - outer.inputs[1, layer_idx]
        resized = functional.interpolate(added.mT.unflatten(2, (2, 2)), (2, 3), mode="bilinear").flatten(2).mT
        expected = (given + resized).scatter(1, chosen[..., None].expand(-1, -1, 32), run)
        assert torch.equal(found, expected)


def test_two_pruned_scales_get_what_was_added_before_both(model, inputs):
    recorder = Recorder()
    logits_of(model, inputs, [recorder, TokenPruning([0.25, 0.34])])
    # The only scale before has one token, so that each gets the same.
    added = recorder.outputs[0, 0] - recorder.inputs[0, 0]
    for scale, kept in ((1, 1), (2, 2)):
        difference = recorder.outputs[scale, 0] - recorder.inputs[scale, 0]
        restored = torch.isclose(difference, added, atol=1e-5).all(dim=-1)
        assert restored.sum(dim=1).tolist() == [LENGTHS[scale] - kept] * 3


def test_a_layer_that_runs_for_some_tokens_places_them_right(model, inputs):
    # All tokens in another order are the same tokens, wherever positions come from.
    class Reversed(LayerHook):
        def run_layer(self, run, hidden_states, call):
            if len(call.scales) > 1:
                return run(hidden_states)
            tokens = torch.arange(hidden_states.shape[1]).flip(0).expand(hidden_states.shape[:2])
            return run(hidden_states.flip(1), tokens).flip(1)

    expected, _ = logits_of(model, inputs, None)
    for hooks in ([Reversed()], [Reversed(), Reversed()]):
        found, _ = logits_of(model, inputs, hooks)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_skipped_layers_have_no_keys(model, inputs):
    class Skipped(LayerHook):
        def run_layer(self, run, hidden_states, call):
            return hidden_states if call.layer_idx == 0 and call.scales[-1] == 1 else run(hidden_states)

    found, cache = logits_of(model, inputs, [Skipped()])
    assert [cache.get_seq_length(layer_idx) for layer_idx in range(2)] == [11, 11]
    assert not torch.equal(found[:, 1:5], logits_of(model, inputs, None)[0][:, 1:5])
    if model.config.is_causal:
        assert [layer.length for layer in cache.layers] == [7, 11]


@pytest.mark.parametrize("name", ["qk_norm", "plain_attention", "text"])
def test_a_budget_keeps_the_keys_that_get_most_attention(name):
    model = MODELS[name]()
    inputs = inputs_of(model)
    before, after = Recorder(), Recorder()
    _, cache = logits_of(model, inputs, [before, CacheBudget([1, 3, 3]), after])
    for layer_idx in range(2):
        query, key, value = before.keys[1, layer_idx]
        scaling = model.layers[layer_idx].attention.scaling
        attention = (query @ key.mT * scaling).softmax(dim=-1).mean(dim=2)  # (batch, heads, keys)
        for row in range(3):
            for head in range(2):
                kept = attention[row, head].argsort(descending=True)[:3].sort().values
                for found, states in zip(after.keys[1, layer_idx][1:], (key, value), strict=True):
                    assert torch.equal(found[row, head], states[row, head][kept])
    assert cache.get_seq_length() == 11
    assert [layer.length for layer in cache.layers] == [3 + 6] * 2


@pytest.mark.parametrize("name", ["qk_norm", "text"])
def test_a_budget_keeps_the_same_of_scales_that_are_read_at_once(name):
    model = MODELS[name]()
    inputs, hooks = inputs_of(model), [CacheBudget([5, 3, 3])]
    expected, _ = logits_of(model, inputs, hooks)
    found, _ = logits_of(model, inputs, hooks, (2, 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_budget_observes_a_few_queries_of_a_large_scale():
    hook, generator = CacheBudget(2, num_queries=3), torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, length, 4, generator=generator) for length in (9, 12))
    seen = (query[:, :, [0, 4, 8]] @ key.mT * 0.5).softmax(dim=-1).mean(dim=2)
    config = SimpleNamespace(scale_lengths=[3, 9])
    call = LayerCall(config, 0, range(2), {})
    kept = hook.keep_keys(query, key, key, 0.5, call)
    assert kept.tolist() == [[sorted(seen[0, 0].argsort(descending=True)[:2].tolist())]]


@pytest.mark.parametrize("name", ["qk_norm", "text"])
def test_dropped_keys_are_as_if_they_were_hidden(name):
    model = MODELS[name](attention="eager")
    inputs = inputs_of(model)
    found, _ = logits_of(model, inputs, [KeptKeys([0, 2, 3])])  # of 1 + 4
    hidden = [1, 4]

    def hide(module, args, kwargs):
        # The last scale alone, of 6 queries.
        if args[0].shape[1] != 6:
            return None
        mask = torch.zeros(1, 1, 6, 11)
        mask[..., hidden] = -torch.inf
        position = 1 if name == "qk_norm" else 2
        return (*args[:position], mask, *args[position + 1 :]), kwargs

    handles = [layer.attention.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.layers]
    expected, _ = logits_of(model, inputs, None)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits_of(model, inputs, None)[0])


def test_budgets_bound_the_memory(model, inputs):
    if not model.config.is_causal:
        with pytest.raises(ValueError, match="needs a model that keeps keys and values, got one with is_causal=False"):
            VARCache(model.config, [CacheBudget(3)])
        return
    budget = VARCache(model.config, [CacheBudget(2)])
    whole = VARCache(model.config)
    for cache in (whole, budget):
        logits_of(model, inputs, None, (1, 1), cache)

    def size(cache):
        return sum(states.untyped_storage().nbytes() for each in cache.layers for states in (each.keys, each.values))

    assert size(budget) * 11 == size(whole) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_half_precision(model, inputs, dtype):
    hooks = [TokenPruning([0.5])] + [CacheBudget([5, 3, 3])] * model.config.is_causal
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        model = model if dtype is None else model.to(dtype)
        found, _ = logits_of(model, inputs, hooks)
        expected, _ = logits_of(model, inputs, None)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert torch.equal(found[:, :5], expected[:, :5])
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache", "batch_repeat_interleave"])
def test_the_state_follows_the_batch(model, inputs, operation):
    hooks = [TokenPruning([0.5])] + [CacheBudget(3)] * model.config.is_causal
    argument, rows = (2, [0, 0, 1, 1, 2, 2]) if "repeat" in operation else (torch.tensor([2, 0]), [2, 0])
    expected, _ = logits_of(model, inputs, hooks)
    _, cache = logits_of(model, inputs, hooks, (1, 1))
    getattr(cache, operation)(argument)
    assert cache.batch_size == len(rows)
    last = block_inputs(model.config, inputs["scale_inputs"], 2, 3)[rows]
    with torch.no_grad():
        found = model(scale_inputs=last, cache=cache).logits
    torch.testing.assert_close(found, expected[rows, 5:], rtol=1e-5, atol=1e-5)


def test_reset_forgets_the_image(model, inputs):
    hooks = [TokenPruning([0.5])] + [CacheBudget(3)] * model.config.is_causal
    expected, cache = logits_of(model, inputs, hooks)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache._hook_states
    assert torch.equal(logits_of(model, inputs, None, cache=cache)[0], expected)


def test_refused(model, inputs):
    cache = VARCache(model.config, [TokenPruning([0.5])])
    logits_of(model, inputs, None, (1,), cache)
    rest = block_inputs(model.config, inputs["scale_inputs"], 1, 3)
    with pytest.raises(ValueError, match="`scale_inputs` must be those of one scale where `cache` has hooks"):
        model(scale_inputs=rest, cache=cache)
    _, cache = logits_of(model, inputs, [TokenPruning([0.5])])
    for layer_idx in (0, 1):
        cache = logits_of(model, inputs, [TokenPruning([0.5], first_layer=layer_idx)])[1]
        with pytest.raises(ValueError, match="`crop` needs the keys of all tokens"):
            cache.crop(-6)
        assert not cache.is_croppable
        assert [cache.get_seq_length(each) for each in range(2)] == [11, 11]
    wrong = {
        "`layer_hooks` must be a list of `LayerHook`s, got 3": 3,
        "`layer_hooks` must be a list of `LayerHook`s, got 'all'": "all",
        r"`layer_hooks` must be a list of `LayerHook`s, got <class .* in it": [LayerHook],
        "`shares` must be those of fewer than 3 scales, since the first one is never pruned, got 3": [
            TokenPruning([0.5] * 3)
        ],
        "`first_layer` must be a layer from 0 to 1, got 2": [TokenPruning([0.5], first_layer=2)],
        "`max_keys` must be one number or 3, one for each scale, got 2": [CacheBudget([3, 3])],
    }
    for message, hooks in wrong.items():
        with pytest.raises(ValueError, match=message):
            VARCache(model.config, hooks)
    raster = tiny_model(block_sizes=(1,) * 11).config
    with pytest.raises(ValueError, match="`layer_hooks` need a model that predicts whole scales"):
        VARCache(raster, [LayerHook()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenPruning([0.0]), r"`shares\[0\]` must be above 0 and at most 1, got 0.0"),
        (lambda: TokenPruning([0.5, 1.1]), r"`shares\[1\]` must be above 0 and at most 1, got 1.1"),
        (lambda: TokenPruning([float("nan")]), r"`shares\[0\]` must be a number"),
        (lambda: TokenPruning(0.5), "`shares` must be a list, got 0.5"),
        (lambda: TokenPruning([0.5], first_layer=-1), "`first_layer` must be at least 0, got -1"),
        (lambda: CacheBudget(0), "`max_keys` must be at least 1, got 0"),
        (lambda: CacheBudget([3, 0]), r"`max_keys\[1\]` must be at least 1, got 0"),
        (lambda: CacheBudget("3"), "`max_keys` must be an integer, at least 1, got '3'"),
        (lambda: CacheBudget(2.5), "`max_keys` must be an integer, at least 1, got 2.5"),
        (lambda: CacheBudget(3, num_queries=0), "`num_queries` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cache_can_be_cropped_while_nothing_is_dropped(model, inputs):
    choices = [[LayerHook()], [TokenPruning([0.5])]] + [[CacheBudget([1, 11, 3])]] * model.config.is_causal
    for hooks in choices:
        expected, _ = logits_of(model, inputs, hooks)
        _, cache = logits_of(model, inputs, hooks, (1,))
        # Another second scale, which is taken back.
        second = block_inputs(model.config, inputs["scale_inputs"], 1, 2)
        with torch.no_grad():
            model(scale_inputs=-second, cache=cache)
            cache.crop(-4)
            assert cache.get_seq_length() == 1
            found = [
                model(scale_inputs=block_inputs(model.config, inputs["scale_inputs"], k, k + 1), cache=cache).logits
                for k in (1, 2)
            ]
        assert torch.equal(torch.cat(found, dim=1), expected[:, 1:])


@pytest.mark.parametrize("share", [0.0, -1, 1.5, float("nan"), "1", True, None])
def test_shares_and_budgets_of_subclasses_are_checked(share):
    class OwnShare(TokenPruning):
        def share(self, config, layer_idx, scale):
            return share if scale == 2 else 1.0

    class OwnBudget(CacheBudget):
        def budget(self, call):
            return share

    model = tiny_model()
    inputs = tiny_inputs(model.config)
    with pytest.raises(ValueError, match="`share` must be a number|`share` must be above 0 and at most 1"):
        logits_of(model, inputs, [OwnShare([0.5])])
    with pytest.raises(ValueError, match="`budget` must be"):
        logits_of(model, inputs, [OwnBudget(3)])
    for hook, name in ((TokenPruning([0.5]), "shares"), (CacheBudget(3), "max_keys")):
        setattr(hook, name, share)
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            VARCache(model.config, [hook])


def test_shares_may_depend_on_the_layer(model, inputs):
    class Deeper(TokenPruning):
        def share(self, config, layer_idx, scale):
            return 0.5 if scale == 2 and layer_idx == 1 else 1.0

    found, _ = logits_of(model, inputs, [Deeper([1.0])])
    assert torch.equal(found, logits_of(model, inputs, [TokenPruning([0.5], first_layer=1)])[0])


def test_layers_that_are_checkpointed_have_no_hooks():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.train()
    inputs = tiny_inputs(model.config)
    with pytest.raises(ValueError, match="`cache` must have no `layer_hooks` where layers are checkpointed"):
        model(inputs["class_labels"], cache=VARCache(model.config, [LayerHook()]))


def test_hooks_are_traced_in_one_graph(model, inputs):
    expected, _ = logits_of(model, inputs, [LayerHook()])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    try:
        torch.testing.assert_close(logits_of(compiled, inputs, [LayerHook()])[0], expected)
    finally:
        torch.compiler.reset()


def test_results_of_hooks_are_checked():
    model = tiny_model()

    def hook(**methods):
        return [type("Wrong", (LayerHook,), {name: staticmethod(method) for name, method in methods.items()})()]

    for hooks, message in (
        (
            hook(run_layer=lambda run, states, call: None),
            r"`run_layer` must return the shape \(3, 1, 32\), got NoneType",
        ),
        (hook(run_layer=lambda run, states, call: states[:1]), r"`run_layer` must return .*, got \(1, 1, 32\)"),
        (hook(run_layer=lambda run, states, call: states), "`run_layer` must run layer 0 at the first scale"),
        (hook(run_layer=lambda run, states, call: run(run(states))), "`run_layer` must run layer 0 once"),
        (
            hook(run_layer=lambda run, states, call: run(states[:, :0])),
            r"`hidden_states` must have the shape \(3, 1, 32\) without `tokens`, got \(3, 0, 32\)",
        ),
        (
            hook(run_layer=lambda run, states, call: run(states, torch.zeros(3, 2).long())),
            r"`tokens` must have the shape \(3, 1\), one for each of the hidden states, got \(3, 2\)",
        ),
        (hook(keep_keys=lambda *args: 3), r"`keep_keys` must return int64 of the shape \(3, 2, kept\), got int"),
        (hook(keep_keys=lambda *args: torch.zeros(3, 2, 1)), r"`keep_keys` must .*, got torch.float32 \(3, 2, 1\)"),
        (
            hook(keep_keys=lambda *args: torch.zeros(3, 2, 0).long()),
            r"`keep_keys` must .*, got torch.int64 \(3, 2, 0\)",
        ),
        (
            hook(keep_keys=lambda *args: torch.zeros(1, 1, 1).long()),
            r"`keep_keys` must .*, got torch.int64 \(1, 1, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            logits_of(model, tiny_inputs(model.config), hooks)

    def first(run, states, call):
        return run(states[:, :1], torch.zeros(len(states), 1).long()).expand_as(states)

    with pytest.raises(
        ValueError, match="`tokens` must be left out where a call reads several scales, got some in one of 2"
    ):
        logits_of(model, tiny_inputs(model.config), hook(run_layer=first), (2, 1))


def test_pruning_comes_before_hooks_that_leave_out_tokens():
    model = tiny_model()
    inputs = tiny_inputs(model.config)

    class Skipped(LayerHook):
        def run_layer(self, run, hidden_states, call):
            return hidden_states if call.scales[-1] == 1 else run(hidden_states)

    for hooks, message in (
        (
            [TokenPruning([0.5]), TokenPruning([0.3], first_layer=1)],
            "`TokenPruning` must get all 6 tokens of a scale, got 3",
        ),
        ([Skipped(), TokenPruning([0.5])], "`TokenPruning` must see the scale before the first pruned one"),
    ):
        with pytest.raises(ValueError, match=message):
            logits_of(model, inputs, hooks)
    logits_of(model, inputs, [TokenPruning([0.5]), Skipped()])
