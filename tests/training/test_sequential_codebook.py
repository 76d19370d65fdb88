# SPDX-License-Identifier: Apache-2.0
"""RQ-VAE's moving averages, which move the codes after every scale of a forward pass."""

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_var import HierarchicalVQVAEConfig, VQVAEConfig, VQVAEModel
from hf_var.autoencoders.codebook import AveragedCodebook
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.training.average import AveragedWeights
from hf_var.training.codebook import MovingAverageCodebook, SequentialMovingAverageCodebook, codebook_parts
from hf_var.training.codebook_training import CodebookConfig, CodebookTraining, VQVAEWarmup, check_codebook


def make_vqvae(**config: Any) -> VQVAEModel:
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    defaults = {"in_channels": 1, "latent_channels": 4, "codebook_size": 16, "patch_nums": (4, 4, 4)}
    vqvae = VQVAEModel(VQVAEConfig(**sizes | defaults | {"refinement_ratio": 0.0} | config)).train()
    vqvae.codebook.requires_grad_(False)
    vqvae.codebook.vectors.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
    return vqvae


def make_images(number: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def averages_of(vqvae: VQVAEModel, **options: Any) -> SequentialMovingAverageCodebook:
    return SequentialMovingAverageCodebook(*codebook_parts(vqvae), **options)


@torch.no_grad()
def test_every_scale_searches_the_codes_that_the_one_before_moved() -> None:
    """A textbook loop over depths and codes."""
    vqvae, expected = make_vqvae(), make_vqvae()
    averages = averages_of(vqvae, decay=0.9)
    sizes, sums = torch.zeros(16), expected.codebook.vectors.clone()
    for seed in (1, 2):
        output = vqvae(make_images(5, seed), callback_on_scale_end=averages.move)
        book = expected.codebook.vectors
        residual = expected(make_images(5, seed), quantize=False).features.flatten(2).transpose(1, 2).flatten(0, 1)
        latents, loss = torch.zeros_like(residual), 0.0
        features = residual
        for depth, codes in enumerate(output.codes.split(16, dim=1)):
            found = torch.cdist(residual, book).argmin(dim=1)
            assert torch.equal(codes.flatten(), found), depth
            vectors = book[found].clone()
            for code in range(16):
                members = residual[found == code]
                sizes[code] = 0.9 * sizes[code] + 0.1 * len(members)
                sums[code] = 0.9 * sums[code] + 0.1 * members.sum(dim=0)
            total = sizes.sum()
            book.copy_(sums / (total * (sizes + 1e-5) / (total + 16e-5))[:, None])
            # The vectors of this depth are those from before.
            latents, residual = latents + vectors, residual - vectors
            loss += 0.25 * (features - latents).square().mean() + (features - latents).square().mean()
        torch.testing.assert_close(vqvae.codebook.vectors, book, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(averages.sizes, sizes, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.loss, loss / 3, rtol=1e-4, atol=1e-6)
        # The two books differ by rounding; let them not drift apart.
        book.copy_(vqvae.codebook.vectors)
        sizes, sums = averages.sizes.clone(), averages.sums.clone()


@torch.no_grad()
def test_unused_codes_restart_at_vectors_of_the_batch() -> None:
    vqvae = make_vqvae(patch_nums=(4,))
    vqvae.codebook.vectors[8:] = 50.0
    averages = averages_of(vqvae)
    averages.sizes.fill_(5.0)
    averages.sizes[8:] = 0.5
    averages.sums.copy_(vqvae.codebook.vectors * averages.sizes[:, None])
    images = make_images(6)
    vectors = vqvae.quantizer_inputs(vqvae(images, quantize=False).features).flatten(0, 1)
    vqvae(images, callback_on_scale_end=functools.partial(averages.move, restarts=torch.Generator().manual_seed(3)))
    drawn = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(3))[:16]]
    assert averages.restarted.tolist() == [False] * 8 + [True] * 8
    assert torch.equal(averages.sizes[8:], torch.ones(8))
    assert torch.equal(averages.sums[8:], drawn[8:])
    # One vector chose each of them: the code is that vector, up to the smoothing.
    torch.testing.assert_close(vqvae.codebook.vectors[8:], drawn[8:], rtol=1e-3, atol=1e-4)
    assert (vqvae.codebook.vectors[:8].abs() < 10).all()


@torch.no_grad()
def test_few_vectors_are_repeated_with_a_little_noise() -> None:
    vqvae = make_vqvae(patch_nums=(2,), codebook_size=16)
    averages = averages_of(vqvae)
    vectors = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    averages.move(vectors, torch.zeros(1, 5, dtype=torch.long), restarts=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    tiled = vectors[0].repeat(4, 1)
    tiled = tiled + torch.rand(20, 4, generator=generator) * 0.01 / 4**0.5
    drawn = tiled[torch.randperm(20, generator=generator)[:16]]
    # 0.01 x 5 vectors are less than one: all codes restart.
    assert averages.restarted.all()
    torch.testing.assert_close(averages.sums, drawn, rtol=0, atol=1e-6)
    assert len(vqvae.codebook.vectors.unique(dim=0)) == 16
    nearest = torch.cdist(vqvae.codebook.vectors, vectors[0]).min(dim=1).values
    assert 0 < nearest.max() < 0.02


def test_only_forward_passes_with_the_callback_move_codes() -> None:
    vqvae = make_vqvae()
    averages = averages_of(vqvae)
    before = vqvae.codebook.vectors.clone()
    vqvae(make_images(3))
    vqvae(make_images(3), quantize=False, callback_on_scale_end=averages.move)
    vqvae.encode(make_images(3))
    assert torch.equal(vqvae.codebook.vectors, before)
    vqvae(make_images(3), callback_on_scale_end=averages.move)
    assert not torch.equal(vqvae.codebook.vectors, before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activations_that_are_computed_twice_move_codes_once(use_reentrant: bool) -> None:
    results = []
    for is_checkpointed in (False, True):
        vqvae = make_vqvae()
        if is_checkpointed:
            enable_activation_checkpointing(vqvae, {"use_reentrant": use_reentrant})
        averages, calls = averages_of(vqvae), []

        def move(vectors, codes, averages=averages, calls=calls):
            assert not vectors.requires_grad
            calls.append(1)
            averages.move(vectors, codes)

        output = VQVAEWarmup(vqvae)(make_images(4), callback_on_scale_end=move)
        (output.loss + output.sample.square().mean()).backward()
        gradients = [parameter.grad for parameter in vqvae.parameters() if parameter.requires_grad]
        results.append((averages.sizes.clone(), vqvae.codebook.vectors.clone(), len(calls), gradients))
    plain, checkpointed = results
    assert plain[2] == checkpointed[2] == 3
    assert torch.equal(plain[0], checkpointed[0])
    assert torch.equal(plain[1], checkpointed[1])
    for expected, found in zip(plain[3], checkpointed[3], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_averages_of_the_weights_are_continued_and_kept(tmp_path) -> None:
    vqvae = make_vqvae(codebook_averages=True)
    averages = averages_of(vqvae)
    vqvae(make_images(4), callback_on_scale_end=averages.move)
    vqvae.save_pretrained(tmp_path)
    loaded = VQVAEModel.from_pretrained(tmp_path).train()
    loaded.codebook.requires_grad_(False)
    continued = averages_of(loaded)
    assert isinstance(loaded.codebook, AveragedCodebook)
    assert continued.sizes is loaded.codebook.average_hits
    for model, own in ((vqvae, averages), (loaded, continued)):
        model(make_images(4, seed=2), callback_on_scale_end=own.move)
    assert torch.equal(loaded.codebook.vectors, vqvae.codebook.vectors)
    assert torch.equal(continued.sums, averages.sums)
    # The other update continues the same averages.
    assert torch.equal(MovingAverageCodebook(*codebook_parts(loaded)).sizes, averages.sizes)


def test_saved_averages_go_on_as_if_uninterrupted() -> None:
    vqvae, other = make_vqvae(), make_vqvae()
    averages, resumed = averages_of(vqvae), averages_of(other)
    vqvae(make_images(4), callback_on_scale_end=averages.move)
    other.load_state_dict(vqvae.state_dict())
    resumed.load_state_dict({name: tensor.clone() for name, tensor in averages.state_dict().items()})
    for model, own in ((vqvae, averages), (other, resumed)):
        model(make_images(4, seed=2), callback_on_scale_end=own.move)
    assert torch.equal(other.codebook.vectors, vqvae.codebook.vectors)


def make_training(vqvae: VQVAEModel, average: AveragedWeights | None = None, **config: Any) -> CodebookTraining:
    settings = CodebookConfig(codebook_update="sequential_ema", **config)
    return CodebookTraining(settings, vqvae, Accelerator(cpu=True), max_train_steps=10, seed=0, average=average)


def test_restarts_end_and_their_draws_follow_from_the_position() -> None:
    moved = {}
    for name, (step, position) in {"a": (0, 0), "again": (0, 0), "later": (0, 1), "over": (5, 0)}.items():
        vqvae = make_vqvae()
        training = make_training(vqvae, restart_until=0.5)
        vqvae(make_images(4), callback_on_scale_end=training.scale_callback(step, position))
        (averages,) = training.moving_averages
        assert bool(averages.restarted.any()) is (name != "over")
        moved[name] = vqvae.codebook.vectors.clone()
        training.finish_step(step)
        assert not averages.restarted.any()
    assert torch.equal(moved["a"], moved["again"])
    assert not torch.equal(moved["a"], moved["later"])


def test_the_average_of_the_weights_jumps_with_codes_that_restart() -> None:
    vqvae = make_vqvae()
    average = AveragedWeights(vqvae, decay=0.99)
    training = make_training(vqvae, average, restart_until=1.0)
    (averages,) = training.moving_averages
    averages.sizes.fill_(40.0)
    averages.sizes[12:] = 0.0
    averages.sums.copy_(vqvae.codebook.vectors * averages.sizes[:, None])
    with torch.no_grad():
        vqvae.codebook.vectors[12:] = 30.0
        shadow = average.shadow_params[average.names.index("quantizer.codebook.weight")]
        shadow.fill_(7.0)
    vqvae(make_images(2), callback_on_scale_end=training.scale_callback(0, 0))
    training.finish_step(0)
    assert torch.equal(shadow[12:], vqvae.codebook.vectors[12:])
    assert (shadow[:12] == 7).all()


def test_a_kmeans_start_is_where_the_averages_begin() -> None:
    vqvae = make_vqvae()
    training = make_training(vqvae, kmeans_images=32)
    training.start(make_images(32), batch_size=8)
    (averages,) = training.moving_averages
    assert torch.equal(averages.sizes, torch.ones(16))
    assert torch.equal(averages.sums, vqvae.codebook.vectors)


def test_other_updates_have_no_callback() -> None:
    for update in ("gradient", "ema"):
        vqvae = make_vqvae()
        training = CodebookTraining(CodebookConfig(codebook_update=update), vqvae, Accelerator(cpu=True), 10, 0, None)
        assert training.scale_callback(0, 0) is None


def test_what_does_not_go_together() -> None:
    config = CodebookConfig(codebook_update="sequential_ema")
    with pytest.raises(ValueError, match="`codebook_update` must be 'gradient' or 'ema' for a hierarchical tokenizer"):
        check_codebook(config, HierarchicalVQVAEConfig())
    with pytest.raises(ValueError, match="`codebook_update` must be gradient with quantizer='fsq'"):
        check_codebook(config, VQVAEConfig(quantizer="fsq", fsq_levels=(4, 4)))
    other = CodebookConfig(codebook_update="sequential_ema", restart_threshold=0.5)
    with pytest.raises(ValueError, match="`restart_threshold` must be left out with .*got 0.5"):
        check_codebook(other, VQVAEConfig())
    check_codebook(config, VQVAEConfig())
    vqvae = make_vqvae()
    vqvae.codebook.requires_grad_(True)
    with pytest.raises(ValueError, match="must not require a gradient"):
        averages_of(vqvae)
