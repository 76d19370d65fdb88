# SPDX-License-Identifier: Apache-2.0
"""PixelCNN and PixelSNAIL against the numbers of the public code."""

import pytest
import torch

from hf_var.conversion import export_pixelcnn, export_pixelsnail, load_pixelcnn, load_pixelsnail
from parity import load_lineage_case, official_gradients
from priors.pixels import draws, greedy, sample_by_rows, sample_naively


pytestmark = pytest.mark.parity
CASES = {
    "pixelcnn": (load_pixelcnn, export_pixelcnn),
    "pixelsnail_top": (load_pixelsnail, export_pixelsnail),
    "pixelsnail_bottom": (load_pixelsnail, export_pixelsnail),
}


@pytest.fixture(params=CASES)
def case(request):
    return load_lineage_case(request.param)


@pytest.fixture
def model(case):
    load, _ = CASES[case.manifest["system"]]
    return load(case.weights, **({"map_size": case.manifest["shape"]} if load is load_pixelcnn else {}))


def condition_of(case):
    inputs = case.inputs
    if "labels" in inputs:
        return {"class_labels": inputs["labels"]}
    return {"condition_codes": inputs["condition"].flatten(1)} if "condition" in inputs else {}


def as_maps(logits, width):
    """`(batch, length, codes)` as the public code has them, `(batch, codes, height, width)`."""
    return logits.transpose(1, 2).unflatten(2, (-1, width))


@torch.no_grad()
def test_logits(case, model):
    codes, width = case.inputs["codes"].flatten(1), model.config.width
    case.assert_close("logits", as_maps(model(codes, **condition_of(case)).logits, width))
    if "logits_first_rows" in case.expected:
        output = model(codes[:, : 2 * width], **condition_of(case))
        case.assert_close("logits_first_rows", as_maps(output.logits, width))


@torch.no_grad()
def test_another_condition(case, model):
    condition = condition_of(case)
    for argument, name, number in (
        ("class_labels", "logits_other_labels", model.config.num_labels),
        ("condition_codes", "logits_other_condition", model.config.codebook_size),
    ):
        if argument in condition:
            other = {argument: (condition[argument] + 1) % number}
            output = model(case.inputs["codes"].flatten(1), **other)
            case.assert_close(name, as_maps(output.logits, model.config.width))


@torch.no_grad()
def test_inner_states(case, model):
    condition = condition_of(case)
    if "condition" in case.expected:
        case.assert_close("condition", model.embed_condition(None, condition["condition_codes"]))
    if "layer0_vertical" in case.expected:
        outputs = []
        for layer in model.layers[:2]:
            layer.register_forward_hook(lambda _, args, output: outputs.append(output))
        model(case.inputs["codes"].flatten(1), **condition)
        for index, stacks in enumerate(outputs):
            case.assert_close(f"layer{index}_vertical", stacks[0])
            case.assert_close(f"layer{index}_horizontal", stacks[1])


def test_loss_and_gradients(case, model):
    codes = case.inputs["codes"].flatten(1)
    output = model(codes, **condition_of(case), labels=codes)
    tolerance = 3 * case.manifest["scalar_sensitivity_1e-6"]["loss"] + 2e-6
    assert output.loss.item() == pytest.approx(case.scalars["loss"], abs=tolerance)
    accuracy = (output.logits.argmax(-1) == codes).float().mean().item()
    assert accuracy == pytest.approx(case.scalars["accuracy"])
    output.loss.backward()
    _, export = CASES[case.manifest["system"]]
    case.assert_gradients_close("", official_gradients(model, export))


@pytest.mark.parametrize("sample", [sample_naively, sample_by_rows], ids=["whole_maps", "cached_rows"])
def test_sampled_codes(case, model, sample):
    settings, shape = case.manifest["sampling"], case.expected["greedy"].shape
    condition = {name: values[: len(case.expected["greedy"])] for name, values in condition_of(case).items()}
    codes = sample(model, shape[0], greedy, **condition)
    case.assert_close("greedy", codes.view(shape))
    codes = sample(model, settings["batch"], draws(settings["temperature"], settings["seed"]), **condition)
    case.assert_close("sampled", codes.view(case.expected["sampled"].shape))
