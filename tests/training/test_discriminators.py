# SPDX-License-Identifier: Apache-2.0
"""The networks that judge images."""

import pytest
import torch
from torch import nn

from hf_var.training.discriminators import (
    BlurDownsample,
    MinibatchStandardDeviation,
    PatchDiscriminator,
    StyleGANDiscriminator,
    make_discriminator,
)


KINDS = ("patchgan", "stylegan")


def make_images(batch_size: int, size: tuple[int, int] = (24, 32), channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth random images, which differ from each other as photographs do, not only as noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch_size, channels, 3, 3, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True)


def make_network(kind: str, size: tuple[int, int] = (24, 32), batch_size: int = 4, **arguments) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_discriminator(kind, arguments.pop("in_channels", 3), size, batch_size, 8, **arguments)


@pytest.mark.parametrize(
    ("size", "num_layers", "map_size"), [((32, 32), 3, (2, 2)), ((40, 24), 3, (3, 1)), ((16, 16), 2, (2, 2))]
)
def test_patchgan_has_a_logit_per_patch(size, num_layers, map_size) -> None:
    logits = make_network("patchgan", size, num_layers=num_layers)(make_images(2, size))
    assert logits.shape == (2, 1, *map_size)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 32), (32, 48), (24, 20), (64, 17)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_stylegan_takes_all_sizes(size, channels) -> None:
    network = make_network("stylegan", size, in_channels=channels)
    logits = network(make_images(4, size, channels))
    assert logits.shape == (4, 1)
    # Down to 4 to 7 pixels on the shorter side.
    assert isinstance(network, StyleGANDiscriminator)
    assert min(size) // 8 < 2 ** len(network.blocks) <= min(size) // 4


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_receptive_field_of_patchgan(num_layers) -> None:
    # The layers' kernels and strides alone: norms look at the whole image.
    network = make_network("patchgan", (128, 128), num_layers=num_layers)
    assert isinstance(network, PatchDiscriminator)
    for index in range(len(network.norms)):
        network.norms[index] = nn.Identity()
    images = make_images(1, (128, 128)).requires_grad_()
    logits = network(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    rows = gradient[0].abs().sum(dim=(0, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == {1: 16, 2: 34, 3: 70}[num_layers]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_respond_to_images_from_the_start(kind) -> None:
    network = make_network(kind)
    images = make_images(8)
    with torch.no_grad():
        logits = network(images).flatten(1).mean(dim=1)
        shifted = network(images + 0.3).flatten(1).mean(dim=1)
    assert logits.std() > 0.02
    assert (logits - shifted).abs().mean() > 0.02
    assert logits.abs().max() < 10


def test_each_image_is_judged_by_patchgan_on_its_own() -> None:
    network = make_network("patchgan")
    images = make_images(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        logits = network(images)
        torch.testing.assert_close(network(images[order]), logits[order])
        torch.testing.assert_close(network(images[2:3]), logits[2:3])
    assert logits.flatten(1).mean(dim=1).unique().numel() == 5


def test_stylegan_compares_images_within_groups_alone() -> None:
    network = make_network("stylegan", batch_size=4)
    real, fake = make_images(4, seed=0), make_images(4, seed=1)
    with torch.no_grad():
        together = network(torch.cat([real, fake]))
        apart = torch.cat([network(real), network(fake)])
        mixed = network(torch.cat([real[:2], fake[:2]]))
    torch.testing.assert_close(together, apart)
    assert (mixed[:2] - apart[:2]).abs().min() > 1e-4


def test_minibatch_deviation_by_hand() -> None:
    hidden_states = torch.tensor([1.0, 5.0, -2.0, -2.0]).view(4, 1, 1, 1).expand(4, 2, 3, 1)
    output = MinibatchStandardDeviation(2)(hidden_states)
    assert torch.equal(output[:, :2], hidden_states)
    expected = torch.tensor([2.0, 2.0, 1e-4, 1e-4]).view(4, 1, 1).expand(4, 3, 1)
    torch.testing.assert_close(output[:, 2], expected)
    with pytest.raises(ValueError, match="multiple of `group_size` = 3, got 4"):
        MinibatchStandardDeviation(3)(hidden_states)


@pytest.mark.parametrize(("batch_size", "group_size"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 3), (7, 1), (16, 4)])
def test_groups_divide_the_batch(batch_size, group_size) -> None:
    network = make_network("stylegan", (8, 8), batch_size)
    assert isinstance(network, StyleGANDiscriminator)
    assert network.minibatch_deviation.group_size == group_size
    assert network(make_images(batch_size, (8, 8))).isfinite().all()


def test_downsampling_keeps_flat_regions_and_removes_stripes() -> None:
    images = torch.ones(1, 2, 8, 8)
    images[:, 1, :, 1::2] = -1
    smaller = BlurDownsample(2)(images)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(smaller[:, 0], torch.ones(1, 2, 2))
    torch.testing.assert_close(smaller[:, 1], torch.zeros(1, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind) -> None:
    network = make_network(kind)
    network(make_images(4)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close(kind) -> None:
    network = make_network(kind)
    images = make_images(8)
    with torch.no_grad():
        logits = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(images)
    assert (half.float() - logits).abs().max() < 0.1 * logits.std() + 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_two_kinds_of_images_are_learned_apart(kind) -> None:
    network = make_network(kind, (16, 16), num_layers=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.9))
    # The same contents with a fine grid on half of them: no mean colour gives it away.
    grid = 0.2 * (-1.0) ** torch.arange(16)
    for step in range(80):
        real, fake = make_images(8, (16, 16), seed=step), make_images(8, (16, 16), seed=500 + step) + grid
        real_logits, fake_logits = network(torch.cat([real, fake])).chunk(2)
        loss = (1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = make_images(16, (16, 16), seed=1000), make_images(16, (16, 16), seed=1001) + grid
        real_logits, fake_logits = (network(images).flatten(1).mean(dim=1) for images in (real, fake))
    assert real_logits.min() > fake_logits.max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_discriminator("patchgan", 3, (32, 16), 4), "at least 24 .*`num_layers` = 3, got 32x16"),
        (lambda: make_discriminator("stylegan", 3, (7, 32), 4), "`image_size` must be at least 8 .*got 7x32"),
    ],
)
def test_bad_arguments(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
