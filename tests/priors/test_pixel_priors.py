# SPDX-License-Identifier: Apache-2.0
"""PixelCNN and PixelSNAIL: which logits depend on what."""

import pytest
import torch

from hf_var import PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig
from hf_var.priors.causal_layers import MaskedConv2d, WeightNormConv2d
from priors.pixels import CLASSES, CNN, KINDS, SNAIL, condition_of, give_contrast, pixel_inputs, pixel_prior


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WITH_CLASSES = [kind for kind, (_, fields) in KINDS.items() if fields.get("num_labels")]
FINE = [kind for kind in KINDS if "fine" in kind]


@pytest.fixture(params=KINDS)
def model(request):
    return pixel_prior(request.param)


@torch.no_grad()
def test_a_code_moves_no_logit_at_or_before_its_place(model):
    inputs = pixel_inputs(model.config)
    logits = model(**inputs).logits
    assert logits.shape == (3, model.config.length, 11)
    assert logits.dtype == torch.float32
    assert min(logits.std(dim).mean() for dim in (0, 1, 2)) > 0.1
    for place in range(model.config.length):
        changed = {**inputs, "codes": inputs["codes"].clone()}
        changed["codes"][:, place] = (changed["codes"][:, place] + 1) % 11
        difference = (model(**changed).logits - logits).abs().amax(dim=(0, 2))
        assert difference[: place + 1].max() == 0
        # Its neighbours to the right and below see it.
        if (place + 1) % model.config.width:
            assert difference[place + 1] > 1e-4
        if place + model.config.width < model.config.length:
            assert difference[place + model.config.width] > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cnn", "cnn_wide", "snail", "snail_fine"])
def test_no_earlier_place_is_blind(kind):
    """Every place in reach, here the whole map, sees all before it: the stacks together have no blind spot."""
    model = pixel_prior(kind, map_size=(4, 3))
    inputs = pixel_inputs(model.config, batch_size=1)
    logits = model(**inputs).logits
    for place in range(model.config.length - 1):
        changed = {**inputs, "codes": inputs["codes"].clone()}
        changed["codes"][:, place] = (changed["codes"][:, place] + 1) % 11
        difference = (model(**changed).logits - logits).abs().amax(dim=(0, 2))
        assert difference[-1] > 1e-6, place


@torch.no_grad()
def test_first_rows_are_those_of_the_whole_map(model):
    inputs = pixel_inputs(model.config)
    logits = model(**inputs).logits
    for num_rows in range(1, model.config.height):
        num_codes = num_rows * model.config.width
        found = model(inputs["codes"][:, :num_codes], **condition_of(inputs)).logits
        torch.testing.assert_close(found, logits[:, :num_codes], **CLOSE)


@torch.no_grad()
def test_a_batch_equals_its_maps(model):
    inputs = pixel_inputs(model.config)
    logits = model(**inputs).logits
    for index in range(3):
        single = {name: values[index : index + 1] for name, values in inputs.items()}
        torch.testing.assert_close(model(**single).logits, logits[index : index + 1], **CLOSE)


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_the_codes_themselves(model):
    inputs = pixel_inputs(model.config)
    labels = inputs["codes"].clone()
    labels[0, 2:5] = -100
    output = model(**inputs, labels=labels)
    chosen = output.logits.log_softmax(-1).gather(2, inputs["codes"][:, :, None])[..., 0]
    torch.testing.assert_close(output.loss, -chosen[labels >= 0].mean())


@torch.no_grad()
@pytest.mark.parametrize("kind", WITH_CLASSES)
def test_every_code_reacts_to_the_class_even_the_first(kind):
    model = pixel_prior(kind)
    inputs = pixel_inputs(model.config)
    logits = model(**inputs).logits
    inputs["class_labels"] = (inputs["class_labels"].clamp(min=0) + 1) % 4
    assert (model(**inputs).logits - logits).abs().amax(-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", FINE)
def test_every_fine_code_reacts_to_the_coarse_code_above_it(kind):
    model = pixel_prior(kind)
    config = model.config
    inputs = pixel_inputs(config)
    logits = model(**inputs).logits.unflatten(1, config.map_size)
    coarse = inputs["condition_codes"]
    factors = [fine // rough for fine, rough in zip(config.map_size, config.condition_map_size, strict=True)]
    assert factors == ([2, 3] if config.width == 9 else [2, 2])
    for place in range(config.condition_length):
        changed = coarse.clone()
        changed[:, place] = (changed[:, place] + 1) % config.num_condition_codes
        found = model(**{**inputs, "condition_codes": changed}).logits.unflatten(1, config.map_size)
        row, column = divmod(place, config.condition_map_size[1])
        moved = (found - logits).abs().amax(dim=(0, 3))
        below = moved[row * factors[0] : (row + 1) * factors[0], column * factors[1] : (column + 1) * factors[1]]
        assert below.min() > 1e-4


@torch.no_grad()
def test_the_condition_reaches_no_further_than_its_neighbours_at_a_first_code():
    # The stack of two convolutions per block and one before has a reach of 3.
    model = pixel_prior("snail_fine", map_size=(4, 16), condition_map_size=(2, 8))
    inputs = pixel_inputs(model.config)
    logits = model(**inputs).logits
    inputs["condition_codes"][:, 7] = (inputs["condition_codes"][:, 7] + 1) % 7
    moved = (model(**inputs).logits - logits).abs().amax(dim=(0, 2)).unflatten(0, (4, 16))
    assert moved[0, :8].max() == 0
    assert moved[0, 8:].min() > 0


@torch.no_grad()
def test_unconditional_labels_are_one_class():
    model = pixel_prior("cnn_dropped_classes")
    codes = pixel_inputs(model.config)["codes"]
    expected = model(codes, torch.full((3,), -1)).logits
    assert torch.equal(model(codes, torch.full((3,), 4)).logits, expected)
    assert torch.equal(model(codes).logits, expected)
    assert not torch.allclose(model(codes, torch.tensor([0, 1, 2])).logits, expected, atol=1e-2)


def test_classes_are_dropped_in_training_alone():
    model = pixel_prior("cnn", class_dropout_prob=0.5)
    codes = pixel_inputs(model.config)["codes"][:1].expand(400, -1)
    labels = torch.full((400,), 2)
    with torch.no_grad():
        expected = [model(codes[:1], torch.tensor([label])).logits for label in (2, -1)]
        assert torch.allclose(model(codes, labels).logits, expected[0], atol=1e-5)
        torch.manual_seed(0)
        logits = model.train()(codes, labels).logits
    dropped = (logits - expected[1]).abs().amax(dim=(1, 2)) < 1e-5
    kept = (logits - expected[0]).abs().amax(dim=(1, 2)) < 1e-5
    assert bool((dropped ^ kept).all())
    assert 150 < dropped.sum() < 250
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(model(codes, labels).logits, logits)


def test_a_model_without_classes_has_no_weights_for_them():
    for kind in ("cnn_unconditional", "snail"):
        model = pixel_prior(kind)
        assert not any("class" in name or "condition" in name for name in model.state_dict())
        codes = pixel_inputs(model.config)["codes"]
        with torch.no_grad():
            assert torch.equal(model(codes, torch.tensor([-1, 0, -1])).logits, model(codes).logits)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(PixelCNN, PixelCNNConfig(**CNN)), (PixelSNAIL, PixelSNAILConfig(**{**SNAIL, **CLASSES}))],
)
def test_masked_weights_stay_without_effect_in_training(model_class, config):
    model = give_contrast(model_class(config))
    masked = [
        (module.weight_v if isinstance(module, WeightNormConv2d) else module.weight, module.num_masked)
        for module in model.modules()
        if isinstance(module, MaskedConv2d) and module.num_masked
    ]
    # The first layer's two convolutions, or two in each residual block.
    assert len(masked) == (2 if model_class is PixelCNN else 2 * 2 * 2)
    inputs = pixel_inputs(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["codes"]).loss.backward()
        for weight, num_masked in masked:
            hidden = weight.grad[:, :, -1, weight.shape[3] - num_masked :]
            assert hidden.numel() > 0
            assert hidden.abs().max() == 0
            assert weight.grad.abs().sum() > 0
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        for weight, num_masked in masked:
            weight[:, :, -1, weight.shape[3] - num_masked :] = 1e9
        assert torch.equal(model(**inputs).logits, logits)


def test_every_parameter_learns(model):
    inputs = pixel_inputs(model.config)
    model.train()(**inputs, labels=inputs["codes"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A bias of all keys of a query moves no softmax.
        assert parameter.grad.abs().max() > 0 or name.endswith("key.bias"), name


def test_fresh_weights_learn_a_pattern():
    torch.manual_seed(0)
    for model in (
        PixelCNN(PixelCNNConfig(map_size=(3, 4), codebook_size=5, hidden_size=16, num_hidden_layers=3)),
        PixelSNAIL(PixelSNAILConfig(**{**SNAIL, "map_size": (3, 4), "codebook_size": 5, "dropout": 0.0})),
    ):
        first = torch.randint(5, (64, 1))
        codes = (first + torch.arange(12)) % 5
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(60):
            loss = model(codes, labels=codes).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Only the first of twelve codes is unknown: log(5) / 12.
        assert losses[0] > 1.4
        assert losses[-1] < 0.17


def test_fresh_weights_normalise_the_masked_direction():
    model = PixelSNAIL(PixelSNAILConfig(**SNAIL))
    for module in model.modules():
        if isinstance(module, WeightNormConv2d):
            weight = module.effective_weight()
            norms = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
            torch.testing.assert_close(norms, module.weight_g)
            assert not weight[:, :, -1, weight.shape[3] - module.num_masked :].any() or module.num_masked == 0


def test_dropout_acts_in_training_alone():
    model = pixel_prior("snail_fine_classes", dropout=0.3, class_dropout_prob=0.1, num_output_res_blocks=1)
    inputs = pixel_inputs(model.config)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                assert module.p == 0.3
