# SPDX-License-Identifier: Apache-2.0
"""A trained model for another label set: what is known of both stays, what is new begins as no class at all."""

import pytest
import torch
from peft import LoraConfig

from hf_var import VARTransformer
from hf_var.compatibility import add_adapter
from priors.tiny import give_contrast, logits_block_by_block, tiny_config, tiny_inputs, tiny_model


BEFORE = {0: "cat", 1: "dog", 2: "crane", 3: "crane", 4: "owl"}
AFTER = {0: "owl", 1: "newt", 2: "crane", 3: "cat", 4: "crane", 5: "crane", 6: "toad"}
# Rows of the old table: the sixth is the unconditional one.
ROWS = [4, 5, 2, 0, 3, 5, 5, 5]


@pytest.fixture(params=[False, True], ids=["adaln_per_layer", "shared_adaln"])
def model(request):
    config = tiny_config(num_labels=None, id2label=BEFORE, shared_adaln=request.param)
    return give_contrast(VARTransformer(config)).eval()


def table(model):
    return model.embeddings.class_embedding.weight


@torch.no_grad()
def logits_of(model, label, seed=0):
    inputs = tiny_inputs(model.config, seed=seed)
    return model(torch.full((3,), label), inputs["scale_inputs"]).logits


def test_rows_follow_their_names_and_new_ones_begin_as_unconditional(model):
    rows, others = table(model).detach().clone(), {name: weight.clone() for name, weight in model.state_dict().items()}
    model.set_labels(AFTER)
    assert torch.equal(table(model), rows[ROWS])
    for name, weight in model.state_dict().items():
        if "class_embedding" not in name:
            assert torch.equal(weight, others[name]), name
    assert (model.config.num_labels, model.config.id2label) == (7, AFTER)
    assert model.config.label2id["toad"] == 6
    assert model.embeddings.class_embedding.num_embeddings == 8


def test_outputs_of_what_stays_are_the_same_bit_for_bit(model):
    unconditional, owl, cat = (logits_of(model, label) for label in (-1, 4, 0))
    assert not torch.allclose(owl, unconditional, atol=0.1)
    inputs = tiny_inputs(model.config) | {"class_labels": torch.tensor([5, 4, 0])}
    stepped = logits_block_by_block(model, inputs)
    model.set_labels(AFTER)
    for label, expected in [(-1, unconditional), (7, unconditional), (1, unconditional), (0, owl), (3, cat)]:
        assert torch.equal(logits_of(model, label), expected), label
    inputs["class_labels"] = torch.tensor([7, 0, 3])
    assert torch.equal(logits_block_by_block(model, inputs), stepped)
    with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 7\)"):
        logits_of(model, 8)


def test_the_same_labels_change_nothing(model):
    rows, parameters = table(model).detach().clone(), len(list(model.parameters()))
    model.set_labels(dict(BEFORE))
    assert torch.equal(table(model), rows)
    assert len(list(model.parameters())) == parameters


def test_to_no_labels_and_back(model):
    unconditional = logits_of(model, -1)
    model.set_labels(None)
    assert (model.config.num_labels, model.config.id2label, table(model).shape[0]) == (0, {}, 1)
    assert torch.equal(logits_of(model, 0), unconditional)
    with torch.no_grad():
        assert torch.equal(model(None, tiny_inputs(model.config)["scale_inputs"]).logits, unconditional)
    model.set_labels({0: "newt", 1: "toad"})
    for label in (-1, 0, 1, 2):
        assert torch.equal(logits_of(model, label), unconditional)


@pytest.mark.parametrize("names", [AFTER, None, {}], ids=["seven", "none", "empty"])
def test_changed_labels_survive_saving(model, names, tmp_path):
    model.set_labels(names)
    model.save_pretrained(tmp_path)
    loaded, report = VARTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.id2label == (names or {})
    assert loaded.config.label2id == model.config.label2id
    assert torch.equal(table(loaded), table(model))
    assert torch.equal(logits_of(loaded, 0), logits_of(model, 0))


def test_new_labels_learn(model):
    """The new row is one of its own, not a view of the unconditional one."""
    model.set_labels({0: "newt", 1: "cat"})
    before = table(model).detach().clone()
    inputs = tiny_inputs(model.config) | {"class_labels": torch.zeros(3, dtype=torch.long)}
    model(**inputs).loss.backward()
    with torch.no_grad():
        table(model).sub_(table(model).grad)
    changed = (table(model) != before).any(dim=1)
    assert changed.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_kind_of_the_weights_is_kept(dtype, requires_grad):
    model = tiny_model().to(dtype).requires_grad_(requires_grad)
    model.set_labels(AFTER)
    assert table(model).dtype == dtype
    assert table(model).is_leaf
    assert {parameter.requires_grad for parameter in model.parameters()} == {requires_grad}


def test_a_model_without_memory():
    with torch.device("meta"):
        model = VARTransformer(tiny_config())
    model.set_labels(AFTER)
    assert (table(model).device.type, table(model).shape[0]) == ("meta", 8)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({0: "cat", 2: "dog"}, r"`id2label` must name the ids 0 to 1, got \[0, 2\]"),
        ({0: "cat", "dog": 1}, "`id2label` must name the ids 0 to 1"),
        ({0: "cat", 1: 7}, r"`id2label` must name each label by a text, got \{1: 7\}"),
        (["cat", "dog"], r"`id2label` must be a dictionary, got \['cat', 'dog'\]"),
        (3, "`id2label` must be a dictionary, got 3"),
    ],
    ids=str,
)
def test_bad_labels_are_refused_and_change_nothing(model, names, message):
    rows = table(model).detach().clone()
    with pytest.raises(ValueError, match=message):
        model.set_labels(names)
    assert model.config.id2label == BEFORE
    assert torch.equal(table(model), rows)


def test_ids_as_text_in_any_order(model):
    """As JSON gives them."""
    model.set_labels({"1": "dog", "0": "owl"})
    assert list(model.config.id2label.items()) == [(0, "owl"), (1, "dog")]
    assert torch.equal(logits_of(model, 1), logits_of(model, model.config.label2id["dog"]))


def test_an_embedding_held_by_an_adapter_is_refused(model):
    add_adapter(model, LoraConfig(target_modules=["fc1"], modules_to_save=["class_embedding"]))
    with pytest.raises(ValueError, match="`set_labels` needs the plain class embedding, but an adapter"):
        model.set_labels(AFTER)
    assert model.config.id2label == BEFORE
