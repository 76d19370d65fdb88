# SPDX-License-Identifier: Apache-2.0
"""The quantizer against textbook algorithms, written here in their own words, and its gradients against formulas."""

import pytest
import torch
from torch.nn import functional


def nearest_codes(vectors, codebook, cosine=False):
    """Brute force over `(batch, positions, channels)`."""
    if cosine:
        similarity = functional.cosine_similarity(vectors.unsqueeze(2), codebook[None, None], dim=-1)
        return similarity.argmax(dim=-1)
    return (vectors.unsqueeze(2) - codebook).square().sum(dim=-1).argmin(dim=-1)


def tokens(maps):
    return maps.flatten(2).transpose(1, 2)


def maps(vectors, size):
    return vectors.transpose(1, 2).reshape(vectors.shape[0], -1, *size)


def reference_update(model, code_vectors, scale):
    """What a token map adds, with the weights of `model` but none of its code."""
    config = model.config
    update = maps(code_vectors, config.scale_sizes[scale])
    if config.scale_sizes[scale] != config.latent_size:
        update = functional.interpolate(update, size=config.latent_size, mode="bicubic")
    if config.refinement_ratio > 0:
        convs = list(model.quantizer.refinement_convs)
        # One for all, one per scale, or an even split.
        conv = convs[scale * len(convs) // len(config.patch_nums)]
        refined = functional.conv2d(update, conv.weight, conv.bias, padding=1)
        update = (1 - config.refinement_ratio) * update + config.refinement_ratio * refined
    return update


def reference_quantize(model, features):
    """Codes of every scale and the latents after it."""
    codebook = model.quantizer.codebook.weight
    residual, latents, codes, running = features, torch.zeros_like(features), [], []
    for scale, size in enumerate(model.config.scale_sizes):
        found = nearest_codes(
            tokens(functional.interpolate(residual, size=size, mode="area")), codebook, model.config.normalize_codebook
        )
        update = reference_update(model, codebook[found], scale)
        residual, latents = residual - update, latents + update
        codes.append(found)
        running.append(latents)
    return codes, running


@torch.no_grad()
def test_one_scale_is_a_plain_vector_quantizer(make_vqvae, make_images):
    model = make_vqvae(patch_nums=(4,), refinement_ratio=0.0)
    output = model.encode(make_images(model))
    codes = nearest_codes(tokens(output.features), model.quantizer.codebook.weight)
    assert len(codes.unique()) > 10
    assert torch.equal(output.codes, codes)
    assert torch.equal(output.latents, maps(model.quantizer.codebook.weight[codes], (4, 4)))


@torch.no_grad()
@pytest.mark.parametrize("depth", [2, 4])
def test_equal_scales_are_a_textbook_residual_quantizer(make_vqvae, make_images, depth):
    model = make_vqvae(patch_nums=(4,) * depth, refinement_ratio=0.0)
    output = model.encode(make_images(model))
    codebook = model.quantizer.codebook.weight
    residual, expected = tokens(output.features), []
    for _ in range(depth):
        expected.append(nearest_codes(residual, codebook))
        residual = residual - codebook[expected[-1]]
    assert torch.equal(output.codes, torch.cat(expected, dim=1))
    torch.testing.assert_close(tokens(output.latents), sum(codebook[found] for found in expected), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"patch_nums": (1, 2, 3, 4)},
        {"patch_nums": (1, 2, 3, 4), "num_refinement_convs": 0},
        {"patch_nums": (1, 2, 4), "num_refinement_convs": 1, "refinement_ratio": 0.25},
        {"patch_nums": (1, 2, 3, 4), "num_refinement_convs": 2, "refinement_ratio": 1.0},
        {"patch_nums": (1, 2, 4), "refinement_ratio": 0.0},
        {"patch_nums": (1, 2, 4), "num_refinement_convs": 0, "normalize_codebook": True},
        {"patch_nums": ((1, 1), (1, 2), (2, 3), (4, 6)), "num_refinement_convs": 0},
        {"patch_nums": ((2, 1), 2, (3, 2)), "num_refinement_convs": 1},
        {"patch_nums": (5,), "num_refinement_convs": 0},
    ],
    ids=str,
)
def test_every_kind_of_schedule_and_sharing(make_vqvae, make_images, fields):
    model = make_vqvae(**fields)
    output = model.encode(make_images(model))
    codes, running = reference_quantize(model, output.features)
    assert torch.equal(output.codes, torch.cat(codes, dim=1))
    torch.testing.assert_close(output.latents, running[-1], rtol=0, atol=1e-5)

    stepped = None
    for scale, (found, latents) in enumerate(zip(codes, running, strict=True)):
        stepped, inputs = model.next_scale(stepped, found, scale)
        torch.testing.assert_close(stepped, latents, rtol=0, atol=1e-5)
        if scale + 1 < len(codes):
            size = model.config.scale_sizes[scale + 1]
            pooled = tokens(functional.interpolate(latents, size=size, mode="area"))
            torch.testing.assert_close(inputs, pooled, rtol=0, atol=1e-5)
    assert inputs is None


@torch.no_grad()
def test_cosine_search_ignores_lengths(make_vqvae):
    model = make_vqvae(normalize_codebook=True)
    weight = model.quantizer.codebook.weight
    vectors = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    expected = nearest_codes(vectors, weight, cosine=True)
    assert torch.equal(model.quantizer.codebook(vectors), expected)
    assert torch.equal(model.quantizer.codebook(100 * vectors), expected)
    # The vectors that are looked up keep their lengths.
    assert torch.equal(model.code_vectors(expected), weight[expected])
    assert not torch.equal(nearest_codes(vectors, weight), expected)


@torch.no_grad()
def test_search_keeps_small_differences_far_from_the_origin(make_vqvae):
    model = make_vqvae(patch_nums=(4,), codebook_size=8)
    offsets = torch.arange(8.0)[:, None].expand(8, 4)
    model.quantizer.codebook.weight.copy_(1000 + offsets)
    vectors = 1000 + offsets + 0.3
    assert torch.equal(model.quantizer.codebook(vectors), torch.arange(8))


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one(vqvae, images):
    together = vqvae.encode(images)
    for index in range(len(images)):
        alone = vqvae.encode(images[index : index + 1])
        assert torch.equal(alone.codes, together.codes[index : index + 1])
        torch.testing.assert_close(alone.features, together.features[index : index + 1], rtol=0, atol=1e-5)
        sample = vqvae.decode(alone.codes).sample
        torch.testing.assert_close(sample, vqvae.decode(together.codes).sample[index : index + 1], rtol=0, atol=1e-5)


def test_straight_through_gradient(make_vqvae, make_images):
    model = make_vqvae().train()
    output = model(make_images(model))
    torch.testing.assert_close(output.latents, model.encode(make_images(model)).latents, rtol=0, atol=1e-5)
    output.features.retain_grad()
    output.latents.retain_grad()
    output.sample.square().sum().backward()
    assert output.latents.grad.abs().max() > 0.1
    assert torch.equal(output.features.grad, output.latents.grad)
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    # The reconstruction says nothing to codebook and phi.
    assert all(parameter.grad is None for parameter in model.quantizer.parameters())


@pytest.mark.parametrize(("commitment", "codebook"), [(0.25, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_gradients_of_the_loss(make_vqvae, make_images, commitment, codebook):
    weights = {"commitment_loss_weight": commitment, "codebook_loss_weight": codebook}
    model = make_vqvae(num_refinement_convs=1, **weights).train()
    output = model(make_images(model))
    output.features.retain_grad()
    output.loss.backward()

    # The same terms, with the latents after each scale as a function of the codebook alone: nothing flows through the
    # residual that the search looks at.
    features, weight = output.features.detach(), model.quantizer.codebook.weight
    running, latents, begin = [], 0, 0
    for scale, length in enumerate(model.config.scale_lengths):
        update = reference_update(model, weight[output.codes[:, begin : begin + length]], scale)
        latents, begin = latents + update, begin + length
        running.append(latents)
    mean_error = sum((latents - features).square().mean() for latents in running) / len(running)
    torch.testing.assert_close(output.loss, (commitment + codebook) * mean_error, rtol=1e-5, atol=0)

    pull = sum(features - latents.detach() for latents in running) * 2 / features.numel() / len(running)
    torch.testing.assert_close(output.features.grad, commitment * pull, rtol=0, atol=1e-7)
    parameters = [weight, model.quantizer.refinement_convs[0].weight]
    for parameter, gradient in zip(parameters, torch.autograd.grad(mean_error, parameters), strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, codebook * gradient, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_every_parameter_learns(make_vqvae, make_images):
    model = make_vqvae(patch_nums=(1, 2, 3, 4)).train()
    output = model(make_images(model, batch_size=8))
    (output.loss + output.sample.square().mean()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
