# SPDX-License-Identifier: Apache-2.0
"""The hierarchical tokenizer: levels, agreement of its methods, precision, saving, hooks and what it refuses."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from transformers import AutoModel

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VQVAEModel
from hf_var.autoencoders import load_tokenizer
from hf_var.compatibility import enable_activation_checkpointing


TINY = {
    "in_channels": 1,
    "image_size": (32, 16),
    "base_channels": 8,
    "num_res_blocks": 1,
    "residual_channels": 4,
    "latent_channels": 4,
    "codebook_size": 16,
}


def make_model(**fields) -> HierarchicalVQVAEModel:
    """A model whose features, codes and images have contrast."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = HierarchicalVQVAEModel(HierarchicalVQVAEConfig(**{**TINY, **fields})).eval()
        for parameter in model.parameters():
            parameter.mul_(2)
        for level, codebook in enumerate(model.codebooks):
            vectors = model.encode(make_images(model, 16)).features[level].flatten(2).transpose(1, 2).flatten(0, 1)
            codebook.set_vectors(vectors[torch.randperm(len(vectors))[: len(codebook.weight)]])
            codebook.running_hits.uniform_()
    return model


def make_images(model, batch_size=3):
    shape = (batch_size, model.config.in_channels, *model.config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def images(model):
    return make_images(model)


@pytest.fixture(scope="module")
def codes(model, images):
    with torch.no_grad():
        return model.encode(images).codes


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"strides": (4,)}, [(8, 4)]),
        ({"strides": (4, 2)}, [(4, 2), (8, 4)]),
        ({"strides": (8, 2)}, [(2, 1), (4, 2)]),
        ({"strides": (2, 4)}, [(4, 2), (16, 8)]),
        ({"strides": (2, 2, 2), "num_res_blocks": 0}, [(4, 2), (8, 4), (16, 8)]),
        ({"strides": (8, 2, 2), "image_size": 32, "in_channels": 3, "out_channels": 2}, [(1, 1), (2, 2), (4, 4)]),
    ],
    ids=str,
)
def test_levels_are_coarse_to_fine(fields, sizes):
    model = make_model(**fields)
    config = model.config
    assert config.scale_sizes == sizes
    images = make_images(model)
    output = model(images)
    assert output.codes.shape == (3, sum(height * width for height, width in sizes))
    assert output.codes.dtype == torch.int64
    assert [tuple(part.shape) for part in output.features] == [(3, 4, *size) for size in sizes]
    assert [part.shape for part in output.latents] == [part.shape for part in output.features]
    assert output.sample.shape == (3, config.num_output_channels, *config.image_size)
    assert output.sample.std() > 0.05
    encoded = model.encode(images)
    assert torch.equal(encoded.codes, output.codes)
    assert torch.equal(model.decode(encoded.codes).sample, output.sample.clamp(-1, 1))
    assert torch.equal(model.decode(latents=encoded.latents).sample, output.sample.clamp(-1, 1))
    # Every level's latents are the vectors of its own codebook, row by row.
    vectors = model.code_vectors(encoded.codes).split(config.scale_lengths, dim=1)
    parts = encoded.codes.split(config.scale_lengths, dim=1)
    for level, own in enumerate(encoded.latents):
        assert torch.equal(own.flatten(2).transpose(1, 2), vectors[level])
        assert torch.equal(vectors[level], model.codebooks[level].weight[parts[level]])
        distances = torch.cdist(encoded.features[level].flatten(2).transpose(1, 2), model.codebooks[level].weight)
        assert torch.equal(distances.argmin(dim=-1), parts[level])
    assert all(len(part.unique()) > 2 for part in parts if part.numel() > 6)


@torch.no_grad()
def test_a_batch_is_its_images_one_by_one(model, images, codes):
    single = [model.encode(image).codes for image in images.split(1)]
    assert torch.equal(torch.cat(single), codes)
    samples = torch.cat([model.decode(part).sample for part in codes.split(1)])
    torch.testing.assert_close(samples, model.decode(codes).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_level_reaches_the_image_and_the_top_reaches_the_bottom_codes(model, images, codes):
    sample = model.decode(codes).sample
    for level, position in enumerate((0, -1)):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % 16
        assert not torch.equal(model.decode(changed).sample, sample), level
    # The first level alone: the other's code vectors are zero.
    top, bottom = model.latents(codes)
    coarse = model.decode(latents=(top, torch.zeros_like(bottom))).sample
    assert torch.equal(model.decode(codes, num_scales=1).sample, coarse)
    assert torch.equal(model.decode(codes[:, :8], num_scales=1).sample, coarse)
    # Bottom features depend on what the top was quantized to.
    other = make_model()
    other.codebooks[0].set_vectors(other.codebooks[0].weight.flip(0) * 3)
    assert torch.equal(other.encode(images).features[0], model.encode(images).features[0])
    assert not torch.equal(other.encode(images).features[1], model.encode(images).features[1])


def test_the_loss_is_a_sum_over_levels_and_gradients_pass_straight_through(images):
    model = make_model(commitment_loss_weight=0.3, codebook_loss_weight=0.7).train()
    output = model(images)
    errors = [(own - found).square().mean() for own, found in zip(output.features, output.latents, strict=True)]
    assert output.loss.item() == pytest.approx(sum(errors).item(), rel=1e-5)
    output.sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("codebooks."), name
    model(images).loss.backward()
    assert all(codebook.weight.grad.any() for codebook in model.codebooks)


def test_without_quantization_the_features_are_decoded(model, images):
    output = model(images, quantize=False)
    assert output.codes is None
    assert output.latents is None
    assert output.loss == 0
    assert torch.equal(model.decode(latents=output.features).sample, output.sample.clamp(-1, 1))
    names = ["loss", "sample", "features", "latents", "codes", "quantizer_inputs"]
    assert [*model(images).keys()] == names
    assert torch.equal(model(images, return_dict=False)[1], model(images).sample)


@torch.no_grad()
def test_codes_are_found_in_fp32_whatever_the_dtype(images, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = HierarchicalVQVAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for half in (make_model().to(torch.bfloat16), loaded):
        assert half.decoder.conv_in.weight.dtype == torch.bfloat16
        assert {tensor.dtype for tensor in half.codebooks.state_dict().values()} == {torch.float32}
        assert torch.equal(half.codebooks[1].weight, model.codebooks[1].weight)
        output = half(images)
        assert output.sample.dtype == torch.bfloat16
        assert {part.dtype for part in output.latents} == {torch.float32}
        assert torch.equal(half.decode(output.codes).sample, output.sample.clamp(-1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).latents[1].dtype == torch.float32
        assert make_model().train()(images).loss.dtype == torch.float32


@torch.no_grad()
def test_saved_models_load_by_every_way(model, images, codes, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (AutoModel.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert isinstance(loaded, HierarchicalVQVAEModel)
        assert loaded.config.image_size == (32, 16)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(loaded.encode(images).codes, codes)


def test_load_tokenizer_loads_the_other_class(make_vqvae, tmp_path):
    make_vqvae().save_pretrained(tmp_path)
    assert isinstance(load_tokenizer(str(tmp_path)), VQVAEModel)


def test_a_new_model_has_torchs_initial_weights():
    model = HierarchicalVQVAEModel(HierarchicalVQVAEConfig(**TINY))
    for layer in (model.encoders[0].conv, model.decoder.conv_out, model.upsamplers[0]):
        # Uniform up to the reciprocal root of the fan-in, as torch counts it.
        limit = layer.weight[0].numel() ** -0.5
        assert 0.8 * limit < layer.weight.abs().max() <= limit
        assert 0 < layer.bias.abs().max() <= limit


METHODS = {
    "forward": lambda model, images, codes: model(images).sample,
    "encode": lambda model, images, codes: model.encode(images).codes,
    "decode": lambda model, images, codes: model.decode(codes).sample,
    "decode_latents": lambda model, images, codes: model.decode(latents=model.latents(codes)).sample,
    "code_vectors": lambda model, images, codes: model.code_vectors(codes),
}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level", "sequential"])
def test_offloading_sees_all_weights(model, images, codes, method, offload_type, tmp_path):
    offloaded = make_model()
    if offload_type == "sequential":
        accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    else:
        settings = {"onload_device": "cpu", "offload_device": "cpu", "offload_to_disk_path": str(tmp_path)}
        apply_group_offloading(offloaded, offload_type=offload_type, num_blocks_per_group=1, **settings)
        for parameter in offloaded.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(METHODS[method](offloaded, images, codes), METHODS[method](model, images, codes))


def test_activation_checkpointing_changes_no_gradient(images):
    plain, checkpointed = make_model().train(), make_model().train()
    enable_activation_checkpointing(checkpointed)
    calls = []
    checkpointed.encoders[0].conv.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        output = model(images)
        (output.loss + output.sample.square().mean()).backward()
    assert len(calls) == 2  # once more in the backward pass
    for expected, found in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, c: m(x[:, :, :-1]), r"pixel_values.*\(batch, 1, 32, 16\).*got \(3, 1, 31, 16\)"),
        (lambda m, x, c: m.decode(), "exactly one"),
        (lambda m, x, c: m.decode(c, latents=m.latents(c)), "exactly one"),
        (lambda m, x, c: m.decode(c[:, :8]), r"codes.*\(batch, 40\).*\(3, 8\)"),
        (lambda m, x, c: m.decode(c + 16), r"codes.*\[0, 16\)"),
        (lambda m, x, c: m.decode(c, num_scales=3), "num_scales.*from 1 to 2, got 3"),
        (lambda m, x, c: m.decode(latents=m.latents(c), num_scales=1), "num_scales.*goes with `codes`"),
        (lambda m, x, c: m.decode(latents=m.latents(c)[:1]), "latents.*2 levels, got 1 of them"),
        (lambda m, x, c: m.decode(latents=m.latents(c)[0]), "latents.*2 levels, got Tensor"),
        (lambda m, x, c: m.decode(latents=m.latents(c)[::-1]), r"latents\[0\].*\(batch, 4, 4, 2\)"),
        (lambda m, x, c: m.code_vectors(c[:, :9]), r"codes.*\(batch, 8 or 40\)"),
        (lambda m, x, c: m.code_vectors(c.float()), "codes.*integers"),
    ],
)
def test_bad_input_is_named(model, images, codes, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, images, codes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels": 0}, "`in_channels` must be an integer, positive|`in_channels` must be at least 1"),
        ({"out_channels": 0.5}, "`out_channels`"),
        ({"image_size": 20}, "`image_size` must be one or two positive multiples of 8.*got 20"),
        ({"image_size": (16, 16, 16)}, "`image_size`.*got"),
        ({"image_size": "16"}, "`image_size`.*got '16'"),
        ({"image_size": (16, 0)}, "`image_size`"),
        ({"strides": ()}, "`strides` must be a list"),
        ({"strides": 4}, "`strides` must be a list.*got 4"),
        ({"strides": (4, 3)}, r"`strides\[1\]` must be a power of two, at least 2, got 3"),
        ({"strides": (1,)}, r"`strides\[0\]`"),
        ({"strides": (4.0,)}, r"`strides\[0\]`"),
        ({"base_channels": 1}, "`base_channels`.*got 1"),
        ({"num_res_blocks": -1}, "`num_res_blocks`.*got -1"),
        ({"residual_channels": 0}, "`residual_channels`"),
        ({"latent_channels": "4"}, "`latent_channels`.*got '4'"),
        ({"codebook_size": True}, "`codebook_size`.*got True"),
        ({"normalize_codebook": 1}, "`normalize_codebook` must be true or false"),
        ({"commitment_loss_weight": -0.1}, "`commitment_loss_weight`"),
        ({"codebook_loss_weight": float("nan")}, "`codebook_loss_weight`"),
    ],
    ids=str,
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalVQVAEConfig(**{**TINY, **fields})


def test_configuration_is_that_of_its_file(tmp_path):
    config = HierarchicalVQVAEConfig(**{**TINY, "strides": (8, 2)})
    config.save_pretrained(tmp_path)
    loaded = HierarchicalVQVAEConfig.from_pretrained(tmp_path)
    assert (loaded.image_size, loaded.strides, loaded.patch_nums) == ((32, 16), [8, 2], [[2, 1], [4, 2]])
    assert loaded.to_dict() == config.to_dict()
    assert (config.downsampling_factor, config.num_codebooks, config.num_output_channels) == (8, 2, 1)
    assert HierarchicalVQVAEConfig().patch_nums == [32, 64]
    assert HierarchicalVQVAEConfig(image_size=1024, strides=(8, 2, 2)).patch_nums == [32, 64, 128]
    with pytest.raises(ValueError, match="image_size"):
        HierarchicalVQVAEConfig.from_pretrained(tmp_path, image_size=(32, 17))


def test_the_first_convolution_can_be_replaced():
    model = make_model()
    replacement = torch.nn.Conv2d(1, 4, 4, stride=2, padding=1)
    before, images = model.encode(make_images(model)).features[-1], make_images(model)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement
    assert not torch.allclose(model.encode(images).features[-1], before, atol=0.01)
