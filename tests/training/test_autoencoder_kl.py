# SPDX-License-Identifier: Apache-2.0
"""The training of `AutoencoderKL` against the numbers of the reference; `fixtures/README.md` says what they are."""

import json
import lzma
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from hf_var.training.adversarial_losses import adaptive_weight
from hf_var.training.adversary import Adversary, AdversaryConfig
from hf_var.training.autoencoder_kl import AutoencoderKLWithPosterior, KLConfig, KLObjective, autoencoder_kl_config


FOLDER = Path(__file__).parents[1] / "fixtures/parity/lineage/klvae"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
SCALARS, LOSS_ARGS = MANIFEST["expected_scalars"], MANIFEST["loss_args"]
INPUTS = safetensors.torch.load_file(FOLDER / "inputs.safetensors")
EXPECTED = safetensors.torch.load_file(FOLDER / "expected.safetensors")
WEIGHTS = safetensors.torch.load(lzma.decompress((FOLDER / "weights.safetensors.xz").read_bytes()))
WEIGHTS = {name: tensor.float() for name, tensor in WEIGHTS.items()}
IMAGE = INPUTS["image"].float()
NUM_VALUES = IMAGE[0].numel()  # D
# The reference's constant log-variance of the output is a weight of the reconstruction and a constant.
LOGVAR = LOSS_ARGS["logvar_init"]
REFERENCE = KLConfig(l1_weight=math.exp(-LOGVAR), l2_weight=0.0, kl_weight=LOSS_ARGS["kl_weight"])
LAST_LAYER = "decoder.conv_out.weight"


def make_model() -> AutoencoderKLWithPosterior:
    autoencoder = AutoencoderKL(**MANIFEST["model_args"])
    autoencoder.load_state_dict({name: WEIGHTS[name] for name in autoencoder.state_dict()})
    return AutoencoderKLWithPosterior(autoencoder)


def make_generator() -> torch.Generator:
    return torch.Generator().manual_seed(MANIFEST["draw_seed"])


def make_discriminator() -> nn.Module:
    """The reference's PatchGAN, whose batch normalisation is in evaluation mode."""
    weights = {
        name.removeprefix("discriminator.main."): tensor for name, tensor in WEIGHTS.items() if "discriminator" in name
    }
    first, second, last = (weights[f"{place}.weight"] for place in (0, 2, 5))
    network = nn.Sequential(
        nn.Conv2d(first.shape[1], first.shape[0], 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(second.shape[1], second.shape[0], 4, stride=1, padding=1, bias=False),
        nn.BatchNorm2d(second.shape[0]),
        nn.LeakyReLU(0.2),
        nn.Conv2d(last.shape[1], 1, 4, padding=1),
    )
    network.load_state_dict(weights, strict=False)
    return network.eval()


def assert_tensor(name: str, actual: torch.Tensor) -> None:
    tolerance = 3 * MANIFEST["sensitivity_1e-6"][name] + 2e-6
    torch.testing.assert_close(
        actual.detach(), EXPECTED[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def assert_scalar(name: str, actual: float | torch.Tensor) -> None:
    tolerance = 3 * MANIFEST["scalar_sensitivity_1e-6"][name] + 2e-6
    actual = float(torch.as_tensor(actual).detach())
    assert actual == pytest.approx(SCALARS[name], rel=1e-6, abs=tolerance), name


def assert_gradients(section: str, autoencoder: AutoencoderKL) -> None:
    gradients = {name: parameter.grad for name, parameter in autoencoder.named_parameters()}
    norms = SCALARS[f"losses/{section}/grad_norms"]
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), name
    for name in EXPECTED:
        if name.startswith(f"{section}/grad/"):
            assert_tensor(name, gradients[name.removeprefix(f"{section}/grad/")])


def parts_of(config: KLConfig, model: AutoencoderKLWithPosterior, image: torch.Tensor, generator: torch.Generator):
    sample, posterior = model(image, generator)
    return sample, *KLObjective(config)(sample, posterior, image)


def test_forward_equals_the_reference() -> None:
    model = make_model()
    sample, posterior = model(IMAGE, make_generator())
    for name, actual in (("mean", posterior.mean), ("logvar", posterior.logvar), ("std", posterior.std)):
        assert_tensor(name, actual)
    assert_tensor("kl", posterior.kl())
    assert_tensor("latents", posterior.sample(make_generator()))
    assert_tensor("reconstruction_of_sample", sample)
    assert_tensor("reconstruction_of_mode", model.autoencoder.decode(posterior.mode()).sample)


def test_terms_and_every_spelling_of_the_weight_equal_the_reference() -> None:
    model, squared = make_model(), "losses/elbo: mse_sum_per_image + kl"

    def terms(**weights: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, reconstruction, kl_loss, metrics = parts_of(KLConfig(**weights), model, IMAGE, make_generator())
        return reconstruction, kl_loss, metrics["kl"]

    absolute, _, kl = terms(l1_weight=1.0, l2_weight=0.0)
    assert_scalar("terms/l1_mean", absolute)
    assert_scalar("terms/l1_sum_per_image", NUM_VALUES * absolute)
    assert_scalar("terms/kl_sum_over_latents_mean_over_batch", kl)
    assert_scalar("terms/kl_mean_over_latents", kl / EXPECTED["mean"][0].numel())
    # Mean squared error + w KL: a weight of w D.
    name = "losses/seed_document: mse_mean + kl_weight * kl"
    reconstruction, kl_loss, _ = terms(kl_weight=LOSS_ARGS["kl_weight"] * NUM_VALUES)
    assert_scalar("terms/mse_mean", reconstruction)
    assert_scalar(name, reconstruction + kl_loss)
    # A variance of 1/2: a weight of 1.
    reconstruction, kl_loss, _ = terms(kl_weight=1.0)
    assert_scalar("terms/mse_sum_per_image", NUM_VALUES * reconstruction)
    assert_scalar(squared, NUM_VALUES * (reconstruction + kl_loss))


def test_latent_diffusion_loss_and_gradients_equal_the_reference() -> None:
    model = make_model()
    _, reconstruction, kl_loss, metrics = parts_of(REFERENCE, model, IMAGE, make_generator())
    assert_scalar("losses/latent_diffusion/kl_loss", metrics["kl"])
    assert_scalar("losses/latent_diffusion/nll_loss", NUM_VALUES * (reconstruction + LOGVAR))
    # Latent diffusion adds kl_weight KL to a loss of all values.
    assert_scalar("losses/latent_diffusion/total", NUM_VALUES * (reconstruction + kl_loss + LOGVAR))
    (NUM_VALUES * (reconstruction + kl_loss)).backward()
    assert_gradients("latent_diffusion", model.autoencoder)


def test_adversarial_loss_and_gradients_equal_the_reference() -> None:
    section = "losses/latent_diffusion_gan"
    model = make_model()
    adversary = Adversary(AdversaryConfig(adversarial_weight=LOSS_ARGS["disc_weight"]), make_discriminator())
    sample, reconstruction, kl_loss, _ = parts_of(REFERENCE, model, IMAGE, make_generator())
    last_layer = model.autoencoder.get_parameter(LAST_LAYER)
    generator_loss = adversary.compute_generator_loss(adversary.discriminator(sample))
    assert_scalar(f"{section}/g_loss", generator_loss)
    # What is added to the norm of the adversarial gradient is 1e-6 in taming's code for VQGAN, 1e-4 here.
    weight = LOSS_ARGS["disc_weight"] * adaptive_weight(
        reconstruction, generator_loss, last_layer, minimum=0, maximum=1e4, epsilon=1e-4
    )
    assert_scalar(f"{section}/d_weight", NUM_VALUES * weight)
    total = reconstruction + kl_loss + weight * generator_loss
    assert_scalar(f"{section}/total", NUM_VALUES * (total + LOGVAR))
    (NUM_VALUES * total).backward(retain_graph=True)
    assert_gradients("latent_diffusion_gan", model.autoencoder)

    judgement, metrics = adversary.generator_loss(sample, reconstruction, last_layer, step=0, position=0)
    assert metrics["generator_loss"].item() == pytest.approx(generator_loss.item(), abs=1e-6)
    assert judgement.item() == pytest.approx((weight * generator_loss).item(), rel=3e-4)
    loss, metrics = adversary.discriminator_loss(IMAGE, sample, position=0)
    assert_scalar(f"{section}/disc_loss", loss / 2)
    assert_scalar(f"{section}/logits_real", metrics["real_logits"])
    assert_scalar(f"{section}/logits_fake", metrics["fake_logits"])


def test_two_steps_of_adam_equal_the_reference() -> None:
    model, generator = make_model(), make_generator()
    settings = MANIFEST["optimizer"]
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], betas=settings["betas"])
    for step, image in ((1, IMAGE), (2, INPUTS["train_image_2"].float())):
        _, reconstruction, kl_loss, metrics = parts_of(REFERENCE, model, image, generator)
        assert_scalar(f"steps/{step}/total", NUM_VALUES * (reconstruction + kl_loss + LOGVAR))
        assert_scalar(f"steps/{step}/kl_loss", metrics["kl"])
        assert_scalar(f"steps/{step}/nll_loss", NUM_VALUES * (reconstruction + LOGVAR))
        optimizer.zero_grad()
        # In the reference's scale, of which Adam's epsilon is independent.
        (NUM_VALUES * (reconstruction + kl_loss)).backward()
        optimizer.step()


def test_kl_is_computed_in_full_precision() -> None:
    model = make_model()
    _, posterior = model(IMAGE, make_generator())
    with torch.autocast("cpu", torch.bfloat16):
        _, half = model(IMAGE, make_generator())
    assert half.mean.dtype == torch.float32
    torch.testing.assert_close(half.kl(), posterior.kl(), rtol=0.03, atol=0)


def test_loss_reaches_the_prior_at_zero() -> None:
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 2, 2))
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reconstruction, kl_loss, _ = KLObjective(KLConfig(kl_weight=1.0))(image, posterior, image)
    assert reconstruction == kl_loss == 0


def test_configuration_follows_from_the_number_of_levels() -> None:
    config = autoencoder_kl_config({"block_out_channels": [32, 64, 64], "in_channels": 1})
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 3
    assert config["up_block_types"] == ["UpDecoderBlock2D"] * 3
    assert config["out_channels"] == 1
    assert autoencoder_kl_config({})["block_out_channels"] == [128, 256, 512, 512]
    levels = ["AttnDownEncoderBlock2D"] * 2
    assert autoencoder_kl_config({"down_block_types": levels})["block_out_channels"] == [128, 256]
    config = autoencoder_kl_config({"block_out_channels": [32, 64]})
    assert AutoencoderKL(**config).encoder.conv_in.out_channels == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latent_channels": 0}, "latent_channels.*at least 1, got 0"),
        ({"out_channels": 1}, "out_channels.*in_channels.*3, got 1"),
        ({"norm_num_groups": 24}, "block_out_channels.*multiples.*24"),
        ({"sample_size": 20}, "sample_size.*multiple of 8.*got 20"),
        ({"down_block_types": ["DownEncoderBlock2D"], "block_out_channels": [32, 32]}, "down_block_types.*each of 2"),
        ({"sample_size": 8, "block_out_channels": [32] * 4}, "norm_num_groups.*below 32.*1x1.*got 32"),
    ],
)
def test_sizes_that_do_not_fit_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder_kl_config(given)


def test_pretrained_model_fixes_the_configuration(tmp_path: Path) -> None:
    make_model().autoencoder.save_pretrained(tmp_path)
    assert autoencoder_kl_config({}, str(tmp_path)) == autoencoder_kl_config(
        {"norm_num_groups": MANIFEST["model_args"]["norm_num_groups"]}, str(tmp_path)
    )
    side = 2 * IMAGE.shape[-1]
    assert autoencoder_kl_config({"sample_size": side}, str(tmp_path))["sample_size"] == side
    with pytest.raises(ValueError, match=r"latent_channels.*pretrained_autoencoder.*got 9"):
        autoencoder_kl_config({"latent_channels": 9}, str(tmp_path))
