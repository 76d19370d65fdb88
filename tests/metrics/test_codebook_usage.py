# SPDX-License-Identifier: Apache-2.0
"""How the codes' use is counted."""

import math

import pytest
import torch

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VQVAEConfig, VQVAEModel
from hf_var.metrics.codebook_usage import CodeStatistics, expected_codes, residual_energy


CONFIG = VQVAEConfig(
    in_channels=1,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    norm_num_groups=4,
    latent_channels=4,
    codebook_size=8,
    patch_nums=(1, 2),
)


def test_figures_by_hand() -> None:
    statistics = CodeStatistics(CONFIG)
    statistics.count(torch.tensor([[3, 0, 0, 1, 1]]))
    statistics.count(torch.tensor([[3, 0, 0, 1, 1], [5, 0, 0, 1, 1]]))
    figures = statistics.compute()
    assert statistics.hits.tolist() == [[0, 0, 0, 2, 0, 1, 0, 0], [6, 6, 0, 0, 0, 0, 0, 0]]
    assert figures["usage"] == 4 / 8
    assert figures["dead_codes"] == 4
    assert (figures["usage_0"], figures["usage_1"]) == (2 / 8, 2 / 8)
    assert (figures["dead_codes_0"], figures["dead_codes_1"]) == (6, 6)
    assert figures["perplexity_0"] == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    assert figures["perplexity_1"] == pytest.approx(2)
    # Three draws from eight codes reach 8 (1 - (7/8)^3) = 2.64 of them on average.
    assert figures["reached_0"] == pytest.approx(2 / 2.640625)
    assert figures["reached_1"] == pytest.approx(2 / (8 * (1 - (7 / 8) ** 12)))


def test_a_coarse_scale_with_random_codes_reaches_what_it_can() -> None:
    config = VQVAEConfig(codebook_size=1024, patch_nums=(1, 16))
    statistics = CodeStatistics(config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        statistics.count(torch.randint(1024, (8, 257), generator=generator))
    figures = statistics.compute()
    assert figures["usage_0"] < 0.4
    assert figures["reached_0"] == pytest.approx(1, abs=0.05)
    assert figures["usage_1"] == 1.0


def test_expected_codes_is_the_mean_over_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(32, (2000, 20), generator=generator)
    mean = sum(len(row.unique()) for row in draws) / 2000
    assert expected_codes(20, 32) == pytest.approx(mean, rel=0.01)


def test_a_new_window_forgets_and_a_saved_one_goes_on() -> None:
    statistics, resumed = CodeStatistics(CONFIG), CodeStatistics(CONFIG)
    statistics.count(torch.tensor([[3, 0, 0, 1, 1]]))
    resumed.load_state_dict(statistics.state_dict())
    for each in (statistics, resumed):
        each.count(torch.tensor([[4, 0, 0, 1, 7]]))
    assert resumed.compute() == statistics.compute()
    assert resumed.compute()["usage_1"] == 3 / 8
    statistics.reset()
    assert statistics.compute()["usage"] == 0


@torch.no_grad()
def test_residual_energy_is_what_the_decoder_does_not_see() -> None:
    torch.manual_seed(0)
    vqvae = VQVAEModel(CONFIG).eval()
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    vqvae.codebook.vectors.copy_(vqvae.encode(images).features.mean(dim=(2, 3)).repeat(3, 1)[:8])
    output = vqvae.encode(images)
    energy = residual_energy(vqvae, output.features, output.codes)
    assert energy.shape == (2, 2)
    whole, left = energy.tolist()
    assert whole == pytest.approx([output.features.square().sum().item()] * 2, rel=1e-5)
    assert left[1] == pytest.approx((output.features - output.latents).square().sum().item(), rel=1e-4)
    assert left[0] < 0.9 * whole[0]


@torch.no_grad()
def test_each_level_of_a_hierarchy_has_codes_and_features_of_its_own() -> None:
    config = HierarchicalVQVAEConfig(
        in_channels=1, image_size=8, base_channels=4, residual_channels=4, latent_channels=4, codebook_size=8
    )
    vqvae = HierarchicalVQVAEModel(config).eval()
    output = vqvae.encode(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    whole, left = residual_energy(vqvae, output.features, output.codes).tolist()
    for level in range(2):
        features, latents = output.features[level], output.latents[level]
        assert whole[level] == pytest.approx(features.square().sum().item(), rel=1e-5)
        assert left[level] == pytest.approx((features - latents).square().sum().item(), rel=1e-5)
    # The top uses its code 3 alone, the bottom 0 and 1: three of sixteen codes.
    statistics = CodeStatistics(config)
    statistics.count(torch.tensor([[3, 0, 0, 1, 1]]))
    figures = statistics.compute()
    assert statistics.codebook_hits.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0, 0, 0]]
    assert figures["usage"] == 3 / 16
    assert figures["dead_codes"] == 13
