# SPDX-License-Identifier: Apache-2.0
"""The tokenizer against the official implementation's numbers."""

import json

import pytest
import torch

from hf_var import VQVAEConfig
from hf_var.autoencoders.quantization import MultiScaleResidualQuantizer
from hf_var.conversion import export_official_vqvae, load_official_vqvae
from parity import CASES, FIXTURES, load_case, official_gradients


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return load_case(request.param)


@pytest.fixture(scope="module")
def model(case):
    return load_official_vqvae(case.vqvae_weights, patch_nums=case.patch_nums)


@torch.no_grad()
def test_encode(case, model):
    output = model.encode(case.inputs["image"])
    case.assert_close("tok/idx", output.codes)
    case.assert_close("tok/enc", model.encoder(case.inputs["image"]))
    case.assert_close("tok/feat", output.features)
    torch.testing.assert_close(output.latents, case.expected["tok/fhat"][-1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_decode(case, model):
    codes = case.expected["tok/idx"]
    case.assert_close("tok/recon", model.decode(codes).sample)
    scales = range(1, len(case.patch_nums) + 1)
    case.assert_close("tok/recon_scales", torch.stack([model.decode(codes, num_scales=k).sample for k in scales]))


@torch.no_grad()
def test_latents_and_transformer_inputs_of_every_scale(case, model):
    codes = case.expected["tok/idx"]
    running, inputs, latents = [], [], None
    for scale, (begin, end) in enumerate(case.manifest["derived"]["begin_ends"]):
        latents, next_inputs = model.next_scale(latents, codes[:, begin:end], scale)
        running.append(latents)
        inputs.append(next_inputs)
    case.assert_close("tok/fhat", torch.stack(running))
    case.assert_close("var/teacher_input", torch.cat(inputs[:-1], dim=1))
    case.assert_close("var/teacher_input", model.teacher_forcing(codes))


def test_training_pass(case):
    model = load_official_vqvae(case.vqvae_weights, patch_nums=case.patch_nums).train()
    output = model(case.inputs["image"])
    case.assert_close("tok/idx", output.codes)
    case.assert_close("vae_train/recon", output.sample)
    assert output.loss.item() == pytest.approx(case.scalars["vae_train/vq_loss"], abs=2e-6)
    (output.loss + output.sample.mean()).backward()
    case.assert_gradients_close("vae_train/", official_gradients(model, export_official_vqvae))


def refinement_indices(num_scales, num_convs):
    config = VQVAEConfig(
        patch_nums=[1] * num_scales, num_refinement_convs=num_convs, latent_channels=1, codebook_size=1
    )
    return MultiScaleResidualQuantizer(config).refinement_indices


@pytest.mark.parametrize("num_convs", [0, 2, 3, 4, 5, 6])
def test_refinement_conv_of_every_scale(num_convs):
    table = json.loads((FIXTURES / "phi_index_table.json").read_text(encoding="utf-8"))[str(num_convs)]
    assert len(table) == 15
    for num_scales, expected in table.items():
        assert refinement_indices(int(num_scales), num_convs) == expected, f"{num_scales} scales"


@pytest.mark.parametrize("num_convs", [0, 1, 2, 4])
def test_refinement_conv_of_a_single_scale(num_convs):
    assert refinement_indices(1, num_convs) == [0]


@pytest.mark.parametrize("patch_nums", [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)])
def test_refinement_conv_of_the_released_models(patch_nums):
    config = VQVAEConfig(patch_nums=patch_nums, latent_channels=1, codebook_size=1)
    assert MultiScaleResidualQuantizer(config).refinement_indices == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
