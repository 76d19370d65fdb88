# SPDX-License-Identifier: Apache-2.0
"""The game of tokenizer and discriminator."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.training.adversarial_losses import (
    LeCamPenalty,
    adaptive_weight,
    adversarial_ramp,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
)
from hf_var.training.adversary import Adversary, AdversaryConfig
from hf_var.training.discriminators import make_discriminator
from hf_var.training.losses import reconstruction_loss


def make_vqvae() -> VQVAEModel:
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQVAEModel(VQVAEConfig(**sizes, latent_channels=4, codebook_size=16, patch_nums=(1, 2, 4)))


def make_network(kind: str = "patchgan", size: tuple[int, int] = (8, 8), batch_size: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make_discriminator(kind, 3, size, batch_size, base_channels=8, num_layers=1)


def make_adversary(network: nn.Module, seed: int = 0, **values) -> Adversary:
    return Adversary(AdversaryConfig(**{"adversarial_weight": 0.8, **values}), network, seed)


def make_images(batch_size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


# --------------------------------------------------------------------------------------------------------------------
# Losses


def with_gradients(loss, *logits: list[float]) -> tuple[float, list[list[float]]]:
    tensors = [torch.tensor(values, requires_grad=True) for values in logits]
    value = loss(*tensors)
    return value.item(), [gradient.tolist() for gradient in torch.autograd.grad(value, tensors)]


def test_hinge_losses_by_hand() -> None:
    value, (real, fake) = with_gradients(hinge_discriminator_loss, [2.0, 0.5, -1.0, 1.5], [-3.0, 0.5])
    assert value == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1.5) / 2)
    assert real == pytest.approx([0, -1 / 4, -1 / 4, 0])
    assert fake == pytest.approx([0, 1 / 2])
    value, (fake,) = with_gradients(hinge_generator_loss, [-3.0, 0.5])
    assert value == pytest.approx(1.25)
    assert fake == pytest.approx([-1 / 2, -1 / 2])


def test_non_saturating_losses_by_hand() -> None:
    # softplus(0) = log 2 and sigmoid(log 3) = 3/4
    log_2, log_3, log_4 = 0.6931472, 1.0986123, 1.3862944
    value, (real, fake) = with_gradients(non_saturating_discriminator_loss, [0.0, log_3], [0.0, log_3])
    assert value == pytest.approx((log_2 + log_4 - log_3) / 2 + (log_2 + log_4) / 2)
    assert real == pytest.approx([-1 / 4, -1 / 8])
    assert fake == pytest.approx([1 / 4, 3 / 8])
    value, (fake,) = with_gradients(non_saturating_generator_loss, [0.0, log_3])
    assert value == pytest.approx((log_2 + log_4 - log_3) / 2)
    assert fake == pytest.approx([-1 / 4, -1 / 8])


# --------------------------------------------------------------------------------------------------------------------
# Regularisation and weights


@pytest.mark.parametrize("patches", [1, 4])
def test_r1_of_a_linear_network_is_the_length_of_its_weight(patches) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(patches, 3 * 8 * 8, generator=generator).requires_grad_()
    images = make_images().requires_grad_()
    logits = (images.flatten(1) @ weight.T).view(4, patches, 1)
    penalty = r1_penalty(logits, images)
    expected = weight.mean(dim=0).square().sum()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(torch.autograd.grad(penalty, weight), torch.autograd.grad(expected, weight))


@pytest.mark.parametrize("kind", ["patchgan", "stylegan"])
def test_r1_is_the_slope_of_the_logits(kind) -> None:
    network = make_network(kind).double()
    images = make_images().double().requires_grad_()
    penalty = r1_penalty(network(images), images)
    slopes = torch.zeros(4, 3, 8, 8, dtype=torch.double)
    with torch.no_grad():
        for index in range(3 * 8 * 8):
            step = torch.zeros(3 * 8 * 8, dtype=torch.double)
            step[index] = 1e-5
            # One by one, and all logits: a stylegan's depend on the other images of the group.
            for image in range(4):
                moved = torch.zeros(4, 3, 8, 8, dtype=torch.double)
                moved[image] = step.view(3, 8, 8)
                difference = network(images + moved).flatten(1).mean(1) - network(images - moved).flatten(1).mean(1)
                slopes[image].view(-1)[index] = difference.sum() / 2e-5
    assert penalty.item() == pytest.approx(slopes.square().sum().item() / 4, rel=1e-3)
    assert penalty.item() > 0


def test_lecam_is_the_textbook_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    penalty = LeCamPenalty(decay=0.9)
    real_average = fake_average = None
    for _ in range(5):
        batches = [(torch.randn(4, 1, generator=generator) + 1, torch.randn(4, 1, generator=generator)) for _ in "12"]
        for real, fake in batches:
            expected = 0.0
            if real_average is not None:
                expected += sum((logit - fake_average) ** 2 for logit in real.flatten().tolist()) / 4
                expected += sum((logit - real_average) ** 2 for logit in fake.flatten().tolist()) / 4
            assert penalty(real, fake).item() == pytest.approx(expected)
        penalty.finish_step()
        # Two batches of a step count as one of twice the size.
        real_mean = torch.cat([real for real, _ in batches]).mean().item()
        fake_mean = torch.cat([fake for _, fake in batches]).mean().item()
        real_average = real_mean if real_average is None else 0.9 * real_average + 0.1 * real_mean
        fake_average = fake_mean if fake_average is None else 0.9 * fake_average + 0.1 * fake_mean
        for _ in range(2):  # nothing happens in between
            assert penalty.averages is not None
            assert penalty.averages.tolist() == pytest.approx([real_average, fake_average])
            penalty.finish_step()


def test_lecam_pulls_the_logits_together() -> None:
    penalty = LeCamPenalty()
    logits = torch.tensor([2.0, 2.0], requires_grad=True), torch.tensor([-1.0, -1.0], requires_grad=True)
    penalty(*logits)
    penalty.finish_step()
    real, fake = torch.autograd.grad(penalty(*logits), logits)
    assert real.tolist() == [3.0, 3.0]
    assert fake.tolist() == [-3.0, -3.0]


@pytest.mark.parametrize("kind", ["patchgan", "stylegan"])
def test_adaptive_weight_is_the_formula(kind) -> None:
    images = make_images()
    lengths = []
    for part in range(2):
        vqvae, network = make_vqvae(), make_network(kind)
        sample = vqvae(images).sample
        reconstruction = reconstruction_loss(sample, images, 0.2, 1.0)
        adversarial = hinge_generator_loss(network(sample))
        (reconstruction, adversarial)[part].backward()
        gradient = vqvae.decoder.conv_out.weight.grad
        assert gradient is not None
        lengths.append(gradient.square().sum().sqrt().item())

    vqvae, network = make_vqvae(), make_network(kind)
    sample = vqvae(images).sample
    reconstruction = reconstruction_loss(sample, images, 0.2, 1.0)
    adversarial = hinge_generator_loss(network(sample))
    last_layer = vqvae.decoder.conv_out.weight
    weight = adaptive_weight(reconstruction, adversarial, last_layer, 0.0, 1e4)
    expected = lengths[0] / (lengths[1] + 1e-6)
    assert 0.01 < expected < 100
    assert weight.item() == pytest.approx(expected, rel=1e-4)
    assert not weight.requires_grad
    assert not any(gradient is not None for gradient in [*gradients(vqvae).values(), *gradients(network).values()])
    assert adaptive_weight(reconstruction, adversarial, last_layer, 0.0, expected / 2).item() == pytest.approx(
        expected / 2
    )
    assert adaptive_weight(reconstruction, adversarial, last_layer, 2 * expected, 1e4).item() == pytest.approx(
        2 * expected
    )
    # Losses that do not move the last layer.
    nothing = 0.0 * adversarial
    assert adaptive_weight(reconstruction, nothing, last_layer, 0.0, 1e9, epsilon=1e-3).item() == pytest.approx(
        1e3 * lengths[0], rel=1e-4
    )


@pytest.mark.parametrize(
    ("step", "start", "ramp_steps", "share"),
    [(0, 0, 0, 1), (9, 10, 0, 0), (10, 10, 0, 1), (9, 10, 4, 0), (10, 10, 4, 0), (11, 10, 4, 0.25), (14, 10, 4, 1)]
    + [(1000, 10, 4, 1)],
)
def test_ramp(step, start, ramp_steps, share) -> None:
    assert adversarial_ramp(step, start, ramp_steps) == share


# --------------------------------------------------------------------------------------------------------------------
# All of it


def play(adversary: Adversary, vqvae: VQVAEModel, images: torch.Tensor, step: int = 0, position: int = 0):
    """Losses and figures of both players for one batch, after both backward passes."""
    sample = vqvae(images).sample
    reconstruction = reconstruction_loss(sample, images, 0.0, 1.0)
    loss, figures = adversary.generator_loss(sample, reconstruction, vqvae.decoder.conv_out.weight, step, position)
    (reconstruction + loss).backward()
    discriminator_loss, discriminator_figures = adversary.discriminator_loss(images, sample, position)
    discriminator_loss.backward()
    return loss.item(), discriminator_loss.item(), figures | discriminator_figures


def test_each_loss_moves_its_own_player_alone() -> None:
    vqvae, network, images = make_vqvae(), make_network("stylegan"), make_images()
    adversary = make_adversary(network, r1_weight=1.0, lecam_weight=0.1, diffaugment=["color"])
    sample = vqvae(images).sample
    last_layer = vqvae.decoder.conv_out.weight
    loss, figures = adversary.generator_loss(sample, sample.square().mean(), last_layer, step=0, position=0)
    loss.backward(retain_graph=True)
    assert all(gradient is None for gradient in gradients(network).values())
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
        gradient = gradients(vqvae)[name]
        assert gradient is not None, name
        assert bool(gradient.any()), name
    assert all(parameter.requires_grad for parameter in network.parameters())

    vqvae.zero_grad()
    loss, more_figures = adversary.discriminator_loss(images, sample, position=0)
    loss.backward()
    assert all(gradient is None for gradient in gradients(vqvae).values())
    for name, gradient in gradients(network).items():
        assert gradient is not None, name
        # Between its corners the hinge pulls the bias of all logits neither up nor down.
        assert bool(gradient.any()) or name == "linear_out.bias", name
    assert not images.requires_grad
    assert not any(figure.requires_grad for figure in (figures | more_figures).values())


@pytest.mark.parametrize("kind", ["patchgan", "stylegan"])
@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_the_parts_add_up(kind, loss) -> None:
    images, fake = make_images(), make_images(seed=5)
    network = make_network(kind)
    adversary = make_adversary(
        network,
        adversarial_loss=loss,
        adversarial_weight=0.5,
        adaptive_weight=False,
        discriminator_ramp_steps=4,
        r1_weight=3.0,
        lecam_weight=2.0,
    )
    adversary.load_state_dict({"lecam_averages": torch.tensor([0.7, -0.4]), "optimization": None})
    compute_discriminator, compute_generator = {
        "hinge": (hinge_discriminator_loss, hinge_generator_loss),
        "non_saturating": (non_saturating_discriminator_loss, non_saturating_generator_loss),
    }[loss]

    fake.requires_grad_()
    value, figures = adversary.generator_loss(fake, fake.mean(), fake, step=1, position=0)
    assert value.item() == pytest.approx(0.5 / 4 * compute_generator(network(fake)).item())
    assert figures["adversarial_weight"].item() == pytest.approx(0.5 / 4)

    value, figures = adversary.discriminator_loss(images, fake, position=0)
    # Images and reconstructions judged in two passes.
    images.requires_grad_()
    real_logits, fake_logits = network(images), network(fake)
    parts = {
        "discriminator_loss": compute_discriminator(real_logits, fake_logits),
        "r1_penalty": r1_penalty(real_logits, images),
        "lecam_penalty": (real_logits + 0.4).square().mean() + (fake_logits - 0.7).square().mean(),
        "real_logits": real_logits.mean(),
        "fake_logits": fake_logits.mean(),
    }
    for name, part in parts.items():
        torch.testing.assert_close(figures[name], part.detach(), rtol=1e-4, atol=1e-6)
    expected = parts["discriminator_loss"] + 1.5 * parts["r1_penalty"] + 2 * parts["lecam_penalty"]
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_adaptive_weight_multiplies() -> None:
    vqvae, images = make_vqvae(), make_images()
    adversary = make_adversary(
        make_network(), adversarial_weight=0.5, adaptive_weight_min=7.0, adaptive_weight_max=7.0
    )
    loss, _, figures = play(adversary, vqvae, images)
    assert figures["adversarial_weight"].item() == pytest.approx(3.5)
    assert loss == pytest.approx(3.5 * figures["generator_loss"].item())


def test_it_starts_late_and_gently() -> None:
    vqvae, images = make_vqvae(), make_images()
    adversary = make_adversary(make_network(), discriminator_start=3, discriminator_ramp_steps=2)
    assert [adversary.is_active(step) for step in range(5)] == [False, False, False, True, True]
    losses = {step: play(adversary, vqvae, images, step=step) for step in (3, 4, 5, 6)}
    assert losses[3][0] == 0
    assert losses[4][0] != 0
    assert losses[4][0] == pytest.approx(losses[5][0] / 2)
    assert losses[6][0] == losses[5][0]
    # The discriminator learns in full from the start on.
    assert len({discriminator_loss for _, discriminator_loss, _ in losses.values()}) == 1
    assert losses[3][1] > 0


def test_augmentation_follows_from_seed_and_position() -> None:
    def figures(seed: int, position: int) -> list[float]:
        policies = ["color", "translation", "cutout"]
        adversary = make_adversary(make_network(), diffaugment=policies, seed=seed)
        found = play(adversary, make_vqvae(), make_images(), position=position)[2]
        return [found[name].item() for name in ("generator_loss", "real_logits", "fake_logits")]

    state = torch.get_rng_state()
    first = figures(0, 0)
    assert figures(0, 0) == first
    assert torch.equal(torch.get_rng_state(), state)
    for other in (figures(0, 1), figures(1, 0), figures(2**40, 0)):
        assert all(abs(ours - theirs) > 1e-6 for ours, theirs in zip(first, other, strict=True))
    # The generator's loss is minus the mean logit, and both passes show the same reconstructions in other ways.
    assert abs(first[0] + first[2]) > 1e-6


def test_lecam_survives_a_checkpoint() -> None:
    def fresh() -> Adversary:
        return make_adversary(make_network(), lecam_weight=1.0)

    def run(adversary: Adversary, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(play(adversary, make_vqvae(), make_images(seed=step), step=step, position=step)[1])
            adversary.finish_step()
        return losses

    whole = run(fresh(), range(4))
    first, second = fresh(), fresh()
    assert first.state_dict() == {"lecam_averages": None, "optimization": None}
    begin = run(first, range(2))
    second.load_state_dict(first.state_dict())
    assert begin + run(second, range(2, 4)) == whole
    assert whole[3] != run(fresh(), range(2, 4))[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["patchgan", "stylegan"])
def test_half_precision_gives_nearly_the_same(kind, dtype) -> None:
    def figures(enabled: bool):
        vqvae, network = make_vqvae(), make_network(kind)
        adversary = make_adversary(network, r1_weight=1.0, lecam_weight=1.0)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss, _, found = play(adversary, vqvae, make_images())
        assert all(figure.dtype == torch.float32 for figure in found.values())
        return torch.stack([found[name] for name in sorted(found)])

    exact, half = figures(False), figures(True)
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.03)


def test_a_tokenizer_and_its_adversary_learn_together() -> None:
    vqvae, network, images = make_vqvae(), make_network(), make_images(8)
    adversary = make_adversary(network, discriminator_start=10, discriminator_ramp_steps=10, adversarial_weight=0.1)
    optimizers = [torch.optim.Adam(module.parameters(), lr=2e-3, betas=(0.5, 0.9)) for module in (vqvae, network)]
    errors = []
    for step in range(40):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = vqvae(images)
        reconstruction = reconstruction_loss(output.sample, images, 0.0, 1.0)
        loss = reconstruction + output.loss
        if adversary.is_active(step):
            adversarial_loss, _ = adversary.generator_loss(
                output.sample, reconstruction, vqvae.decoder.conv_out.weight, step, position=step
            )
            loss = loss + adversarial_loss
        loss.backward()
        optimizers[0].step()
        if adversary.is_active(step):
            discriminator_loss, figures = adversary.discriminator_loss(images, output.sample, position=step)
            discriminator_loss.backward()
            optimizers[1].step()
        errors.append(reconstruction.item())
    assert figures["real_logits"] > figures["fake_logits"] + 0.5
    # The start of the discriminator does not throw the reconstruction back.
    assert max(errors[10:]) <= errors[9] * 1.05
    assert errors[-1] < errors[0]


def test_two_processes_equal_accumulation(tmp_path: Path) -> None:
    script = Path(__file__).with_name("adversary_processes.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=200)
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))  # noqa: TID251
    assert one.keys() == two.keys()
    assert {"conv_in.weight", "lecam_averages", "last_layer"} <= one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"adversarial_loss": "wasserstein"},
            "`adversarial_loss` must be one of hinge, non_saturating, got 'wasserstein'",
        ),
        ({"discriminator": "resnet"}, "`discriminator` must be one of patchgan, stylegan, got 'resnet'"),
        ({"discriminator_layers": 0}, "`discriminator_layers` must be at least 1, got 0"),
        ({"adversarial_weight": -1.0}, "`adversarial_weight` must be at least 0, got -1.0"),
        ({"r1_weight": -1.0}, "`r1_weight` must be at least 0"),
        (
            {"adaptive_weight_min": 2.0, "adaptive_weight_max": 1.0},
            "`adaptive_weight_max` must be at least.*2.0, got 1.0",
        ),
        ({"diffaugment": ["blur"]}, r"`diffaugment\[0\]` must be one of color, translation, cutout, got 'blur'"),
    ],
)
def test_bad_values_are_named(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdversaryConfig(**values)
