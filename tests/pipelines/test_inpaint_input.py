# SPDX-License-Identifier: Apache-2.0
"""What passes for an image and a mask: kinds, sizes, colours; and what does not."""

import logging

import numpy
import PIL.Image
import pytest
import torch

from hf_var import VARImg2ImgPipeline, VARInpaintPipeline
from pipelines.tiny import make_pipeline, seeded


PICTURE = PIL.Image.fromarray(torch.randint(0, 256, (8, 8, 3), generator=seeded(5), dtype=torch.uint8).numpy())
ARRAY = numpy.asarray(PICTURE, dtype=numpy.float32) / 255
TENSOR = torch.from_numpy(ARRAY).permute(2, 0, 1)
MASK = torch.zeros(8, 8)
MASK[:, 4:] = 1
MASK_PICTURE = PIL.Image.fromarray((MASK.numpy() * 255).astype("uint8"))


def edit(pipe, image=PICTURE, mask=MASK, labels=(0, 1), **settings):
    settings = {"generator": seeded(), "output_type": "pt", **settings}
    return pipe(image, mask, list(labels), **settings)


@pytest.fixture
def pipe() -> VARInpaintPipeline:
    return editor()


def editor(kind=VARInpaintPipeline, **config):
    made = kind.from_pipe(make_pipeline(**config))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def warnings_of_ours(caplog):
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "hf_var" in record.name
    ]


IMAGES = {
    "picture": PICTURE,
    "list of pictures": [PICTURE],
    "array": ARRAY,
    "batch of arrays": ARRAY[None],
    "list of arrays": [ARRAY],
    "array in double precision": ARRAY.astype(numpy.float64),
    "reversed view": ARRAY[::-1].copy()[::-1],
    "tensor": TENSOR,
    "batch of tensors": TENSOR[None],
    "list of tensors": [TENSOR],
    "tuple of tensors": (TENSOR,),
    "tensor with a gradient": TENSOR.clone().requires_grad_(),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_kinds_of_images(pipe, image):
    assert torch.equal(edit(pipe, image).images, edit(pipe).images)


MASKS = {
    "picture": MASK_PICTURE,
    "picture of two values": MASK_PICTURE.convert("1"),
    "picture in colours": MASK_PICTURE.convert("RGB"),
    "list of pictures": [MASK_PICTURE],
    "array": MASK.numpy(),
    "array with a channel": MASK.numpy()[..., None],
    "batch of arrays": MASK.numpy()[None],
    "batch of arrays with a channel": MASK.numpy()[None, ..., None],
    "tensor": MASK,
    "batch of tensors": MASK[None],
    "batch of tensors with a channel": MASK[None, None],
    "list of tensors": [MASK],
    "truth values": MASK.bool(),
    "array of truth values": MASK.bool().numpy(),
    "half precision": MASK.half(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_kinds_of_masks(pipe, mask, warnings_of_ours):
    assert torch.equal(edit(pipe, mask=mask).codes, edit(pipe).codes)
    assert warnings_of_ours() == []


def test_lists_may_mix_kinds_and_sizes(pipe):
    large = PICTURE.resize((16, 16), PIL.Image.Resampling.NEAREST)
    together = edit(pipe, [PICTURE, large, TENSOR], [MASK, MASK_PICTURE, MASK.numpy()], [0, 0, 0], top_k=1)
    assert torch.equal(together.codes[:1], edit(pipe, labels=[0], top_k=1).codes)
    assert torch.equal(together.codes[0], together.codes[2])


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (5, 7), (30, 10), (1, 1)])
def test_images_and_masks_of_any_size_are_resized(pipe, size):
    width, height = size
    picture = PICTURE.resize(size, PIL.Image.Resampling.BICUBIC)
    as_tensor = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255
    for image, other in ((picture, picture.resize((8, 8), PIL.Image.Resampling.LANCZOS)), (as_tensor, None)):
        if other is None:
            other = torch.nn.functional.interpolate(as_tensor[None], size=(8, 8))
        assert torch.equal(edit(pipe, image).images, edit(pipe, other).images)
    mask = torch.zeros(height, width)
    mask[:, width // 2 :] = 1
    output = edit(pipe, mask=mask)
    if width % 2 == 0:
        assert torch.equal(output.codes, edit(pipe).codes)


def test_images_that_are_not_square():
    pipe = editor(patch_nums=((1, 1), (1, 2), (2, 4)))
    assert pipe.vqvae.config.image_size == (4, 8)
    mask = torch.zeros(4, 8)
    mask[:, 4:] = 1
    output = edit(pipe, mask=mask)
    assert output.images.shape == (2, 3, 4, 8)
    codes = pipe.encode_images(PICTURE)
    assert torch.equal(
        output.codes[:, 3:].view(2, 2, 4)[:, :, :2], codes[:, 3:].view(1, 2, 4)[:, :, :2].expand(2, -1, -1)
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_take_the_mode_of_the_tokenizer(mode, channels):
    pipe = editor(vqvae={"in_channels": channels})
    picture = PICTURE.convert(mode)
    expected = numpy.asarray(picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]), dtype=numpy.float32) / 255
    assert torch.equal(edit(pipe, picture).images, edit(pipe, expected.reshape(8, 8, channels)).images)


def test_tensors_of_four_channels_are_images_and_no_latents():
    pipe = editor(vqvae={"in_channels": 4})
    image = torch.rand(4, 8, 8, generator=seeded(1))
    with torch.no_grad():
        expected = pipe.vqvae.encode(image[None] * 2 - 1).codes
    assert torch.equal(pipe.encode_images(image), expected)


def test_grey_arrays_need_no_channel():
    pipe = editor(vqvae={"in_channels": 1})
    grey = torch.rand(2, 8, 8, generator=seeded(1))
    expected = edit(pipe, grey[:, None]).codes
    for image in (grey, grey.numpy(), grey.numpy()[..., None], list(grey), [grey[0].numpy()[..., None], grey[1:]]):
        assert torch.equal(edit(pipe, image).codes, expected)


def test_inputs_are_not_changed(pipe):
    image, mask = TENSOR.clone(), MASK * 0.7
    edit(pipe, image, mask, paste_original=True)
    edit(pipe, image.numpy().transpose(1, 2, 0), mask.numpy(), paste_original=True)
    assert torch.equal(image, TENSOR)
    assert torch.equal(mask, MASK * 0.7)


@pytest.mark.parametrize("as_picture", [False, True])
def test_shades_of_grey_are_cut_off_with_a_warning(pipe, as_picture, warnings_of_ours):
    shades = MASK * 0.4 + 0.3  # 0.3 and 0.7
    if as_picture:
        shades = PIL.Image.fromarray((shades.numpy() * 255).astype("uint8"))
    assert torch.equal(edit(pipe, mask=shades).codes, edit(pipe).codes)
    (warning,) = warnings_of_ours()
    assert "`mask_image` is not black and white" in warning


def test_masks_too_thin_for_a_token_are_told(pipe, warnings_of_ours):
    mask = torch.zeros(8, 8)
    mask[0, 0] = 1
    output = edit(pipe, mask=mask)
    (warning,) = warnings_of_ours()
    assert "`mask_image` covers no token by half" in warning
    assert "2x2 pixels" in warning
    assert torch.equal(output.codes, pipe.encode_images(PICTURE).expand(2, -1))
    edit(pipe, mask=torch.zeros(8, 8))
    assert len(warnings_of_ours()) == 1


BAD_IMAGES = {
    "integers": (ARRAY.astype("uint8"), r"must be floating-point numbers in \[0, 1\], or a picture, got torch.uint8"),
    "integer tensor": (TENSOR.long(), r"must be floating-point numbers in \[0, 1\], or a picture, got torch.int64"),
    "truth values": (TENSOR > 0.5, "must be floating-point numbers .* got torch.bool"),
    "below zero": (TENSOR * 2 - 1, r"must be in \[0, 1\], got values from -"),
    "up to 255": (TENSOR * 255, r"must be in \[0, 1\], got values from .* to 255"),
    "not a number": (TENSOR * float("nan"), r"must be in \[0, 1\], got values from nan"),
    "text": ("picture.png", "must be a picture, an array, a tensor or a list of these, got str"),
    "nothing": (None, "must be a picture, an array, a tensor or a list of these, got NoneType"),
    "list with nothing": ([PICTURE, None], "must be a picture, an array, a tensor or a list of these, got NoneType"),
    "empty list": ([], "must be at least one image, got none"),
    "empty batch": (TENSOR[None][:0], r"must have the shape \(batch, 3, height, width\).*got \(0, 3, 8, 8\)"),
    "one channel": (TENSOR[:1], r"must have the shape \(batch, 3, height, width\).*got \(1, 8, 8\)"),
    "two dimensions": (TENSOR[0], r"must have the shape \(batch, 3, height, width\).*got \(8, 8\)"),
    "channels first": (TENSOR.numpy(), r"must have the shape \(batch, height, width, 3\).*got \(3, 8, 8\)"),
    "channels last": (torch.from_numpy(ARRAY), r"must have the shape \(batch, 3, height, width\).*got \(8, 8, 3\)"),
    "five dimensions": (TENSOR[None, None], r"must have the shape .*got \(1, 1, 3, 8, 8\)"),
    "objects": (numpy.array([[None]]), r"must be numbers in \[0, 1\], got an array of object"),
}


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
@pytest.mark.parametrize("kind", [VARInpaintPipeline, VARImg2ImgPipeline])
def test_bad_images(kind, image, message):
    pipe = editor(kind)
    with pytest.raises(ValueError, match=f"`image` {message}"):
        pipe(*([image, MASK] if kind is VARInpaintPipeline else [image]))
    with pytest.raises(ValueError, match=f"`image` {message}"):
        pipe.encode_images(image)


BAD_MASKS = {
    "colours": (TENSOR[None], r"must have the shape \(batch, 1, height, width\).*got \(1, 3, 8, 8\)"),
    "integers": (MASK.long(), "must be floating-point numbers .* got torch.int64"),
    "up to 255": (MASK * 255, r"must be in \[0, 1\], got values from 0 to 255"),
    "nothing": (None, "must be a picture, an array, a tensor or a list of these, got NoneType"),
}


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_bad_masks(pipe, mask, message):
    with pytest.raises(ValueError, match=f"`mask_image` {message}"):
        edit(pipe, mask=mask)


def test_pictures_have_no_mode_for_other_channels():
    pipe = editor(vqvae={"in_channels": 5, "out_channels": 3})
    with pytest.raises(ValueError, match="`image` must be arrays or tensors for 5 channels, got a picture"):
        edit(pipe)
    image = torch.rand(5, 8, 8, generator=seeded(1))
    assert edit(pipe, image).images.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="`paste_original` needs a tokenizer that returns the 5 channels .* got 3"):
        edit(pipe, image, paste_original=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feather_width": 2}, "`feather_width` = 2 needs `paste_original=True`"),
        ({"paste_original": True, "feather_width": -1}, "`feather_width` must be an integer of at least 0, got -1"),
        ({"paste_original": True, "feather_width": 0.5}, "`feather_width` must be an integer of at least 0, got 0.5"),
        ({"paste_original": True, "output_type": "latent"}, "`paste_original` needs images, got output_type='latent'"),
        ({"output_type": "jpg"}, "`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"),
        ({"top_k": 33}, "`top_k` must be from 1 to codebook_size=32"),
        ({"num_images_per_label": 0}, "`num_images_per_label` must be at least 1, got 0"),
        ({"generator": [seeded()]}, "`generator` must be one generator or 2, one per image, got 1"),
        ({"labels": [0, 5, 6]}, r"`class_labels` must be in \[0, 5\)"),
        ({"image": [PICTURE] * 3}, "`image` and `mask_image` and `class_labels` must be as many.*got 3 and 1 and 2"),
        ({"mask": [MASK] * 3}, "`image` and `mask_image` and `class_labels` must be as many.*got 1 and 3 and 2"),
        ({"class_embeds": torch.zeros(1, 32)}, "Pass one of `class_labels` and `class_embeds`, not both"),
        ({"num_candidates": 2}, "`num_candidates` above 1 and `score_fn` go together"),
        ({"callback_on_step_end_tensor_inputs": ["codes"]}, "must be among"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_drawn(pipe, settings, message):
    calls = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=message):
        edit(pipe, **settings)
    assert calls == []
