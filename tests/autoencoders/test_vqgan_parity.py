# SPDX-License-Identifier: Apache-2.0
"""VQGAN's and RQ-VAE's tokenizers against the numbers of their code."""

import functools

import pytest
import torch
from torch.nn import functional

from hf_var import stack_codes, unstack_codes
from hf_var.conversion import export_rqvae, export_taming_vqgan, load_rqvae, load_taming_vqgan
from hf_var.training.codebook import SequentialMovingAverageCodebook, codebook_parts
from parity import load_lineage_case, official_gradients


pytestmark = pytest.mark.parity

# Weights of commitment and codebook terms.
LOSSES = {"legacy": (1.0, 0.25), "fixed": (0.25, 1.0)}


def decode_unclamped(model, latents):
    return model._decode_latents(latents)


# --- VQGAN -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "wide"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def vqgan(name):
    return load_lineage_case("vqgan", name)


def load_vqgan(case, name, **fields):
    height, width = (
        side // 2 ** (len(arguments(case, name)["ch_mult"]) - 1) for side in case.manifest["image_sizes"][name]
    )
    return load_taming_vqgan(case.weights, patch_nums=[(height, width)], **fields)


def arguments(case, name):
    return case.manifest["vqmodel_args"][name]["ddconfig"]


@torch.no_grad()
def test_stages_of_vqgan(vqgan, name):
    model = load_vqgan(vqgan, name)
    pixels = vqgan.inputs[f"{name}/pixels"]
    output, encoded = model(pixels), model.encode(pixels)
    for codes in (output.codes, encoded.codes):
        vqgan.assert_close(f"{name}/codes", codes)
    vqgan.assert_close(f"{name}/enc", model.encoder(pixels))
    vqgan.assert_close(f"{name}/feat", encoded.features)
    vqgan.assert_close(f"{name}/latents", encoded.latents)
    vqgan.assert_close(f"{name}/recon", output.sample)
    codes = vqgan.expected[f"{name}/codes"]
    vqgan.assert_close(f"{name}/recon_from_codes", decode_unclamped(model, model.latents(codes)))
    decoded = model.decode(codes).sample
    expected = vqgan.expected[f"{name}/recon_from_codes"]
    torch.testing.assert_close(decoded, expected if name == "wide" else expected.clamp(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_of_vqgan(vqgan, name, kind):
    # Without overrides the weights are those of the released models.
    commitment, codebook = LOSSES[kind]
    fields = {} if kind == "legacy" else {"commitment_loss_weight": commitment, "codebook_loss_weight": codebook}
    model = load_vqgan(vqgan, name, **fields).train()
    assert (model.config.commitment_loss_weight, model.config.codebook_loss_weight) == (commitment, codebook)
    pixels, scalars = vqgan.inputs[f"{name}/pixels"], vqgan.scalars
    output = model(pixels)
    vqgan.assert_close(f"{name}/recon", output.sample)
    assert output.loss.item() == pytest.approx(scalars[f"{name}/{kind}/quant_loss"], rel=1e-4, abs=2e-6)
    assert output.sample.mean().item() == pytest.approx(scalars[f"{name}/{kind}/recon_mean"], rel=1e-4, abs=2e-6)
    l1 = functional.l1_loss(output.sample, pixels)
    assert l1.item() == pytest.approx(scalars[f"{name}/{kind}/recon_l1"], rel=1e-4, abs=2e-6)
    (output.loss + output.sample.mean()).backward()
    vqgan.assert_gradients_close(f"{name}/{kind}/", official_gradients(model, export_taming_vqgan))


def test_the_two_losses_have_other_gradients(vqgan, name):
    legacy, fixed = (vqgan.scalars[f"{name}/{kind}/grad_norms"] for kind in LOSSES)
    assert legacy["quantize.embedding.weight"] == pytest.approx(fixed["quantize.embedding.weight"] / 4, rel=1e-3)
    assert abs(legacy["quant_conv.bias"] - fixed["quant_conv.bias"]) > 0.1 * fixed["quant_conv.bias"]


@torch.no_grad()
def test_loss_of_class_maps():
    case = load_lineage_case("vqgan", "wide")
    model, pixels = load_vqgan(case, "wide").train(), case.inputs["wide/pixels"]
    output = model(pixels)
    loss = functional.binary_cross_entropy_with_logits(output.sample, pixels)
    assert loss.item() == pytest.approx(case.scalars["wide/bce_loss"], rel=1e-4)
    assert (loss + output.loss).item() == pytest.approx(case.scalars["wide/bce_total_loss"], rel=1e-4)


# --- RQ-VAE ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rqvae():
    return load_lineage_case("rqvae", "rqvae")


def load_rq(case, **fields):
    height, width, depth = case.manifest["hparams"]["code_shape"]
    return load_rqvae(case.weights, patch_nums=[(height, width)] * depth, **fields)


def ours(stacks):
    """Codes of the RQ-VAE's code, `(batch, height, width, depth)`, as ours, `(batch, length)`."""
    return unstack_codes(stacks.flatten(1, 2))


def theirs(values, case):
    """Codes, or what there is of each, `(batch, length, ...)`, in the RQ-VAE's order."""
    height, width, depth = case.manifest["hparams"]["code_shape"]
    return values.unflatten(1, (depth, height, width)).movedim(1, 3)


@torch.no_grad()
def test_stages_of_rqvae(rqvae):
    model = load_rq(rqvae)
    output, encoded = model(rqvae.inputs["pixels"]), model.encode(rqvae.inputs["pixels"])
    rqvae.assert_close("codes", theirs(output.codes, rqvae))
    rqvae.assert_close("codes", theirs(encoded.codes, rqvae))
    stacks = stack_codes(encoded.codes, depth=len(model.config.patch_nums))
    assert torch.equal(stacks, rqvae.expected["codes"].flatten(1, 2))
    rqvae.assert_close("feat", encoded.features)
    rqvae.assert_close("latents", torch.stack(model.running_latents(encoded.codes)))
    rqvae.assert_close("recon", output.sample)
    codes = ours(rqvae.expected["codes"])
    rqvae.assert_close("recon_from_codes", decode_unclamped(model, model.latents(codes)))
    rqvae.assert_close("recon_first_two_depths", decode_unclamped(model, model.latents(codes, num_scales=2)))
    length, size = model.config.scale_lengths[0], model.config.latent_size
    second = model.code_vectors(codes[:, length : 2 * length]).transpose(1, 2).unflatten(2, size)
    rqvae.assert_close("recon_second_depth_alone", decode_unclamped(model, second))


def test_losses_and_gradients_of_rqvae(rqvae):
    model = load_rq(rqvae).train()
    output = model(rqvae.inputs["pixels"])
    distance = {"mse": functional.mse_loss, "l1": functional.l1_loss}[rqvae.manifest["hparams"]["loss_type"]]
    reconstruction = distance(output.sample, rqvae.inputs["pixels"])
    expected = rqvae.scalars["losses"]
    assert output.loss.item() == pytest.approx(0.25 * rqvae.scalars["commitment_loss"], rel=1e-4)
    assert output.loss.item() == pytest.approx(0.25 * expected["loss_latent"], rel=1e-4)
    assert reconstruction.item() == pytest.approx(expected["loss_recon"], rel=1e-4)
    assert (reconstruction + output.loss).item() == pytest.approx(expected["loss_total"], rel=1e-4)
    (reconstruction + output.loss).backward()
    assert model.codebook.weight.grad is None or not model.codebook.weight.grad.any()
    rqvae.assert_gradients_close("", official_gradients(model, export_rqvae))


@pytest.mark.parametrize("run", ["ema", "ema_restart_seed9"])
def test_moving_averages_of_rqvae(rqvae, run):
    """Two forward passes in training mode, without an optimizer."""
    model = load_rq(rqvae).train()
    model.codebook.requires_grad_(False)
    averages = SequentialMovingAverageCodebook(*codebook_parts(model))
    restarts = torch.Generator().manual_seed(9) if run == "ema_restart_seed9" else None
    for step, pixels in ((1, "pixels"), (2, "pixels_2")):
        callback = functools.partial(averages.move, restarts=restarts)
        output = model(rqvae.inputs[pixels], callback_on_scale_end=callback)
        section = f"{run}/step{step}"
        rqvae.assert_close(f"{section}/codes", theirs(output.codes, rqvae))
        assert output.loss.item() == pytest.approx(0.25 * rqvae.scalars[f"{section}/commitment_loss"], rel=1e-4)
        # The averages are those that are saved and exported with the weights.
        exported = export_rqvae(model)
        names = {"codebook": "weight", "cluster_size": "cluster_size_ema", "embed_sum": "embed_ema"}
        for name, official in names.items():
            rqvae.assert_close(f"{section}/{name}", exported[f"quantizer.codebooks.0.{official}"][:40])
    # Evaluation moves nothing.
    before = model.codebook.weight.clone()
    model.eval().encode(rqvae.inputs["pixels"])
    model(rqvae.inputs["pixels"])
    assert torch.equal(model.codebook.weight, before)


@torch.no_grad()
def test_soft_codes_of_rqvae(rqvae):
    model, temperature = load_rq(rqvae), rqvae.manifest["soft_code_temperature"]
    features = model.encode(rqvae.inputs["pixels"]).features
    codes, probabilities = model.soft_codes(features, temperature, stochastic=False)
    rqvae.assert_close("codes", theirs(codes, rqvae))
    rqvae.assert_close("soft_codes", theirs(probabilities, rqvae))
    generator = torch.Generator().manual_seed(8)
    drawn, along_drawn = model.soft_codes(features, temperature, generator=generator)
    rqvae.assert_close("stochastic_seed8/codes", theirs(drawn, rqvae))
    rqvae.assert_close("stochastic_seed8/soft_codes", theirs(along_drawn, rqvae))
    # The reference's own call: the default generator, seeded.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        assert torch.equal(model.soft_codes(features, temperature)[0], drawn)


@torch.no_grad()
def test_soft_codes_that_an_rq_transformer_learns(make_vqvae):
    case = load_lineage_case("rqtransformer", "class")
    vectors = load_lineage_case("rqtransformer", "codebook").weights["weight"][:-1]
    features, expected = case.inputs["class/features"].movedim(-1, 1), case.expected["class/soft/codes_seed11"]
    height, width, depth = expected.shape[1:]
    fields = {"latent_channels": vectors.shape[1], "codebook_size": len(vectors), "refinement_ratio": 0.0}
    model = make_vqvae(patch_nums=[(height, width)] * depth, **fields)
    model.codebook.set_vectors(vectors)
    temperature = case.manifest["soft_code_temperature"]
    codes, targets = model.soft_codes(features, temperature, generator=torch.Generator().manual_seed(11))
    case.assert_close("class/soft/codes_seed11", stack_codes(codes, depth).unflatten(1, (height, width)))
    targets = targets.unflatten(1, (depth, height, width)).movedim(1, 3)
    case.assert_close("class/soft/targets", targets)
