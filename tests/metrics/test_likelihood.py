# SPDX-License-Identifier: Apache-2.0
"""How well a prior predicts the codes of a validation set."""

from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator

from hf_var import PixelCNN, PixelCNNConfig
from hf_var.metrics import likelihood


CONFIG = PixelCNNConfig(
    codebook_size=8, map_size=4, hidden_size=8, head_hidden_size=8, num_hidden_layers=2, num_labels=3
)


class FirstOfTwo(Accelerator):
    """The accelerator of a process beside another one, which has `others` batches."""

    num_processes = 2

    def __init__(self, others):
        super().__init__(cpu=True)
        self.others = others

    def reduce(self, tensor, reduction="sum"):
        if tensor.is_floating_point():
            return tensor
        self.others -= 1
        return tensor + (self.others >= 0)

    @contextmanager
    def autocast(self):
        yield


def make_batch(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (number,), generator=generator)
    return {"codes": torch.randint(8, (number, 20), generator=generator), "class_labels": labels}


def make_inputs(batch):
    """The prior needs classes, and its map is not all of the tokenizer's codes."""
    codes = batch["codes"].split((4, 16), dim=1)[1]
    return {"codes": codes, "class_labels": batch["class_labels"], "labels": codes}


def test_a_process_that_waits_for_others_runs_with_complete_inputs(monkeypatch):
    prior, batch = PixelCNN(CONFIG), make_batch(2)
    alone = likelihood.measure_likelihood(prior, make_inputs, [batch], Accelerator(cpu=True))
    calls = []
    prior.register_forward_hook(lambda *call: calls.append(call))
    monkeypatch.setattr(likelihood, "gather_object", lambda objects: [*objects, None])
    waiting = likelihood.measure_likelihood(prior, make_inputs, [batch], FirstOfTwo(others=3))
    assert len(calls) == 3
    assert waiting == pytest.approx(alone)


def test_a_process_without_a_share_runs_with_what_another_one_has(monkeypatch):
    prior, other = PixelCNN(CONFIG), {name: values[:1] for name, values in make_batch(2).items()}
    seen = []
    monkeypatch.setattr(likelihood, "gather_object", lambda objects: [*objects, other])

    def note(batch):
        seen.append(batch)
        return make_inputs(batch)

    with pytest.raises(ValueError, match="`validation_data` has no image that can be read"):
        likelihood.measure_likelihood(prior, note, [], FirstOfTwo(others=2))
    assert len(seen) == 2
    for batch in seen:
        assert all(torch.equal(batch[name], values) for name, values in other.items())
