# SPDX-License-Identifier: Apache-2.0
"""In-painting: what is kept, what is drawn, and the pixels at the seam. Bad input: test_inpaint_input.py."""

import inspect

import numpy
import pytest
import torch

from hf_var import VARInpaintPipeline, VARPipeline
from hf_var.pipelines.images import given_tokens
from pipelines.tiny import make_pipeline, seeded


PATCH_NUMS = (1, 2, 3, 4)
LENGTH = 30


@pytest.fixture
def pipe() -> VARInpaintPipeline:
    made = VARInpaintPipeline.from_pipe(make_pipeline(patch_nums=PATCH_NUMS))
    made.set_progress_bar_config(disable=True)
    return made


def images(number: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=seeded(3))


def half_mask(size: int = 8) -> torch.Tensor:
    """Repaints the right half."""
    mask = torch.zeros(size, size)
    mask[:, size // 2 :] = 1
    return mask


def draw(pipe, image=None, mask=None, labels=(0,), seed=0, **settings):
    image = images() if image is None else image
    mask = half_mask() if mask is None else mask
    settings = {"output_type": "pt", "generator": seeded(seed), **settings}
    return pipe(image, mask, list(labels), **settings)


def codes_of(pipe, image) -> torch.Tensor:
    with torch.no_grad():
        return pipe.vqvae.encode(image * 2 - 1).codes


def given(pipe, mask) -> torch.Tensor:
    return given_tokens(mask[None, None], pipe.vqvae.config)[0]


def as_tensor(image, output_type) -> torch.Tensor:
    if output_type == "pt":
        return image.float()
    channels_last = torch.from_numpy(numpy.array(image) / (255 if output_type == "pil" else 1))
    return channels_last.float().permute(2, 0, 1)


def test_signature():
    """Everything that generation takes, under the same name and in the same order."""
    ours, theirs = (
        {name: parameter.default for name, parameter in inspect.signature(kind.__call__).parameters.items()}
        for kind in (VARInpaintPipeline, VARPipeline)
    )
    assert list(ours)[:3] == ["self", "image", "mask_image"]
    assert {name: ours[name] for name in theirs} == theirs
    assert [name for name in ours if name in theirs] == list(theirs)
    assert ours.keys() - theirs.keys() == {"image", "mask_image", "paste_original", "feather_width"}


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_kept_positions_hold_the_codes_of_the_image(pipe, smooth, guidance_scale):
    here = given(pipe, half_mask())
    assert 0 < here.sum() < LENGTH
    expected = codes_of(pipe, images())
    outputs = [draw(pipe, seed=seed, smooth=smooth, guidance_scale=guidance_scale) for seed in range(4)]
    for output in outputs:
        assert torch.equal(output.codes[:, here], expected[:, here])
    drawn = torch.cat([output.codes[:, ~here] for output in outputs])
    assert len(drawn.unique(dim=0)) == 4
    assert not (drawn == expected[:, ~here]).all(dim=1).any()


def test_the_scales_read_what_is_given(pipe):
    """Every drawn code is the most likely one, given the merged codes of all scales before."""
    output = draw(pipe, top_k=1, guidance_scale=1.0, output_type="latent")
    with torch.no_grad():
        logits = pipe.transformer(torch.tensor([0]), pipe.vqvae.teacher_forcing(output.codes)).logits
    drawn = ~given(pipe, half_mask())
    assert torch.equal(output.codes[:, drawn], logits.argmax(-1)[:, drawn])


def test_codes_decode_to_the_images(pipe):
    output = draw(pipe)
    with torch.no_grad():
        decoded = pipe.vqvae.decode(output.codes).sample
    torch.testing.assert_close(decoded / 2 + 0.5, output.images)


@pytest.mark.parametrize("smooth", [False, True])
def test_black_mask_gives_the_reconstruction(pipe, smooth):
    output = draw(pipe, mask=torch.zeros(8, 8), smooth=smooth)
    expected = codes_of(pipe, images())
    assert torch.equal(output.codes, expected)
    with torch.no_grad():
        decoded = pipe.vqvae.decode(expected).sample
    torch.testing.assert_close(decoded / 2 + 0.5, output.images)


def test_under_a_white_mask_the_first_scale_is_still_the_images(pipe):
    output = draw(pipe, mask=torch.ones(8, 8), top_k=1)
    expected = codes_of(pipe, images())
    assert torch.equal(output.codes[:, :1], expected[:, :1])
    generated = VARPipeline.from_pipe(pipe)([0], top_k=1, output_type="pt")
    assert not torch.equal(generated.codes[:, :1], expected[:, :1])
    # From there on nothing is the image's: another one with the same first code makes no difference.
    same_first = (image for image in images(200).split(1) if codes_of(pipe, image)[0, 0] == expected[0, 0])
    other = next(image for image in same_first if not torch.equal(image, images()))
    assert not torch.equal(codes_of(pipe, other), expected)
    assert torch.equal(draw(pipe, image=other, mask=torch.ones(8, 8), top_k=1).codes, output.codes)


@pytest.mark.parametrize(
    ("patch_nums", "num_given"),
    [((4,), 0), ((1,), 1), ((1, 1, 4), 2), (((1, 2), (1, 3), (2, 2), (4, 4)), 5), ((2, 4), 0)],
)
def test_maps_of_up_to_three_tokens_are_always_given(patch_nums, num_given):
    config = make_pipeline(patch_nums=patch_nums).vqvae.config
    here = given_tokens(torch.ones(1, 1, *config.image_size), config)
    assert here.shape == (1, sum(config.scale_lengths))
    assert here.sum() == num_given
    assert here[0, :num_given].all()


def test_a_token_is_drawn_if_half_of_its_pixels_are_white(pipe):
    tokens = given(pipe, half_mask())[-16:].view(4, 4)
    assert torch.equal(tokens, torch.tensor([[True, True, False, False]] * 4))
    for number, kept in ((1, True), (2, False), (3, False)):
        mask = torch.zeros(8, 8)
        mask[[2, 2, 3][:number], [4, 5, 4][:number]] = 1
        tokens = given(pipe, mask)[-16:].view(4, 4)
        assert tokens[1, 2] == kept
        assert tokens.sum() == 15 + kept


def test_coarser_maps_follow_from_the_finest_one(pipe):
    # One column of four is kept: the first of three as well, but of two none, where it is a tie.
    mask = torch.ones(8, 8)
    mask[:, :2] = 0
    here = given(pipe, mask)
    assert here[0]
    assert torch.equal(here[1:5].view(2, 2), torch.tensor([[False, False]] * 2))
    assert torch.equal(here[5:14].view(3, 3), torch.tensor([[True, False, False]] * 3))
    assert torch.equal(here[14:].view(4, 4), torch.tensor([[True, False, False, False]] * 4))


def test_inside_and_outside_of_a_box_are_complements(pipe):
    inside = torch.zeros(8, 8)
    inside[2:6, 2:6] = 1
    tokens = [given(pipe, mask)[-16:] for mask in (inside, 1 - inside)]
    assert torch.equal(tokens[0], ~tokens[1])
    assert tokens[1].sum() == 4


def test_every_image_has_its_own_mask(pipe):
    masks = torch.stack([half_mask(), 1 - half_mask(), torch.zeros(8, 8)])
    generators = [seeded(seed) for seed in range(3)]
    together = draw(pipe, image=images(3), mask=masks, labels=[0, 1, None], generator=generators)
    for index, label in enumerate([0, 1, None]):
        alone = draw(pipe, image=images(3)[index], mask=masks[index], labels=[label], seed=index)
        assert torch.equal(alone.codes[0], together.codes[index])
        torch.testing.assert_close(alone.images[0], together.images[index], rtol=0, atol=1e-4)


def test_single_inputs_serve_all(pipe):
    settings = {"num_images_per_label": 2}
    image, mask = images(2), half_mask().expand(2, 8, 8)
    for few in (
        {"image": image, "mask": half_mask(), "labels": [3]},
        {"image": image, "mask": half_mask(), "labels": [3, 3]},
        {"image": image, "mask": mask, "labels": [3]},
    ):
        several = draw(pipe, generator=[seeded(seed) for seed in range(4)], **settings, **few)
        spelled_out = draw(
            pipe,
            image=image.repeat_interleave(2, dim=0),
            mask=half_mask().expand(4, 8, 8),
            labels=[3] * 4,
            generator=[seeded(seed) for seed in range(4)],
        )
        assert torch.equal(several.codes, spelled_out.codes)
    labels = draw(pipe, image=image[0], labels=[0, 1, None], top_k=1)
    assert torch.equal(
        labels.codes, draw(pipe, image=image[:1].expand(3, -1, -1, -1), labels=[0, 1, None], top_k=1).codes
    )
    unconditional = pipe(image, half_mask(), top_k=1, output_type="pt")
    assert torch.equal(unconditional.codes, draw(pipe, image=image, labels=[None, None], top_k=1).codes)


def test_class_embeddings(pipe):
    embeds = pipe.get_class_embeds([0, 1])
    expected = draw(pipe, image=images(2), labels=[0, 1])
    output = pipe(images(2), half_mask(), class_embeds=embeds, generator=seeded(), output_type="pt")
    assert torch.equal(output.codes, expected.codes)
    output = pipe(images(), half_mask(), class_embeds=embeds, generator=seeded(), output_type="pt")
    assert torch.equal(output.codes, draw(pipe, labels=[0, 1]).codes)


def test_the_best_of_several_edits(pipe):
    def darkness(images, labels):
        return -images.mean(dim=(1, 2, 3))

    best = draw(pipe, num_candidates=6, score_fn=darkness)
    assert darkness(best.images, None) > darkness(draw(pipe).images, None)
    here = given(pipe, half_mask())
    assert torch.equal(best.codes[:, here], codes_of(pipe, images())[:, here])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pasting_keeps_every_black_pixel(pipe, output_type, dtype):
    picture = (images()[0] * 255).round() / 255
    pipe.to(dtype)
    settings = {"image": picture, "output_type": output_type, "top_k": 1}
    plain, pasted = (
        as_tensor(draw(pipe, paste_original=paste, **settings).images[0], output_type) for paste in (False, True)
    )
    tolerance = 0 if output_type == "pil" else 1e-6
    torch.testing.assert_close(pasted[:, :, :4], picture[:, :, :4], rtol=0, atol=tolerance)
    assert (plain[:, :, :4] - picture[:, :, :4]).abs().max() > 0.1


def test_the_original_fades_out_over_the_feather(pipe):
    drawn = draw(pipe).images
    for width in (0, 1, 3, 8):
        pasted = draw(pipe, paste_original=True, feather_width=width).images
        share = torch.tensor([max(0.0, 1 - distance / (width + 1)) for distance in range(1, 5)])
        expected = torch.lerp(drawn[..., 4:], images()[..., 4:], share)
        torch.testing.assert_close(pasted[..., 4:], expected, rtol=0, atol=1e-6)
    # Half a token of 2x2 pixels.
    default, expected = draw(pipe, paste_original=True), draw(pipe, paste_original=True, feather_width=1)
    assert torch.equal(default.images, expected.images)
    assert torch.equal(default.codes, draw(pipe).codes)


def test_pasting_repeats_images_and_masks(pipe):
    masks = torch.stack([half_mask(), 1 - half_mask()])
    settings = {"paste_original": True, "feather_width": 0, "num_images_per_label": 2}
    pasted = draw(pipe, image=images(2), mask=masks, labels=[0, 1], **settings).images
    for index in range(4):
        kept = masks[index // 2].expand(3, 8, 8) == 0
        torch.testing.assert_close(pasted[index][kept], images(2)[index // 2][kept], rtol=0, atol=1e-6)


def test_pasting_under_extreme_masks(pipe):
    settings = {"paste_original": True, "feather_width": 2}
    black = draw(pipe, mask=torch.zeros(8, 8), **settings).images
    torch.testing.assert_close(black, images(), rtol=0, atol=1e-6)
    assert torch.equal(draw(pipe, mask=torch.ones(8, 8), **settings).images, draw(pipe, mask=torch.ones(8, 8)).images)
