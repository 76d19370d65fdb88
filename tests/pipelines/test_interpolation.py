# SPDX-License-Identifier: Apache-2.0
"""Images as codes, and images between two images."""

import numpy
import PIL.Image
import pytest
import torch

from pipelines.tiny import make_pipeline, seeded


def images(number: int = 2) -> torch.Tensor:
    return torch.rand(number, 3, 8, 8, generator=seeded(3))


@pytest.fixture
def codes(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    return pipe([0, 1], generator=seeded(0)).codes, pipe.encode_images(images())


def decoded(pipe, codes) -> torch.Tensor:
    with torch.no_grad():
        return pipe.vqvae.decode(codes).sample / 2 + 0.5


def test_codes_of_images(pipe):
    with torch.no_grad():
        expected = pipe.vqvae.encode(images() * 2 - 1).codes
    assert torch.equal(pipe.encode_images(images()), expected)
    assert torch.equal(pipe.encode_images(list(images().permute(0, 2, 3, 1).numpy())), expected)
    assert torch.equal(pipe.encode_images(images()[0]), expected[:1])


def test_the_ends_of_the_way_are_the_images(pipe, codes):
    way = pipe.interpolate(*codes, output_type="pt")
    assert len(way) == 5
    for found, expected in ((way[0], codes[0]), (way[-1], codes[1])):
        assert torch.equal(found, decoded(pipe, expected))
    steps = torch.stack(way).diff(dim=0).abs().mean(dim=(1, 2, 3, 4))
    assert (steps > 0.01).all()


def test_latents_lie_on_a_line(pipe, codes):
    ends = [pipe.interpolate(*codes, weights=[weight], output_type="latent")[0] for weight in (0, 1)]
    with torch.no_grad():
        expected = pipe.vqvae.encode(images() * 2 - 1).latents
    torch.testing.assert_close(ends[1], expected)
    weights = [0.3, -0.5, 1.5, numpy.float32(0.7)]
    for weight, found in zip(weights, pipe.interpolate(*codes, weights=weights, output_type="latent"), strict=True):
        torch.testing.assert_close(found, (1 - weight) * ends[0] + weight * ends[1])


@pytest.mark.parametrize("num_scales", range(4))
def test_coarse_scales_of_one_and_fine_scales_of_the_other(pipe, codes, num_scales):
    mixed = pipe.mix_scales(*codes, num_scales, output_type="latent")
    first, second = map(pipe.vqvae.running_latents, codes)
    zero = torch.zeros_like(first[0])
    coarse = first[num_scales - 1] if num_scales > 0 else zero
    fine = second[-1] - (second[num_scales - 1] if num_scales > 0 else zero)
    torch.testing.assert_close(mixed, coarse + fine)
    if num_scales in (0, 3):
        assert torch.equal(
            pipe.mix_scales(*codes, num_scales, output_type="pt"), decoded(pipe, codes[num_scales == 0])
        )


def test_forms_of_the_images(pipe, codes):
    for call in (lambda kind: pipe.interpolate(*codes, [0.5], kind)[0], lambda kind: pipe.mix_scales(*codes, 2, kind)):
        pil, array, tensor = call("pil"), call("np"), call("pt")
        assert [image.size for image in pil] == [(8, 8)] * 2
        assert isinstance(pil[0], PIL.Image.Image)
        numpy.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        assert not tensor.requires_grad


def test_bad_input(pipe, codes):
    first, second = codes
    for call in (pipe.interpolate, lambda *pair: pipe.mix_scales(*pair, 1)):
        with pytest.raises(ValueError, match=r"`codes` must be integers of the shape \(batch, 21\), got .*\(2, 20\)"):
            call(first[:, 1:], second)
        with pytest.raises(ValueError, match=r"`other_codes` must be integers of the shape .*got torch.float32"):
            call(first, second.float())
        with pytest.raises(ValueError, match="`other_codes` must be those of as many images as `codes`, 2, got 1"):
            call(first, second[:1])
        with pytest.raises(ValueError, match=r"`codes` must be in \[0, 32\)"):
            call(first + 32, second)
    with pytest.raises(ValueError, match="`weights` must be finite numbers, got nan"):
        pipe.interpolate(first, second, [0.0, float("nan")])
    with pytest.raises(ValueError, match="`output_type` must be"):
        pipe.interpolate(first, second, output_type="jpg")
    for number in (-1, 4, 1.0):
        with pytest.raises(ValueError, match=f"`num_scales` must be a number of scales from 0 to 3, got {number}"):
            pipe.mix_scales(first, second, number)


def test_offloaded_models_come_back(pipe, codes):
    expected = pipe.interpolate(*codes, output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    calls = (
        lambda: pipe.encode_images(images()),
        lambda: pipe.interpolate(*codes),
        lambda: pipe.mix_scales(*codes, 1),
    )
    for call in calls:
        before = pipe.vqvae._hf_hook
        call()
        # Sent away at the end, which renews the hooks.
        assert pipe.vqvae._hf_hook is not before
    assert torch.equal(torch.stack(pipe.interpolate(*codes, output_type="pt")), torch.stack(expected))


def test_a_tokenizer_in_training_gives_the_codes_of_evaluation():
    pipe = make_pipeline(vqvae={"dropout": 0.5})
    expected = pipe.encode_images(images())
    pipe.vqvae.train()
    assert torch.equal(pipe.encode_images(images()), expected)
    assert pipe.vqvae.training
