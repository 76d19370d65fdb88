# SPDX-License-Identifier: Apache-2.0
"""The hierarchical tokenizer and its moving averages against the public VQ-VAE-2's numbers."""

import pytest
import torch
from torch.nn import functional

from hf_var.conversion import export_vqvae2, load_vqvae2
from hf_var.training.codebook import MovingAverageCodebook, codebook_parts
from parity import load_lineage_case, official_gradients


pytestmark = pytest.mark.parity

SUFFIXES = {"vqvae1": [""], "vqvae2": ["_t", "_b"]}


@pytest.fixture(params=SUFFIXES)
def case(request):
    return load_lineage_case(request.param)


@pytest.fixture
def suffixes(case):
    return SUFFIXES[case.manifest["system"]]


def load(case):
    return load_vqvae2(case.weights, image_size=case.manifest["image_size"])


def expected_codes(case, suffixes, prefix):
    return torch.cat([case.expected[f"{prefix}{suffix}"].flatten(1) for suffix in suffixes], dim=1)


@torch.no_grad()
def test_encode_and_decode(case, suffixes):
    model = load(case)
    output, encoded = model(case.inputs["image"]), model.encode(case.inputs["image"])
    assert torch.equal(output.codes, expected_codes(case, suffixes, "eval/id"))
    assert torch.equal(encoded.codes, output.codes)
    case.assert_close("eval/sample", output.sample)
    for level, suffix in enumerate(suffixes):
        case.assert_close(f"eval/features{suffix}", encoded.features[level])
    scalars = case.scalars
    commitment = scalars["eval/latent_loss"]
    assert output.loss.item() == pytest.approx(0.25 * commitment, rel=1e-5)
    error = functional.mse_loss(output.sample, case.inputs["image"])
    assert error.item() == pytest.approx(scalars["eval/mse"], rel=1e-5)
    names = ["codes"] if suffixes == [""] else ["codes_top", "codes_bottom"]
    codes = torch.cat([case.inputs[name].flatten(1) for name in names], dim=1)
    # The reference does not clamp.
    expected = case.expected["eval/decode_code"].clamp(-1, 1)
    tolerance = 3 * case.manifest["sensitivity_1e-6"]["eval/decode_code"] + 2e-6
    torch.testing.assert_close(model.decode(codes).sample, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_stages_of_two_levels():
    case = load_lineage_case("vqvae2")
    model = load(case)
    top, bottom = model.encode(case.inputs["image"]).latents
    case.assert_close("eval/quant_t", top)
    case.assert_close("eval/quant_b", bottom)
    below = model.encoders[1](case.inputs["image"])
    case.assert_close("eval/enc_b", below)
    case.assert_close("eval/enc_t", model.encoders[0](below))
    case.assert_close("eval/dec_t", model.condition_decoders[0](top))


def assert_codebooks(case, model, step):
    exported = export_vqvae2(model)
    stored = [name for name in case.expected if name.startswith(f"{step}/quantize")]
    assert stored
    for name in stored:
        case.assert_close(name, exported[name.removeprefix(f"{step}/")])


def test_two_steps_of_training(case):
    """The reference's objective, optimizer and codebook updates, in its order: search, update, loss of the old vectors."""
    model = load(case).train()
    for codebook in model.codebooks:
        codebook.requires_grad_(False)
    averages = [MovingAverageCodebook(part) for part in codebook_parts(model)]
    settings = case.manifest["optimizer"]
    optimizer = torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
    )
    for step in (1, 2):
        images = case.inputs[f"train_image_{step}"]
        output = model(images)
        loss = functional.mse_loss(output.sample, images) + output.loss
        assert loss.item() == pytest.approx(case.scalars[f"train/step{step}/loss"], rel=1e-5)
        assert output.loss.item() == pytest.approx(0.25 * case.scalars[f"train/step{step}/latent_loss"], rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            gradients = official_gradients(model, export_vqvae2)
            norms = case.scalars["train/step1/grad_norms"]
            for name, norm in norms.items():
                assert gradients[name].double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), name
            for name in case.expected:
                if name.startswith("train/step1/grad/"):
                    case.assert_close(name, gradients[name.removeprefix("train/step1/grad/")])
            if "train/step1/sample" in case.expected:
                case.assert_close("train/step1/sample", output.sample)
        optimizer.step()
        for average in averages:
            average.observe(output.quantizer_inputs, output.codes)
            average.finish_step()
        assert_codebooks(case, model, f"train/step{step}")
    exported = export_vqvae2(model)
    for name in (name for name in case.expected if name.startswith("train/step2/param/")):
        # Adam divides by small gradients.
        torch.testing.assert_close(exported[name.split("/")[-1]], case.expected[name], rtol=0, atol=1e-5)


def test_moving_averages_alone():
    case = load_lineage_case("vqvae2")
    model = load(case).train().requires_grad_(False)
    averages = [MovingAverageCodebook(part) for part in codebook_parts(model)]
    for step in (1, 2):
        output = model(case.inputs[f"train_image_{step}"])
        assert output.loss.item() == pytest.approx(0.25 * case.scalars[f"ema/warm/step{step}/latent_loss"], rel=1e-5)
        for average in averages:
            average.observe(output.quantizer_inputs, output.codes)
            average.finish_step()
        assert_codebooks(case, model, f"ema/warm/step{step}")
