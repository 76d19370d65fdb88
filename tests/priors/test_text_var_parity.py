# SPDX-License-Identifier: Apache-2.0
"""The transformer that reads texts against the numbers of the official code of Switti."""

import pytest
import torch
from torch.nn import functional

from hf_var.conversion import export_switti
from hf_var.priors.attention import block_mask
from hf_var.priors.layers_text_var import crop_coordinates, fourier_features
from hf_var.priors.rotary import position_angles, rotate
from parity import load_switti_case, official_gradients


pytestmark = pytest.mark.parity
VARIANTS = [f"ar{causal}_crop{crop}" for causal in (0, 1) for crop in (0, 1)]


@pytest.fixture(scope="module")
def case():
    return load_switti_case()


@pytest.fixture(scope="module")
def model(case):
    return case.transformer("ar0_crop1")


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def teacher_forced(case, variant, model, **options):
    """The output for the codes of the images, with the loss that the case smooths."""
    model.config.label_smoothing = case.manifest["label_smoothing"]
    sizes = {"crop_sizes": torch.tensor(case.manifest["train_sizes"])} if variant.endswith("crop1") else {}
    inputs = {"scale_inputs": case.expected["tok/teacher_input"], "labels": case.expected["tok/codes"]}
    return model(**case.text(), **sizes, **inputs, **options)


def test_variants_are_those_of_the_case(case):
    assert set(case.variants) == set(VARIANTS)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_rotary_positions(case, model):
    cos, sin = position_angles(model.config, 0, model.config.length, torch.device("cpu"))
    case.assert_close("rope/cos", cos)
    case.assert_close("rope/sin", sin)
    case.assert_close("rope/x_rotated", rotate(case.expected["rope/x"], cos, sin))


def test_normalisations(case, model):
    states, layer = case.expected["norm/x"], model.layers[0]
    case.assert_close("norm/rms", layer.attention_norm(states))
    case.assert_close("norm/qk", layer.attention.q_norm(states))
    case.assert_close("norm/head", model.head_norm.norm(states))


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks(case, is_causal):
    config = case.transformer(f"ar{int(is_causal)}_crop0").config
    mask = block_mask(config, torch.zeros(1), 0, config.length)
    assert torch.equal(mask[0, 0], case.expected[f"mask/ar{int(is_causal)}"].bool())


def test_crops(case, model):
    embedding = model.embeddings.crop_embedding
    coordinates = crop_coordinates(torch.tensor(case.manifest["crop_sizes"]))
    case.assert_close("crop/coords", coordinates)
    case.assert_close("crop/embed", fourier_features(coordinates, embedding.frequencies))
    halves = fourier_features(coordinates, embedding.frequencies.bfloat16())
    assert halves.dtype == torch.bfloat16
    case.assert_close("crop/embed_bf16", halves)
    case.assert_close("crop/cond", embedding(torch.tensor(case.manifest["crop_sizes"])))
    # What a call without sizes means.
    sampling = crop_coordinates(torch.full((2, 2), 512))
    case.assert_close("crop/sampling_coords", sampling)
    text = case.text()
    with torch.no_grad():
        seen = []
        handle = embedding.register_forward_hook(lambda _, args, output: seen.append(output))
        model(**text)
        handle.remove()
    case.assert_close("crop/sampling_cond", seen[0])


def test_start(case, model):
    pooled = model.embeddings.condition_proj(case.text()["pooled_projections"])
    case.assert_close("start/cond", pooled)
    case.assert_close("start/token", model.embeddings(pooled, None, 0))


# --- the whole -------------------------------------------------------------------------------------------------------


def test_logits_and_losses(case, variant):
    model = case.transformer(variant)
    for training in (False, True):
        with torch.no_grad():
            output = teacher_forced(case, variant, model.train(training), output_hidden_states=True)
        case.assert_close(f"tf/{variant}/logits", output.logits)
    for index, states in enumerate(output.hidden_states[1:]):
        if f"tf/{variant}/hidden_{index}" in case.expected:
            case.assert_close(f"tf/{variant}/hidden_{index}", states)
    codes, scalars = (
        case.expected["tok/codes"],
        {name.rpartition("/")[2]: name for name in case.scalars if variant in name},
    )
    losses = functional.cross_entropy(output.logits.mT, codes, reduction="none")
    found = {
        "loss": output.loss.item(),
        "loss_no_smoothing": losses.mean().item(),
        "accuracy": (output.logits.argmax(-1) == codes).float().mean().item(),
    }
    for name, value in found.items():
        assert value == pytest.approx(case.scalars[scalars[name]], rel=0, abs=1e-5), name
    per_scale = [part.mean().item() for part in losses.split(model.config.scale_lengths, dim=1)]
    assert per_scale == pytest.approx(case.scalars[scalars["loss_per_scale"]], rel=0, abs=1e-5)


def test_hidden_states_are_stored_for_every_layer(case, model):
    assert {f"tf/ar0_crop1/hidden_{index}" for index in range(model.config.num_hidden_layers)} <= case.expected.keys()


def test_gradients(case, variant):
    model = case.transformer(variant)
    teacher_forced(case, variant, model).loss.backward()
    gradients = official_gradients(model, export_switti)
    norms = case.scalars[f"tf/{variant}/grad_norm"]
    # Buffers and the frozen frequencies have none.
    frozen = {"lvl_1L", "attn_bias_for_masking", "crop_embed.weight"}
    assert norms.keys() == gradients.keys() - frozen
    for name, norm in norms.items():
        actual = gradients[name].double().norm().item()
        assert abs(actual - norm) <= 1e-4 * norm + 2e-6, f"{name}: {actual} for {norm}"
    stored = [name for name in case.expected if name.startswith(f"tf/{variant}/grad/")]
    assert stored
    for name in stored:
        case.assert_close(name, gradients[name.removeprefix(f"tf/{variant}/grad/")])


def test_logits_step_by_step(case, variant):
    """The same numbers with a cache, scale by scale."""
    model = case.transformer(variant)
    sizes = {"crop_sizes": torch.tensor(case.manifest["train_sizes"])} if variant.endswith("crop1") else {}
    parts = [None, *case.expected["tok/teacher_input"].split(model.config.scale_lengths[1:], dim=1)]
    cache, logits = None, []
    with torch.no_grad():
        for k, scale_inputs in enumerate(parts):
            text = {**case.text(), **sizes} if k == 0 else {}
            output = model(**text, scale_inputs=scale_inputs, cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
    case.assert_close(f"tf/{variant}/logits", torch.cat(logits, dim=1))
