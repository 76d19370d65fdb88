# SPDX-License-Identifier: Apache-2.0
"""The codebook's start and its dead codes."""

import pytest
import torch

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.training.codebook import DeadCodes, VQVAEWarmup, initialize_codebook, quantizer_inputs


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
    vqvae.quantizer.codebook.weight.normal_(generator=torch.Generator().manual_seed(0))
    output = vqvae.encode(make_images(5))
    inputs = quantizer_inputs(vqvae, output.features, output.codes)
    found = [vqvae.quantizer.codebook(vectors).view(5, -1) for vectors in inputs]
    assert torch.equal(torch.cat(found, dim=1), output.codes)
    assert len(output.codes.unique()) > 4


@torch.no_grad()
def test_quantizer_inputs_without_codes_leave_nothing_to_later_scales() -> None:
    # Two equal scales without refinement: the first one, coded without error, explains everything.
    vqvae = make_vqvae(patch_nums=(4, 4), refinement_ratio=0.0)
    first, second = quantizer_inputs(vqvae, vqvae.encode(make_images(2)).features)
    assert first.std() > 0
    assert torch.equal(second, torch.zeros_like(second))


def quantization_error(vqvae: VQVAEModel, images: torch.Tensor) -> float:
    with torch.no_grad():
        output = vqvae.encode(images)
    return (output.features - output.latents).square().mean().item()


@pytest.mark.parametrize("patch_nums", [(4,), (1, 2, 4), (4, 4)])
def test_kmeans_start_beats_the_initial_and_a_random_codebook(patch_nums: tuple[int, ...]) -> None:
    vqvae, images = make_vqvae(patch_nums=patch_nums), make_images(64)
    initial = quantization_error(vqvae, images)
    initialize_codebook(vqvae, images, seed=0)
    first = vqvae.quantizer.codebook.weight.clone()
    assert quantization_error(vqvae, images) < 0.7 * initial
    with torch.no_grad():
        assert len(vqvae.encode(images).codes.unique()) == 16
    initialize_codebook(vqvae, images, seed=0)
    assert torch.equal(vqvae.quantizer.codebook.weight, first)


def test_kmeans_start_needs_enough_images() -> None:
    with pytest.raises(ValueError, match="codebook_size.*= 256"):
        initialize_codebook(make_vqvae(codebook_size=256), make_images(2), seed=0)


@torch.no_grad()
def test_only_dead_codes_move_and_then_they_are_used() -> None:
    vqvae, images = make_vqvae(), make_images(32)
    initialize_codebook(vqvae, images, seed=0)
    weight = vqvae.quantizer.codebook.weight
    weight[3] = weight[9] = 100.0
    before = weight.clone()
    output = vqvae.encode(images)
    dead_codes = DeadCodes(16)
    dead_codes.count(output.codes)
    assert dead_codes.hits.sum() == output.codes.numel()

    moved = dead_codes.restart(vqvae, output.features, output.codes, seed=0)
    assert moved.tolist() == [3, 9]
    kept = [code for code in range(16) if code not in (3, 9)]
    assert torch.equal(weight[kept], before[kept])
    assert dead_codes.hits.sum() == 0
    assert {3, 9} <= set(vqvae.encode(images).codes.unique().tolist())


def test_unquantized_forward_trains_all_but_the_quantizer() -> None:
    vqvae = make_vqvae()
    output = VQVAEWarmup(vqvae)(make_images(3), quantize=False)
    (output.sample.square().mean() + output.loss).backward()
    for name, parameter in vqvae.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != name.startswith("quantizer."), name
