# SPDX-License-Identifier: Apache-2.0
"""Pipelines with LoRA adapters that change what they draw, and the state that must come back without them."""

import torch

from hf_var.training.lora import add_lora, save_lora
from pipelines.tiny import make_pipeline, seeded


NEW_LABELS = {0: "newt", 1: "goldfish", 2: "toad"}
LABELS = [0, 1, None, 2]


def draw(pipe, labels=LABELS):
    pipe.set_progress_bar_config(disable=True)
    return pipe(labels, generator=seeded(), output_type="pt")


def assert_equal(output, expected):
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)


@torch.no_grad()
def logits_of(pipe):
    inputs = torch.randn(3, 20, 4, generator=seeded())
    return pipe.transformer(torch.tensor([0, 1, 2]), inputs).logits


@torch.no_grad()
def give_adapter(transformer, seed=0, **arguments):
    """As if it had been trained, with strong changes."""
    add_lora(transformer, rank=2, **arguments)
    generator = seeded(seed)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator)
            parameter.add_(change * (0.3 if "lora_B" in name else 0.6 if "class_embedding" in name else 0.1))
    return transformer


def make_adapter(folder, labels=None, seed=0, **arguments):
    """A pipeline with a trained adapter, whose folder has been written."""
    pipe = make_pipeline()
    if labels is not None:
        pipe.transformer.set_labels(labels)
    give_adapter(pipe.transformer, seed, **arguments)
    save_lora(pipe.transformer, folder)
    return pipe


def state_of(transformer):
    """Everything that a plain transformer is."""
    weights = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    kinds = [(name, type(module)) for name, module in transformer.named_modules()]
    trainable = [parameter.requires_grad for parameter in transformer.parameters()]
    return weights, kinds, trainable, dict(transformer.config.id2label), transformer.embeddings.num_labels


def assert_state(transformer, expected):
    weights, *rest = state_of(transformer)
    assert rest == list(expected[1:])
    assert weights.keys() == expected[0].keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[0][name]), name
    assert not hasattr(transformer, "peft_config")
    assert not transformer._hf_peft_config_loaded
