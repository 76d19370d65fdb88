# SPDX-License-Identifier: Apache-2.0
"""Weight decay, schedules, averaged weights, and a state that has names."""

import pytest
import torch
from accelerate import Accelerator

from hf_var import VARConfig, VARTransformer
from hf_var.training.average import AveragedWeights, averaged_weights
from hf_var.training.optimization import Optimization, OptimizerConfig, make_optimizer


def test_decay_acts_on_matrices_alone() -> None:
    config = VARConfig(
        num_labels=3, patch_nums=(1, 2), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, shared_adaln=True
    )
    model = VARTransformer(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
        for group in make_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    }
    assert set(groups) == {0.3, 0.0}
    assert groups[0.3] | groups[0.0] == set(names.values())
    assert "head.weight" in groups[0.3]
    for name in groups[0.3]:
        assert name.endswith("weight")
    for part in ("bias", "position", "level_embedding", "offset", "log_query_scale"):
        assert any(part in name for name in groups[0.0]), part


def test_averaged_weights_are_put_back_after_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    average = AveragedWeights(model, decay=0.5)
    own = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    inside = []

    def fail() -> None:
        with averaged_weights(average, model):
            inside.append(model.weight.detach().clone())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(inside[0], own)
    assert torch.equal(model.weight, own + 1)
    with averaged_weights(None, model) as unchanged:
        assert torch.equal(unchanged.weight, own + 1)


def make_optimization(**values) -> Optimization:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(4, 2, 3).to(memory_format=torch.channels_last))
    config = OptimizerConfig(**{"lr_warmup_steps": 2, "ema_decay": 0.5, "weight_decay_end": 0.3} | values)
    return Optimization(Accelerator(cpu=True), model, config, num_steps=9)


def take_steps(optimization: Optimization, steps: range) -> list[float]:
    rates = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = sum(
            (torch.randn(weight.shape, generator=generator) * weight).sum()
            for weight in optimization.weights.parameters()
        )
        # Which also settles whether gradients are synchronized: the process may remember a run that ended in between.
        with optimization.accelerator.accumulate(optimization.model):
            optimization.minimize(loss)
        optimization.finish_step()
        rates.append(optimization.learning_rate)
    return rates


def test_a_state_continues_by_the_names_of_the_weights() -> None:
    whole, first, second = make_optimization(), make_optimization(), make_optimization()
    rates = take_steps(whole, range(6))
    assert len(set(rates)) > 3
    begin = take_steps(first, range(3))
    state = first.state_dict()
    assert (
        state["moments"].keys() == state["average"]["weights"].keys() == dict(first.weights.named_parameters()).keys()
    )
    # As they come from a file.
    for names in (state["moments"], state["average"]["weights"]):
        for name in reversed(list(names)):
            names[name] = names.pop(name)
    second.weights.load_state_dict(first.weights.state_dict())
    second.load_state_dict(state)
    assert begin + take_steps(second, range(3, 6)) == rates
    expected, found = whole.state_dict(), second.state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(second.weights.state_dict(), whole.weights.state_dict(), rtol=0, atol=0)
    with whole.averaged() as averaged, second.averaged() as other:
        torch.testing.assert_close(other.state_dict(), averaged.state_dict(), rtol=0, atol=0)


def test_a_resumed_schedule_is_that_of_the_new_arguments() -> None:
    first, second = make_optimization(learning_rate=1e-3), make_optimization(learning_rate=0.5)
    rates = take_steps(first, range(3))
    second.load_state_dict(first.state_dict())
    assert second.learning_rate == pytest.approx(500 * rates[-1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"learning_rate": 0.0},
            "`learning_rate` must be a number, positive|`learning_rate` must be positive, got 0.0",
        ),
        ({"ema_decay": 1.0}, "`ema_decay` must be at least 0 and below 1, got 1.0"),
        ({"lr_scheduler": "piecewise_constant"}, "`lr_scheduler` must be one of linear, cosine.*'piecewise_constant'"),
        (
            {"lr_scheduler": "constant", "lr_stable_steps": 3},
            "`lr_stable_steps` goes with `lr_scheduler` linear or cosine",
        ),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)
