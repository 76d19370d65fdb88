# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantization against the paper's formulas, written here in NumPy, and in the residual loop."""

import math

import accelerate
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.hooks import apply_group_offloading
from transformers import AutoModel

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.conversion import export_official_vqvae
from loading_checks import incomplete


LEVELS = [(8, 5, 5, 5), (2, 3, 4), (7,), (2, 2, 2, 2, 2, 2), (3, 8)]


def make_fsq(levels=(8, 5, 5, 5), **fields) -> VQVAEModel:
    """A small model in evaluation mode whose features reach all levels, the same one for the same fields."""
    tiny = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    config = VQVAEConfig(**{**tiny, "patch_nums": (1, 2, 4), "quantizer": "fsq", "fsq_levels": levels, **fields})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = VQVAEModel(config).eval()
        model.quant_conv.weight.mul_(10)
        model.decoder.conv_out.weight.mul_(2)
    return model


@pytest.fixture(scope="module")
def fsq() -> VQVAEModel:
    """A model that tests share and none may change."""
    return make_fsq()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def paper(z: np.ndarray, levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and codes of `(..., channels)`, appendix A.1."""
    levels = np.array(levels)
    half_length = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    rounded = np.round(np.tanh(z + np.tan(offset / half_length)) * half_length - offset)
    basis = np.concatenate(([1], np.cumprod(levels[:-1])))
    return rounded / (levels // 2), ((rounded + levels // 2) * basis).sum(axis=-1).astype(np.int64)


def unbounded(model: VQVAEModel, images: torch.Tensor) -> torch.Tensor:
    return model.quant_conv(model.encoder(images))


# --------------------------------------------------------------------------------------------------------------------
# The implicit codebook


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_the_codebook_lists_all_combinations_of_levels_once(levels):
    model = make_fsq(levels)
    size = math.prod(levels)
    assert model.config.codebook_size == size
    assert model.config.latent_channels == len(levels)
    codes = torch.arange(size)
    vectors = model.code_vectors(codes)
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, model.codebook.vectors)
    assert len(vectors.unique(dim=0)) == size
    assert torch.equal(model.codebook(vectors), codes)
    for channel, level in enumerate(levels):
        steps = vectors[:, channel].unique()
        assert steps.tolist() == pytest.approx([(digit - level // 2) / (level // 2) for digit in range(level)])
    # The first channel counts ones.
    assert vectors[1, 0] > vectors[0, 0]
    assert torch.equal(vectors[1, 1:], vectors[0, 1:])


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_vector_gets_a_code_in_range(levels):
    model = make_fsq(levels)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 100.0, math.inf):
        vectors = torch.randn(2, 300, len(levels), generator=generator) * scale
        codes = model.codebook(vectors)
        assert codes.dtype == torch.int64
        assert codes.shape == (2, 300)
        assert 0 <= codes.min() <= codes.max() < math.prod(levels)
    corners = torch.tensor([[-1e9], [1e9]]).expand(2, len(levels))
    assert model.codebook(corners).tolist() == [0, math.prod(levels) - 1]
    assert model.codebook(torch.full((1, len(levels)), math.nan)).item() in range(math.prod(levels))


@torch.no_grad()
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_one_scale_is_the_paper(levels, images):
    model = make_fsq(levels, patch_nums=(4,), refinement_ratio=0.0)
    output = model.encode(images)
    z = unbounded(model, images).flatten(2).transpose(1, 2)
    vectors, codes = paper(z.double().numpy(), levels)
    assert len(np.unique(codes)) > 5
    assert np.array_equal(output.codes.numpy(), codes)
    np.testing.assert_allclose(output.latents.flatten(2).transpose(1, 2).numpy(), vectors, rtol=0, atol=1e-6)
    # Bounded features round to no level but those there are.
    far = model.codebook.bound(torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, len(levels), 1, 1))
    ends = torch.stack([model.codebook.vectors.amin(dim=0), model.codebook.vectors.amax(dim=0)])
    half_step = 0.5 / torch.tensor([level // 2 for level in levels])
    assert ((far[..., 0, 0] - ends).abs() < half_step).all()


# --------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_the_gradient_passes_the_rounding_straight(levels, images):
    model = make_fsq(levels, patch_nums=(4,), refinement_ratio=0.0).train()
    output = model(images)
    output.features.retain_grad()
    output.latents.retain_grad()
    output.sample.square().sum().backward()
    assert output.latents.grad.abs().max() > 0.01
    torch.testing.assert_close(output.features.grad, output.latents.grad, rtol=1e-5, atol=1e-6)
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


def test_there_are_no_losses_of_the_codes(images):
    model = make_fsq(commitment_loss_weight=3.0).train()
    assert model(images).loss == 0
    assert model(images).loss.dtype == torch.float32


def test_all_scales_learn_from_the_reconstruction(images):
    model = make_fsq(patch_nums=(1, 2, 4), num_refinement_convs=0).train()
    output = model(images)
    (output.sample.square().mean() + output.loss).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_extents_learn_to_cover_what_they_round():
    model = make_fsq((5, 3), patch_nums=(1, 1), refinement_ratio=0.0)
    features = torch.tensor([0.52, 0.95]).view(1, 2, 1, 1)
    with torch.no_grad():
        model.codebook.log_extents.weight.copy_(torch.tensor([[1.0, 1.0], [0.1, 0.2]]).log())
    features.requires_grad_()
    output = model.quantizer(features)
    # The first scale rounds to 0.5 and 1. What is left, 0.02 and -0.05, is 0.2 and -0.25 in the second one's extents.
    assert output.latents.flatten().tolist() == pytest.approx([0.5, 1.0], abs=1e-6)
    output.latents.sum().backward()
    first, second = model.codebook.log_extents.weight.grad
    # d/de of e * round(v / e), straight through: e * (round(v / e) - v / e).
    assert second.tolist() == pytest.approx([0.1 * (0.0 - 0.2), 0.2 * (0.0 + 0.25)], abs=1e-5)
    assert first.tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert features.grad.flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-5)

    # Beyond the last level, only a larger extent brings the latents nearer.
    with torch.no_grad():
        model.codebook.log_extents.weight.copy_(torch.tensor([[0.1, 0.1], [0.1, 0.1]]).log())
    model.zero_grad()
    features.grad = None
    output = model.quantizer(features)
    assert output.latents.flatten().tolist() == pytest.approx([0.2, 0.2], abs=1e-6)
    output.latents.sum().backward()
    assert (model.codebook.log_extents.weight.grad > 0.09).all()
    assert not features.grad.any()


# --------------------------------------------------------------------------------------------------------------------
# In the residual loop


@torch.no_grad()
def test_a_second_map_of_the_same_size_refines_the_first(images):
    errors = []
    for depth in (1, 2, 3):
        model = make_fsq(patch_nums=(4,) * depth, refinement_ratio=0.0)
        output = model.encode(images)
        assert torch.equal(output.codes[:, :16], model.codebook(output.features.flatten(2).transpose(1, 2)))
        errors.append((output.features - output.latents).abs().amax(dim=(0, 2, 3)))
    # Half a step of a channel, then half a step of steps that are L - 1 times as many.
    levels = torch.tensor(model.config.fsq_levels)
    for depth, error in enumerate(errors):
        assert (error <= 0.5 / (levels // 2) / (levels - 1) ** depth + 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("patch_nums", [(1, 2, 4), (4, 4), (1, 2, 2, 4, 4), ((1, 2), (2, 2), (3, 4))], ids=str)
def test_all_ways_to_the_latents_agree(patch_nums, images):
    model = make_fsq(patch_nums=patch_nums)
    pixels = images[..., :6, :] if model.config.image_size == (6, 8) else images
    output = model.encode(pixels)
    running = model.running_latents(output.codes)
    stepped, begin, inputs = None, 0, []
    for scale, length in enumerate(model.config.scale_lengths):
        codes = output.codes[:, begin : begin + length]
        begin += length
        by_vectors, _ = model.next_scale(stepped, model.code_vectors(codes), scale)
        stepped, following = model.next_scale(stepped, codes, scale)
        assert torch.equal(stepped, by_vectors)
        assert torch.equal(stepped, running[scale])
        inputs.append(following)
    assert torch.equal(model.teacher_forcing(output.codes), torch.cat(inputs[:-1], dim=1))
    assert torch.equal(model.codebook(model.quantizer_inputs(output.features)), output.codes)
    assert torch.equal(model.latents(output.codes), running[-1])
    torch.testing.assert_close(output.latents, running[-1], rtol=0, atol=1e-6)
    trained = model.train()(pixels)
    assert torch.equal(trained.codes, output.codes)
    torch.testing.assert_close(trained.latents, output.latents, rtol=0, atol=1e-6)
    assert len(output.codes.unique()) > 4


# --------------------------------------------------------------------------------------------------------------------
# As a model of transformers and diffusers


@torch.no_grad()
def test_saving_and_loading(fsq, images, tmp_path):
    fsq.save_pretrained(tmp_path)
    loaded, report = VQVAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.to_dict() == fsq.config.to_dict() | {
        "_name_or_path": loaded.config.to_dict()["_name_or_path"]
    }
    assert torch.equal(loaded.encode(images).codes, fsq.encode(images).codes)
    assert torch.equal(loaded(images).sample, fsq(images).sample)
    with pytest.raises(ValueError, match="codebook_size"):
        VQVAEModel.from_pretrained(tmp_path, fsq_levels=(4, 4, 4, 4))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_quantizer_exact(fsq, images, tmp_path, dtype):
    fsq.save_pretrained(tmp_path)
    built = AutoModel.from_config(fsq.config, dtype=dtype)
    for model in (make_fsq().to(dtype), VQVAEModel.from_pretrained(tmp_path, dtype=dtype), built):
        codes = model.encode(images).codes
        assert torch.equal(model.code_vectors(codes), fsq.code_vectors(codes))
        assert model(images).sample.dtype == dtype
        assert {tensor.dtype for tensor in model.quantizer.state_dict().values()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        output = fsq(images)
        assert output.features.dtype == dtype
        assert output.latents.dtype == torch.float32
    assert torch.equal(fsq.quantizer(output.features).codes, output.codes)


def test_what_a_file_lacks_is_initialised(tmp_path):
    model = make_fsq(patch_nums=(4, 4))
    start = model.codebook.log_extents.weight.detach().clone()
    levels = torch.tensor([8.0, 5.0, 5.0, 5.0])
    torch.testing.assert_close(start.exp(), torch.stack([torch.ones(4), 1 / (levels - 1)]))
    weights = {name: weight for name, weight in model.state_dict().items() if "extents" not in name}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    loaded = incomplete(VQVAEModel).from_pretrained(tmp_path)
    assert torch.equal(loaded.codebook.log_extents.weight, start)
    assert make_fsq(patch_nums=(4,)).codebook.log_extents is None


def test_shapes_without_weights(fsq):
    with torch.device("meta"):
        model = VQVAEModel(fsq.config)
        assert model(torch.empty(2, 3, 8, 8)).codes.shape == (2, 21)
    model.to_empty(device="cpu").load_state_dict(fsq.state_dict())
    assert torch.equal(model.codebook.vectors, fsq.codebook.vectors)


@torch.no_grad()
def test_offloading(fsq, images, tmp_path):
    expected = fsq(images)
    offloaded = make_fsq()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert torch.equal(offloaded(images).sample, expected.sample)
    grouped = make_fsq()
    settings = {"onload_device": "cpu", "offload_device": "cpu", "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(grouped, offload_type="leaf_level", **settings)
    for parameter in grouped.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(grouped.decode(grouped.encode(images).codes).sample, fsq.decode(expected.codes).sample)


def test_compile(images):
    compiled = torch.compile(make_fsq(patch_nums=(2, 4, 4)).train(), fullgraph=True, backend="aot_eager")
    model = make_fsq(patch_nums=(2, 4, 4)).train()
    output, expected = compiled(images), model(images)
    assert torch.equal(output.codes, expected.codes)
    output.sample.square().mean().backward()
    expected.sample.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter, gradient in zip(compiled.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4)


def test_fixed_vectors_are_not_set_and_not_exported(fsq):
    with pytest.raises(ValueError, match="FiniteScalarCodebook are fixed"):
        fsq.codebook.set_vectors(torch.zeros(1000, 4))
    with pytest.raises(ValueError, match="`quantizer` must be 'vq'.*'fsq'"):
        export_official_vqvae(fsq)


def test_a_transformer_learns_its_codes_and_a_pipeline_draws(images):
    vqvae = make_fsq((4, 3))
    codes = vqvae.encode(images).codes
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    shared = {name: getattr(vqvae.config, name) for name in ("codebook_size", "latent_channels", "patch_nums")}
    transformer = VARTransformer(VARConfig(**sizes, **shared, class_dropout=0.0))
    optimizer = torch.optim.Adam(transformer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        output = transformer(torch.arange(3), vqvae.teacher_forcing(codes), labels=codes)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(math.log(12), rel=0.3)
    assert losses[-1] < 0.3
    pipe = VARPipeline(transformer=transformer.eval(), vqvae=vqvae)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe([0, 1, 2], guidance_scale=1.0, top_k=1, output_type="pt").images
    expected = vqvae.decode(codes).sample / 2 + 0.5
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
