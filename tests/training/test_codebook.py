# SPDX-License-Identifier: Apache-2.0
"""The codebook's start, its dead codes and its moving averages."""

import pytest
import torch

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.training.codebook import (
    MovingAverageCodebook,
    initialize_codebook,
    restart_dead_codes,
)
from hf_var.training.codebook_training import VQVAEWarmup


def make_vqvae(**config) -> VQVAEModel:
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    defaults = {"in_channels": 1, "latent_channels": 4, "codebook_size": 16, "patch_nums": (1, 2, 4)}
    return VQVAEModel(VQVAEConfig(**sizes | defaults | config)).eval()


def make_images(number: int) -> torch.Tensor:
    return torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_quantizer_inputs_are_what_the_search_sees() -> None:
    vqvae = make_vqvae()
    vqvae.codebook.vectors.normal_(generator=torch.Generator().manual_seed(0))
    output = vqvae.encode(make_images(5))
    inputs = vqvae.quantizer_inputs(output.features)
    assert torch.equal(inputs, vqvae(make_images(5)).quantizer_inputs)
    assert torch.equal(vqvae.codebook(inputs), output.codes)
    assert len(output.codes.unique()) > 4
    # The same from what is left of the features.
    left = [output.features, *(output.features - latents for latents in vqvae.running_latents(output.codes))]
    for scale, part in enumerate(inputs.split(vqvae.config.scale_lengths, dim=1)):
        expected = torch.nn.functional.interpolate(left[scale], size=vqvae.config.scale_sizes[scale], mode="area")
        torch.testing.assert_close(part, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_quantizer_inputs_without_codes_leave_nothing_to_later_scales() -> None:
    # Two equal scales without refinement: the first one, coded without error, explains everything.
    vqvae = make_vqvae(patch_nums=(4, 4), refinement_ratio=0.0)
    inputs = vqvae.quantizer_inputs(vqvae.encode(make_images(2)).features, exact=True)
    first, second = inputs.split(vqvae.config.scale_lengths, dim=1)
    assert first.std() > 0
    assert torch.equal(second, torch.zeros_like(second))


def quantization_error(vqvae: VQVAEModel, images: torch.Tensor) -> float:
    with torch.no_grad():
        output = vqvae.encode(images)
    return (output.features - output.latents).square().mean().item()


@pytest.mark.parametrize("normalize_codebook", [False, True])
@pytest.mark.parametrize("patch_nums", [(4,), (1, 2, 4), (4, 4)])
def test_kmeans_start_beats_the_initial_codebook(patch_nums: tuple[int, ...], normalize_codebook: bool) -> None:
    vqvae, images = make_vqvae(patch_nums=patch_nums, normalize_codebook=normalize_codebook), make_images(64)
    initial = quantization_error(vqvae, images)
    with torch.no_grad():
        features = vqvae.encode(images).features
    initialize_codebook(vqvae, features, seed=0)
    first = vqvae.codebook.vectors.clone()
    assert quantization_error(vqvae, images) < 0.7 * initial
    with torch.no_grad():
        assert len(vqvae.encode(images).codes.unique()) == 16
    initialize_codebook(vqvae, features, seed=0)
    assert torch.equal(vqvae.codebook.vectors, first)


@torch.no_grad()
def test_cosine_codes_have_directions_of_their_own_and_lengths_of_their_vectors() -> None:
    # Vectors in four directions, of very different lengths in each: Euclidean centres would share directions.
    vqvae = make_vqvae(patch_nums=(4,), codebook_size=4, latent_channels=4, normalize_codebook=True)
    directions = torch.eye(4)[torch.arange(16) % 4]
    lengths = torch.linspace(1, 9, 16)
    features = (directions * lengths[:, None]).T.view(1, 4, 4, 4)
    initialize_codebook(vqvae, features, seed=0)
    expected = torch.diag(torch.stack([lengths[first::4].mean() for first in range(4)]))
    found = vqvae.codebook.vectors
    assert torch.allclose(found[found.argmax(dim=1).argsort()], expected, atol=1e-5)


def test_kmeans_start_needs_enough_images() -> None:
    vqvae = make_vqvae(codebook_size=256)
    with torch.no_grad(), pytest.raises(ValueError, match="codebook_size.*= 256"):
        initialize_codebook(vqvae, vqvae.encode(make_images(2)).features, seed=0)


@torch.no_grad()
def test_only_dead_codes_move_and_then_they_are_used() -> None:
    vqvae, images = make_vqvae(), make_images(32)
    initialize_codebook(vqvae, vqvae.encode(images).features, seed=0)
    weight = vqvae.codebook.vectors
    weight[3] = weight[9] = 100.0
    before = weight.clone()
    output = vqvae.encode(images)
    hits = output.codes.flatten().bincount(minlength=16)

    moved = restart_dead_codes(vqvae, hits, vqvae.quantizer_inputs(output.features), seed=0)
    assert moved.tolist() == [3, 9]
    kept = [code for code in range(16) if code not in (3, 9)]
    assert torch.equal(weight[kept], before[kept])
    assert {3, 9} <= set(vqvae.encode(images).codes.unique().tolist())


def make_average(vqvae: VQVAEModel, *args, **options) -> MovingAverageCodebook:
    vqvae.codebook.requires_grad_(False)
    return MovingAverageCodebook(vqvae, *args, **options)


def test_moving_average_equals_a_textbook_loop() -> None:
    decay, epsilon = 0.8, 1e-5
    vqvae = make_vqvae(patch_nums=(4,), codebook_size=6, refinement_ratio=0.0)
    weight = vqvae.codebook.vectors
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
    average = make_average(vqvae, decay, epsilon)
    sizes, sums = [1.0] * 6, weight.tolist()
    for step in range(4):
        with torch.no_grad():
            # Two batches in a step count like one of both.
            outputs = [vqvae(make_images(3) * (1 + step + part)) for part in range(2)]
        for output in outputs:
            average.observe(output.quantizer_inputs, output.codes)
        average.finish_step()

        vectors = torch.cat([output.features.flatten(2).transpose(1, 2).flatten(0, 1) for output in outputs])
        codes = torch.cat([output.codes.flatten() for output in outputs]).tolist()
        for code in range(6):
            chosen = [vector for vector, own in zip(vectors.tolist(), codes, strict=True) if own == code]
            sizes[code] = decay * sizes[code] + (1 - decay) * len(chosen)
            for channel in range(4):
                total = sum(vector[channel] for vector in chosen)
                sums[code][channel] = decay * sums[code][channel] + (1 - decay) * total
        smoothed = [(size + epsilon) / (sum(sizes) + 6 * epsilon) * sum(sizes) for size in sizes]
        expected = [[total / size for total in row] for row, size in zip(sums, smoothed, strict=True)]
        assert torch.allclose(weight, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_moving_average_of_a_residual_quantizer_ends_at_the_mean_of_what_each_code_stands_for() -> None:
    vqvae, images = make_vqvae(patch_nums=(4, 4), refinement_ratio=0.0), make_images(16)
    with torch.no_grad():
        features = vqvae.encode(images).features
        initialize_codebook(vqvae, features, seed=0)
        average = make_average(vqvae, decay=0.5)
        average.restart()
        weight = vqvae.codebook.vectors
        start = quantization_error(vqvae, images)
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        worse = quantization_error(vqvae, images)
        for _ in range(60):
            output = vqvae(images)
            average.observe(output.quantizer_inputs, output.codes)
            average.finish_step()
        vectors, chosen = output.quantizer_inputs.flatten(0, 1), output.codes.flatten()
    assert start < worse
    assert quantization_error(vqvae, images) < 1.05 * start
    for code in chosen.unique():
        assert torch.allclose(weight[code], vectors[chosen == code].mean(dim=0), atol=2e-3)


def test_vectors_count_for_the_area_they_stand_for() -> None:
    # One code for both scales: the whole map of four tokens weighs as much as the single token.
    vqvae = make_vqvae(patch_nums=(1, 4), codebook_size=1, refinement_ratio=0.0)
    average = make_average(vqvae, decay=0.0, epsilon=0.0)
    with torch.no_grad():
        output = vqvae(make_images(2))
        single, whole = output.quantizer_inputs.split((1, 16), dim=1)
        average.observe(output.quantizer_inputs, output.codes)
        average.finish_step()
    expected = (single.mean(dim=(0, 1)) + whole.mean(dim=(0, 1))) / 2
    assert torch.allclose(vqvae.codebook.vectors[0], expected, atol=1e-5)


def test_restarted_average_stays_where_the_code_was_put() -> None:
    vqvae = make_vqvae()
    average = make_average(vqvae, decay=0.9)
    with torch.no_grad():
        output = vqvae(make_images(4))
        average.observe(output.quantizer_inputs, output.codes)
        average.finish_step()
        unused = int(output.codes.flatten().bincount(minlength=16).argmin())
        weight = vqvae.codebook.vectors
        weight[unused] = 50.0
        average.restart(torch.tensor([unused]))
        average.finish_step()
    assert torch.allclose(weight[unused], torch.full((4,), 50.0), rtol=1e-3)


def test_moving_average_leaves_the_gradients_of_everything_else() -> None:
    vqvae = make_vqvae()
    with pytest.raises(ValueError, match="must not require a gradient"):
        MovingAverageCodebook(vqvae, decay=0.9)
    make_average(vqvae, decay=0.9)
    output = VQVAEWarmup(vqvae)(make_images(3))
    (output.sample.square().mean() + output.loss).backward()
    without = [name for name, parameter in vqvae.named_parameters() if parameter.grad is None]
    assert without == ["quantizer.codebook.weight"]
    assert vqvae.quantizer.refinement_convs[0].weight.grad.any()


def test_unquantized_forward_trains_all_but_the_quantizer() -> None:
    vqvae = make_vqvae()
    output = VQVAEWarmup(vqvae)(make_images(3), quantize=False)
    (output.sample.square().mean() + output.loss).backward()
    for name, parameter in vqvae.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != name.startswith("quantizer."), name
