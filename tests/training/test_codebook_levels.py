# SPDX-License-Identifier: Apache-2.0
"""The codebooks of a hierarchy: each level has its own start, averages, restarts and statistics."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn import functional

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel
from hf_var.data import tokenizer_fingerprint
from hf_var.training.codebook import MovingAverageCodebook, codebook_parts, restart_dead_codes
from hf_var.training.codebook_training import CodebookConfig, CodebookTraining, check_codebook


def make_vqvae(**fields: Any) -> HierarchicalVQVAEModel:
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "image_size": 8, "base_channels": 16, "num_res_blocks": 1, "residual_channels": 8}
    codes = {"latent_channels": 8, "codebook_size": 16, "strides": (2, 2)}
    return HierarchicalVQVAEModel(HierarchicalVQVAEConfig(**{**sizes, **codes, **fields}))


def digits(number: int) -> torch.Tensor:
    pixels = torch.tensor(load_digits().images[:number], dtype=torch.float32)
    return pixels[:, None] / 8 - 1


def train(vqvae: HierarchicalVQVAEModel, config: CodebookConfig, steps: int) -> dict[str, float]:
    """Train on digits as the script does, and return the statistics of the last window."""
    images, metrics = digits(512), {}
    for codebook in vqvae.codebooks:
        codebook.requires_grad_(config.codebook_update == "gradient")
    trained = [parameter for parameter in vqvae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    training = CodebookTraining(config, vqvae.train(), Accelerator(cpu=True), steps, 0, None)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if training.is_started_at(step):
            training.start(images, 64)
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        output = vqvae(batch, quantize=training.is_quantized(step))
        training.observe(output)
        loss = 10 * functional.mse_loss(output.sample, batch) + output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.finish_step(step)
        metrics = training.finish_window(output, step + 1) or metrics
    return metrics


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_no_level_collapses(codebook_update: str) -> None:
    config = CodebookConfig(
        unquantized_steps=40,
        kmeans_images=512,
        codebook_update=codebook_update,
        codebook_window=20,
        restart_until=0.7,
    )
    metrics = train(make_vqvae(), config, 160)
    for level in range(2):
        assert metrics[f"usage_{level}"] >= 0.75
        assert metrics[f"perplexity_{level}"] > 8
        assert metrics[f"residual_energy_{level}"] < 0.5


def test_without_these_means_the_coarse_level_keeps_a_few_codes() -> None:
    assert train(make_vqvae(), CodebookConfig(codebook_window=20), 60)["usage_0"] < 0.5


def test_the_start_sets_finer_levels_by_features_that_know_the_coarser_codes() -> None:
    vqvae, images = make_vqvae(), digits(256)
    config = CodebookConfig(kmeans_images=256, codebook_update="ema")
    for codebook in vqvae.codebooks:
        codebook.requires_grad_(False)
    training = CodebookTraining(config, vqvae, Accelerator(cpu=True), 10, 0, None)
    training.start(images, 64)
    with torch.no_grad():
        output = vqvae.eval().encode(images)
    for level, codes in enumerate(output.codes.split(vqvae.config.scale_lengths, dim=1)):
        codebook, features = vqvae.codebooks[level], output.features[level].flatten(2).transpose(1, 2)
        # k-means centres: each is the mean of the vectors that choose it.
        for code in codes.unique():
            torch.testing.assert_close(codebook.weight[code], features[codes == code].mean(dim=0), rtol=0, atol=2e-2)
        assert len(codes.unique()) == 16
        assert torch.equal(codebook.average_sums, codebook.weight * codebook.average_hits[:, None])


@torch.no_grad()
def test_levels_are_averaged_and_restarted_apart() -> None:
    vqvae, images = make_vqvae().requires_grad_(False), digits(64)
    for codebook in vqvae.codebooks:
        codebook.weight.normal_(std=0.1)
    before = [codebook.weight.clone() for codebook in vqvae.codebooks]
    output = vqvae(images)
    top, bottom = codebook_parts(vqvae)
    average = MovingAverageCodebook(bottom, decay=0.5)
    average.observe(output.quantizer_inputs, output.codes)
    average.finish_step()
    assert torch.equal(vqvae.codebooks[0].weight, before[0])
    assert not torch.equal(vqvae.codebooks[1].weight, before[1])
    # What the averages are is saved with the weights, and another training goes on from it.
    assert vqvae.codebooks[1].average_hits.sum() == pytest.approx(0.5 * 16 + 0.5 * 64 * 16)
    assert torch.equal(MovingAverageCodebook(bottom).sums, average.sums)

    hits = torch.ones(16)
    hits[[3, 9]] = 0
    moved = restart_dead_codes(top, hits, output.quantizer_inputs, seed=0)
    assert moved.tolist() == [3, 9]
    own = output.features[0].flatten(2).transpose(1, 2).flatten(0, 1)
    for code in moved:
        assert (vqvae.codebooks[0].weight[code] == own).all(dim=1).any()


def test_the_coarsest_level_needs_enough_vectors() -> None:
    config = make_vqvae(codebook_size=100).config  # 4 and 16 vectors of an image
    check_codebook(CodebookConfig(kmeans_images=25), config)
    with pytest.raises(ValueError, match="`kmeans_images` = 24 gives 96 vectors.*`codebook_size` = 100"):
        check_codebook(CodebookConfig(kmeans_images=24), config)


def test_a_fingerprint_is_that_of_the_codes() -> None:
    vqvae = make_vqvae()
    first = tokenizer_fingerprint(vqvae)
    # What only the image depends on.
    with torch.no_grad():
        vqvae.decoder.conv_out.weight.add_(1)
        for codebook in vqvae.codebooks:
            codebook.running_hits.add_(1)
            codebook.average_hits.add_(1)
            codebook.average_sums.add_(1)
    assert tokenizer_fingerprint(vqvae) == first
    names = [
        "condition_decoders.0.conv_out.weight",
        "encoders.1.conv.bias",
        "quant_convs.1.bias",
        "codebooks.0.weight",
    ]
    found = {first}
    for name in names:
        with torch.no_grad():
            vqvae.get_parameter(name).add_(0.01)
        found.add(tokenizer_fingerprint(vqvae))
    assert len(found) == 1 + len(names)
    assert tokenizer_fingerprint(make_vqvae(strides=(2, 4), image_size=8)) not in found
