# SPDX-License-Identifier: Apache-2.0
"""How well a prior predicts the codes of a validation set."""

import pytest
import torch
from accelerate import Accelerator

from hf_var import PixelCNN, PixelCNNConfig
from hf_var.metrics import likelihood


def test_a_process_that_waits_for_others_runs_with_complete_inputs(monkeypatch):
    """The prior needs classes, and its map is not all of the tokenizer's codes."""
    config = PixelCNNConfig(
        codebook_size=8, map_size=4, hidden_size=8, head_hidden_size=8, num_hidden_layers=2, num_labels=3
    )
    prior = PixelCNN(config)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "codes": torch.randint(8, (2, 20), generator=generator),
        "class_labels": torch.tensor([0, 2]),
    }

    def make_inputs(batch):
        codes = batch["codes"].split((4, 16), dim=1)[1]
        return {"codes": codes, "class_labels": batch["class_labels"], "labels": codes}

    accelerator = Accelerator(cpu=True)
    alone = likelihood.measure_likelihood(prior, make_inputs, [batch], accelerator)
    calls = []
    prior.register_forward_hook(lambda *_: calls.append(None))
    monkeypatch.setattr(likelihood, "_in_step", lambda batches, _: [*batches, None, None])
    waiting = likelihood.measure_likelihood(prior, make_inputs, [batch], accelerator)
    assert len(calls) == 3
    assert waiting == pytest.approx(alone)
