# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's public methods: shapes, agreement with each other, and what they refuse."""

import numpy as np
import pytest
import torch

from hf_var import VQVAEConfig, VQVAEDecoderOutput, VQVAEEncoderOutput, VQVAEModel, VQVAEOutput


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"channel_multipliers": (1,)},
        {"channel_multipliers": (1, 2)},
        {"channel_multipliers": (1, 1, 2), "num_res_blocks": 2},
        {"channel_multipliers": (2, 1, 3, 2), "last_level_attention": False},
        {"mid_block_attention": False, "last_level_attention": False},
        {"in_channels": 1},
        {"in_channels": 4, "quant_conv_kernel_size": 1},
        {"in_channels": 6, "out_channels": 2},
        {"norm_num_groups": 1, "base_channels": 5, "channel_multipliers": (1, 3)},
        {"norm_num_groups": 8, "dropout": 0.5},
        {"patch_nums": ((1, 2), (3, 5)), "channel_multipliers": (1, 1, 1)},
        {"patch_nums": (4,)},
        {"channel_multipliers": (1, 2, 2), "attention_levels": (1,)},
        {"channel_multipliers": (1, 2, 2), "attention_levels": (0, 2), "mid_block_attention": False},
        {"encoder_out_channels": 12},
    ],
    ids=str,
)
def test_shapes(make_vqvae, make_images, fields):
    model = make_vqvae(**fields)
    config = model.config
    factor = 2 ** (len(config.channel_multipliers) - 1)
    height, width = (4, 4) if "patch_nums" not in fields or fields["patch_nums"] == (4,) else (3, 5)
    assert config.image_size == (factor * height, factor * width)
    output = model(make_images(model))
    assert output.features.shape == output.latents.shape == (3, config.latent_channels, height, width)
    assert output.codes.shape == (3, sum(config.scale_lengths))
    assert output.codes.dtype == torch.int64
    assert output.sample.shape == (3, fields.get("out_channels", config.in_channels), factor * height, factor * width)
    assert output.sample.std() > 0.05
    assert output.loss.shape == ()
    # Every setting changes how many weights there are; attention only where it is asked for.
    attentions = sum(type(module).__name__ == "AttentionBlock" for module in model.modules())
    levels = len(fields.get("attention_levels", [0] * config.last_level_attention))
    assert attentions == 2 * config.mid_block_attention + (2 * config.num_res_blocks + 1) * levels
    for index in range(len(config.channel_multipliers)):
        has_attention = index in config.levels_with_attention
        assert (len(model.encoder.levels[index].attentions) > 0) is has_attention
        assert (len(model.decoder.levels[-1 - index].attentions) > 0) is has_attention
    assert model.encoder(make_images(model)).shape[1] == fields.get("encoder_out_channels", config.latent_channels)


@pytest.fixture(scope="module")
def class_maps():
    """Maps of 5 classes of 8x8 pixels."""
    ids = torch.randint(5, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.one_hot(ids, 5).movedim(-1, 1).float()


@torch.no_grad()
def test_class_maps_have_logits_of_any_size(make_vqvae, class_maps):
    model, images = (make_vqvae(in_channels=5, sample_type=kind) for kind in ("class_map", "image"))
    codes = model.encode(class_maps).codes
    assert torch.equal(codes, images.encode(class_maps).codes)
    logits = model.decode(codes).sample
    assert logits.abs().max() > 1
    assert torch.equal(logits.clamp(-1, 1), images.decode(codes).sample)
    torch.testing.assert_close(logits, model(class_maps).sample, rtol=0, atol=1e-5)
    model.enable_slicing()
    torch.testing.assert_close(model.decode(codes).sample, logits, rtol=0, atol=1e-5)
    assert model.to(torch.bfloat16).decode(codes).sample.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8], ids=str)
def test_class_maps_may_be_ids(make_vqvae, class_maps, dtype):
    model = make_vqvae(in_channels=5, sample_type="class_map")
    ids = class_maps.argmax(dim=1).to(dtype)
    assert torch.equal(model.encode(ids).codes, model.encode(class_maps).codes)
    assert torch.equal(model(ids).sample, model(class_maps).sample)
    for wrong, message in (
        (ids[0], r"`pixel_values` must have the shape \(batch, 8, 8\) if they are ids of 5 classes, got \(8, 8\)"),
        (ids[:, :4], r"got \(3, 4, 8\)"),
        (ids + 1, r"`pixel_values` must be class ids in \[0, 5\), got values from 1 to 5"),
        (ids.bool(), "`pixel_values` must be integers in a tensor, got torch.bool"),
        (ids.tolist(), "`pixel_values` must be integers in a tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(wrong)
    with pytest.raises(ValueError, match="`pixel_values` must be floating-point numbers"):
        make_vqvae(in_channels=5).encode(ids)


@pytest.mark.parametrize(
    "change",
    [
        lambda maps: maps * 2 - 1,
        lambda maps: maps * 0.5,
        lambda maps: torch.zeros_like(maps),
        lambda maps: torch.ones_like(maps),
        lambda maps: torch.full_like(maps, torch.nan),
    ],
    ids=["normalized", "halves", "no class", "all classes", "nan"],
)
@pytest.mark.parametrize("method", ["forward", "encode"])
def test_class_maps_that_are_not_one_hot(make_vqvae, class_maps, method, change):
    model = make_vqvae(in_channels=5, sample_type="class_map")
    with pytest.raises(ValueError, match="`pixel_values` must be one-hot over its 5 channels, 0 and a single 1, got"):
        getattr(model, method)(change(class_maps))


def test_outputs_are_named_and_tuples(vqvae, images, codes):
    output = vqvae(images)
    assert isinstance(output, VQVAEOutput)
    assert [*output.keys()] == ["loss", "sample", "features", "latents", "codes", "quantizer_inputs"]
    values = vqvae(images, return_dict=False)
    assert torch.equal(values[1], output.sample)
    assert isinstance(vqvae.encode(images), VQVAEEncoderOutput)
    assert torch.equal(vqvae.encode(images, return_dict=False)[2], codes)
    assert isinstance(vqvae.decode(codes), VQVAEDecoderOutput)
    assert torch.equal(vqvae.decode(codes, return_dict=False)[0], vqvae.decode(codes).sample)


@torch.no_grad()
def test_methods_agree(vqvae, images):
    encoded, output = vqvae.encode(images), vqvae(images)
    assert torch.equal(output.codes, encoded.codes)
    assert torch.equal(output.features, encoded.features)
    decoded = vqvae.decode(encoded.codes).sample
    assert torch.equal(decoded, vqvae.decode(latents=encoded.latents).sample)
    torch.testing.assert_close(decoded, output.sample.clamp(-1, 1), rtol=0, atol=1e-5)
    assert output.sample.abs().max() > 1 >= decoded.abs().max()


@torch.no_grad()
def test_decode_some_scales(vqvae, codes):
    latents, ends = None, [1, 5, 21]
    for scale, end in enumerate(ends):
        latents, _ = vqvae.next_scale(latents, codes[:, end - vqvae.config.scale_lengths[scale] : end], scale)
        expected = vqvae.decode(latents=latents).sample
        # The scales after the last one may be missing and are not looked at.
        assert torch.equal(vqvae.decode(codes[:, :end], num_scales=scale + 1).sample, expected)
        assert torch.equal(vqvae.decode(codes, num_scales=scale + 1).sample, expected)
    assert torch.equal(expected, vqvae.decode(codes).sample)


@torch.no_grad()
def test_latents_of_codes_are_those_of_stepping_and_encoding(vqvae, images, codes):
    latents, begin = None, 0
    running = vqvae.running_latents(codes)
    for scale, length in enumerate(vqvae.config.scale_lengths):
        latents, _ = vqvae.next_scale(latents, codes[:, begin : begin + length], scale)
        begin += length
        assert torch.equal(running[scale], latents)
        assert torch.equal(vqvae.latents(codes, num_scales=scale + 1), latents)
        assert torch.equal(vqvae.latents(codes[:, :begin], num_scales=scale + 1), latents)
    assert len(running) == 3
    assert torch.equal(vqvae.latents(codes), latents)
    torch.testing.assert_close(latents, vqvae.encode(images).latents, rtol=0, atol=1e-5)


@torch.no_grad()
def test_quantizer_inputs_are_those_of_the_reconstruction(vqvae, images, codes):
    output = vqvae(images)
    inputs = vqvae.quantizer_inputs(output.features)
    assert torch.equal(inputs, output.quantizer_inputs)
    assert torch.equal(vqvae.codebook(inputs), codes)
    # Without errors before, a scale sees what exact vectors leave.
    exact = vqvae.quantizer_inputs(output.features, exact=True)
    latents, _ = vqvae.next_scale(None, exact[:, :1], 0)
    torch.testing.assert_close(exact[:, 1:5], vqvae.scale_inputs(output.features - latents, 1), rtol=0, atol=1e-5)


def test_without_quantization_the_features_are_decoded(vqvae, images):
    output = vqvae(images, quantize=False)
    assert output.codes is None
    assert output.loss == 0
    assert torch.equal(output.features, vqvae(images).features)
    expected = vqvae.decode(latents=output.features).sample
    torch.testing.assert_close(output.sample.clamp(-1, 1), expected, rtol=0, atol=1e-5)


def test_code_vectors_are_set_by_their_codes(make_vqvae):
    vqvae = make_vqvae()
    before = vqvae.codebook.vectors.clone()
    vqvae.codebook.set_vectors(torch.full((2, 4), 9.0), torch.tensor([3, 5]))
    assert (vqvae.codebook.vectors[[3, 5]] == 9).all()
    assert torch.equal(vqvae.codebook.vectors[6:], before[6:])
    vqvae.codebook.set_vectors(before)
    assert torch.equal(vqvae.code_vectors(torch.arange(32)), before)


@torch.no_grad()
@pytest.mark.parametrize("patch_nums", [(1, 2, 4), (4, 4), (4,)])
@pytest.mark.parametrize("normalize_codebook", [False, True])
def test_soft_codes_are_distances_along_the_codes(make_vqvae, make_images, patch_nums, normalize_codebook):
    model = make_vqvae(patch_nums=patch_nums, normalize_codebook=normalize_codebook)
    encoded = model.encode(make_images(model))
    codes, probabilities = model.soft_codes(encoded.features, 0.7, stochastic=False)
    assert torch.equal(codes, encoded.codes)
    assert torch.equal(probabilities.argmax(dim=-1), codes)
    inputs, vectors = model.quantizer_inputs(encoded.features), model.codebook.vectors
    if normalize_codebook:
        inputs, vectors = (torch.nn.functional.normalize(values, dim=-1) for values in (inputs, vectors))
    expected = (-torch.cdist(inputs, vectors).square() / 0.7).softmax(dim=-1)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_drawn_soft_codes_steer_the_later_ones(make_vqvae, make_images):
    model = make_vqvae(patch_nums=(4, 4, 4))
    features = model.encode(make_images(model)).features
    draws = [model.soft_codes(features, 2.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])
    # The first map's probabilities are those of the features themselves, the others' follow from the codes before.
    assert torch.equal(draws[0][1][:, :16], draws[2][1][:, :16])
    assert not torch.allclose(draws[0][1][:, 16:], draws[2][1][:, 16:], atol=0.01)
    codes, probabilities = draws[0]
    latents = model.latents(codes[:, :32], num_scales=2)
    rest = (features - latents).flatten(2).transpose(1, 2)
    expected = (-torch.cdist(rest, model.codebook.vectors).square() / 2).softmax(dim=-1)
    torch.testing.assert_close(probabilities[:, 32:], expected, rtol=0, atol=1e-4)
    # A cold draw is the nearest code, a hot one is any.
    cold, _ = model.soft_codes(features, 1e-6)
    assert torch.equal(cold, model.encode(make_images(model)).codes)
    hot, _ = model.soft_codes(features, 1e6, generator=torch.Generator().manual_seed(0))
    assert len(hot.unique()) > 25


def test_soft_codes_need_a_codebook_and_sound_arguments(vqvae, make_vqvae, images):
    features = vqvae.encode(images).features
    for arguments, message in (
        ((features, 0), "`temperature` must be positive, got 0"),
        ((features, "1"), "`temperature` must be a number, positive, got '1'"),
        ((features, float("nan")), "`temperature` must be a number, positive, got nan"),
        ((features, 1.0, 1), "`stochastic` must be true or false, got 1"),
        ((features, 1.0, True, 3), "`generator` must be a `torch.Generator` or None, got int"),
        ((features[:, :2],), r"`features`.*\(batch, 4, 4, 4\)"),
        ((None,), "`features` must be floating-point numbers in a tensor, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            vqvae.soft_codes(*arguments)
    fsq = VQVAEModel(VQVAEConfig(**{**vqvae.config.to_dict(), "quantizer": "fsq", "fsq_levels": (2, 2, 2, 4)}))
    with pytest.raises(ValueError, match="`quantizer` must be 'vq' for `soft_codes`, got 'fsq'"):
        fsq.soft_codes(features)
    assert not vqvae.soft_codes(features)[1].requires_grad


def test_averages_are_saved_with_the_weights(make_vqvae, tmp_path):
    vqvae = make_vqvae(codebook_averages=True)
    assert not vqvae.codebook.has_averages
    vqvae.codebook.average_hits.fill_(0.123456789)
    vqvae.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = VQVAEModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.codebook.average_hits, torch.full((32,), 0.123456789))
    assert loaded.codebook.has_averages
    loaded.codebook.forget_averages()
    assert not loaded.codebook.has_averages
    make_vqvae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing .*quantizer.codebook.average_hits"):
        VQVAEModel.from_pretrained(tmp_path, codebook_averages=True)


@torch.no_grad()
@pytest.mark.parametrize("patch_nums", [(1, 2, 4), ((1, 2), (2, 2), (3, 4)), (2, 2, 2)])
def test_teacher_forcing_is_stepping(make_vqvae, make_images, patch_nums):
    model = make_vqvae(patch_nums=patch_nums)
    codes = model.encode(make_images(model)).codes
    by_codes, by_vectors, with_codes, with_vectors, begin = [], [], None, None, 0
    for scale, length in enumerate(model.config.scale_lengths):
        part = codes[:, begin : begin + length]
        with_codes, inputs = model.next_scale(with_codes, part, scale)
        by_codes.append(inputs)
        with_vectors, inputs = model.next_scale(with_vectors, model.code_vectors(part), scale)
        by_vectors.append(inputs)
        if inputs is not None:
            assert torch.equal(model.scale_inputs(with_vectors, scale + 1), inputs)
        begin += length
    expected = model.teacher_forcing(codes)
    assert expected.shape == (3, codes.shape[1] - model.config.scale_lengths[0], 4)
    assert torch.equal(torch.cat(by_codes[:-1], dim=1), expected)
    assert torch.equal(torch.cat(by_vectors[:-1], dim=1), expected)
    assert by_codes[-1] is None
    # The last scale's codes are what is predicted last; no input depends on them.
    changed = codes.clone()
    changed[:, -model.config.scale_lengths[-1] :] += 1
    assert torch.equal(model.teacher_forcing(changed % model.config.codebook_size), expected)


@torch.no_grad()
def test_one_scale_throughout(make_vqvae, make_images):
    model = make_vqvae(patch_nums=(4,))
    encoded = model.encode(make_images(model))
    latents, inputs = model.next_scale(None, encoded.codes, 0)
    assert torch.equal(latents, encoded.latents)
    assert inputs is None
    assert model.teacher_forcing(encoded.codes).shape == (3, 0, 4)
    assert torch.equal(model.decode(encoded.codes, num_scales=1).sample, model.decode(encoded.codes).sample)
    with pytest.raises(ValueError, match="`k`"):
        model.scale_inputs(latents, 1)


@torch.no_grad()
def test_mixed_code_vectors(vqvae):
    weights = torch.rand(2, 3, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("bnv,vc->bnc", weights, vqvae.code_vectors(torch.arange(32)))
    torch.testing.assert_close(vqvae.mix_code_vectors(weights), expected, rtol=0, atol=1e-5)
    one_hot = torch.nn.functional.one_hot(torch.tensor([[4, 7]]), 32)
    assert torch.equal(vqvae.mix_code_vectors(one_hot), vqvae.code_vectors(torch.tensor([[4, 7]])))


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        ((1, 3, 8, 12), r"\(1, 3, 8, 12\)"),
        ((1, 3, 16, 16), r"\(1, 3, 16, 16\)"),
        ((1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        ((3, 8, 8), r"\(3, 8, 8\)"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "encode"])
def test_wrong_images(vqvae, method, shape, got):
    with pytest.raises(ValueError, match=r"`pixel_values`.*\(batch, 3, 8, 8\).*" + got):
        getattr(vqvae, method)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.tolist, "must be floating-point numbers in a tensor, got list"),
        (torch.Tensor.numpy, "must be floating-point numbers in a tensor, got ndarray"),
        (lambda images: (images * 127).byte(), r"must be floating-point numbers.*got torch.uint8 of the shape \(3, 3"),
        (
            lambda images: torch.where(images > 0.9, torch.nan, images),
            "must be finite, got [1-9][0-9]* NaN or infinite",
        ),
        (
            lambda images: torch.where(images > 0.9, torch.inf, images),
            "must be finite, got [1-9][0-9]* NaN or infinite",
        ),
    ],
    ids=["list", "array", "bytes", "nan", "infinite"],
)
@pytest.mark.parametrize("method", ["forward", "encode"])
@pytest.mark.parametrize("use_slicing", [False, True])
def test_images_that_are_no_finite_numbers(vqvae, images, monkeypatch, method, change, message, use_slicing):
    monkeypatch.setattr(vqvae, "use_slicing", use_slicing)
    with pytest.raises(ValueError, match=f"`pixel_values` {message}"):
        getattr(vqvae, method)(change(images))


def test_unknown_arguments_are_refused(vqvae, images):
    with pytest.raises(TypeError, match="output_attentions"):
        vqvae(images, output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_codes_of_any_width_are_the_same_codes(vqvae, codes, dtype):
    small = codes.to(dtype)
    assert torch.equal(vqvae.decode(small).sample, vqvae.decode(codes).sample)
    assert torch.equal(vqvae.teacher_forcing(small), vqvae.teacher_forcing(codes))
    assert torch.equal(vqvae.teacher_forcing(small, is_raster=True), vqvae.teacher_forcing(codes, is_raster=True))
    assert torch.equal(vqvae.code_vectors(small), vqvae.code_vectors(codes))
    assert torch.equal(vqvae.next_scale(None, small[:, :1], 0)[0], vqvae.next_scale(None, codes[:, :1], 0)[0])


@torch.no_grad()
def test_scales_are_integers_of_any_library(vqvae, codes):
    assert torch.equal(vqvae.latents(codes, np.int64(2)), vqvae.latents(codes, 2))
    latents = vqvae.latents(codes)
    assert torch.equal(vqvae.scale_inputs(latents, np.int64(2)), vqvae.scale_inputs(latents, 2))
    expected, _ = vqvae.next_scale(None, codes[:, :1], 0)
    assert torch.equal(vqvae.next_scale(None, codes[:, :1], np.uint8(0))[0], expected)


def test_the_first_convolution_can_be_replaced(make_vqvae, make_images):
    model = make_vqvae()
    replacement = torch.nn.Conv2d(3, 8, 3, padding=1)
    before = model(make_images(model)).features
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is model.encoder.conv_in is replacement
    assert not torch.allclose(model(make_images(model)).features, before, atol=0.01)


def codes_of(length, value=0, dtype=torch.int64):
    return torch.full((2, length), value, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `codes` and `latents`"),
        ({"codes": codes_of(21), "latents": torch.zeros(2, 4, 4, 4)}, "exactly one of `codes` and `latents`"),
        ({"codes": codes_of(20)}, r"`codes`.*\(batch, 21\).*\(2, 20\)"),
        ({"codes": codes_of(5)}, r"`codes`.*\(batch, 21\)"),
        ({"codes": codes_of(21)[0]}, r"`codes`.*\(batch, 21\).*\(21,\)"),
        ({"codes": codes_of(21, dtype=torch.float32)}, "`codes` must be integers.*float32"),
        ({"codes": codes_of(21, 32)}, r"`codes` must be in \[0, 32\).*32"),
        ({"codes": codes_of(21, -1)}, r"`codes` must be in \[0, 32\).*-1"),
        ({"codes": codes_of(21), "num_scales": 0}, "`num_scales` must be from 1 to 3, got 0"),
        ({"codes": codes_of(21), "num_scales": 4}, "`num_scales` must be from 1 to 3, got 4"),
        ({"codes": codes_of(4), "num_scales": 2}, r"`codes`.*\(batch, 5 or 21\)"),
        ({"latents": torch.zeros(2, 4, 4, 4), "num_scales": 2}, "`num_scales` goes with `codes`"),
        ({"latents": torch.zeros(2, 4, 2, 2)}, r"`latents`.*\(batch, 4, 4, 4\).*\(2, 4, 2, 2\)"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, r"`latents`.*\(batch, 4, 4, 4\)"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_wrong_decode(vqvae, arguments, message):
    with pytest.raises(ValueError, match=message):
        vqvae.decode(**arguments)


LATENTS = torch.zeros(2, 4, 4, 4)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("next_scale", (LATENTS, codes_of(4), 3), "`k` must be from 0 to 2, got 3"),
        ("next_scale", (LATENTS, codes_of(4), -1), "`k` must be from 0 to 2, got -1"),
        ("next_scale", (LATENTS, codes_of(5), 1), r"`codes`.*\(batch, 4\)"),
        ("next_scale", (LATENTS, codes_of(4, 99), 1), r"`codes` must be in \[0, 32\)"),
        ("next_scale", (LATENTS, torch.zeros(2, 5, 4), 1), r"`code vectors`.*\(batch, 4, 4\)"),
        ("next_scale", (LATENTS, torch.zeros(2, 4, 3), 1), r"`code vectors`.*\(batch, 4, 4\)"),
        ("next_scale", (LATENTS[:, :3], codes_of(4), 1), r"`latents`.*\(batch, 4, 4, 4\)"),
        ("next_scale", (LATENTS, codes_of(4), 1.0), "`k` must be an integer, from 0 to 2, got 1.0"),
        ("next_scale", (LATENTS, codes_of(4), True), "`k` must be an integer, from 0 to 2, got True"),
        ("next_scale", (LATENTS, [[1, 2, 3, 4]], 1), r"`codes` must be integers in a tensor, got list \[\[1, 2"),
        ("next_scale", (LATENTS, codes_of(4, dtype=torch.bool), 1), "`codes` must be integers.*got torch.bool"),
        ("next_scale", (LATENTS[:1], codes_of(4), 1), r"same batch size, got \{'latents': 1, 'codes': 2\}"),
        ("next_scale", (LATENTS, codes_of(4)[:1], 1), r"same batch size, got \{'latents': 2, 'codes': 1\}"),
        ("next_scale", (LATENTS.long(), codes_of(4), 1), "`latents` must be floating-point numbers.*got torch.int64"),
        ("next_scale", ([0.0], codes_of(4), 1), r"`latents` must be floating-point numbers.*got list \[0.0\]"),
        ("scale_inputs", (LATENTS, "1"), "`k` must be an integer, from 1 to 2, got '1'"),
        ("scale_inputs", (None, 1), "`latents` must be floating-point numbers in a tensor, got NoneType None"),
        ("scale_inputs", (LATENTS, 0), "`k` must be from 1 to 2, got 0"),
        ("scale_inputs", (LATENTS, 3), "`k` must be from 1 to 2, got 3"),
        ("scale_inputs", (LATENTS[..., :2], 1), r"`latents`.*\(batch, 4, 4, 4\)"),
        ("latents", (codes_of(5),), r"`codes`.*\(batch, 21\)"),
        ("latents", (codes_of(21), 4), "`num_scales` must be from 1 to 3, got 4"),
        ("latents", (codes_of(21), 2.0), "`num_scales` must be an integer, from 1 to 3, got 2.0"),
        ("latents", (codes_of(21), True), "`num_scales` must be an integer, from 1 to 3, got True"),
        ("latents", (codes_of(21), "2"), "`num_scales` must be an integer, from 1 to 3, got '2'"),
        ("latents", (codes_of(21).tolist(),), "`codes` must be integers in a tensor, got list"),
        ("running_latents", (codes_of(20),), r"`codes`.*\(batch, 21\)"),
        ("running_latents", (codes_of(21, 32),), r"`codes` must be in \[0, 32\)"),
        ("quantizer_inputs", (LATENTS[:, :3],), r"`features`.*\(batch, 4, 4, 4\)"),
        ("quantizer_inputs", (LATENTS.tolist(),), "`features` must be floating-point numbers in a tensor, got list"),
        ("teacher_forcing", (codes_of(21, dtype=torch.bool),), "`codes` must be integers.*got torch.bool"),
        ("teacher_forcing", (codes_of(5),), r"`codes`.*\(batch, 21\)"),
        ("teacher_forcing", (codes_of(21, 32),), r"`codes` must be in \[0, 32\)"),
        ("code_vectors", (codes_of(7, 32),), r"`codes` must be in \[0, 32\)"),
        ("code_vectors", (torch.zeros(7, 4),), r"`codes` must be integers.*got torch.float32 of the shape \(7, 4\)"),
        ("code_vectors", ([1, 2],), r"`codes` must be integers in a tensor, got list \[1, 2\]"),
        ("mix_code_vectors", (torch.tensor(1.0),), r"`weights`.*\(\.\.\., 32\), got torch.float32 of the shape \(\)"),
        ("mix_code_vectors", ([0.5] * 32,), "`weights` must be real numbers in a tensor.*got list"),
        ("mix_code_vectors", (torch.zeros(2, 31),), r"`weights`.*\(\.\.\., 32\)"),
    ],
)
def test_wrong_arguments(vqvae, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(vqvae, method)(*arguments)
