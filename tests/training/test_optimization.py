# SPDX-License-Identifier: Apache-2.0
"""Weight decay and averaged weights."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from hf_var import VARConfig, VARTransformer
from hf_var.training.arguments import TrainingArguments
from hf_var.training.optimization import averaged_weights, make_optimizer


def test_decay_acts_on_matrices_alone() -> None:
    config = VARConfig(
        num_labels=3, patch_nums=(1, 2), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, shared_adaln=True
    )
    model = VARTransformer(config)
    args = TrainingArguments(train_data="", output_dir="", weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
        for group in make_optimizer(model, args).param_groups
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
    average = EMAModel(model.parameters(), decay=0.5)
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
