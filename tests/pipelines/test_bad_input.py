# SPDX-License-Identifier: Apache-2.0
"""Arguments out of range: each error names the argument, the value and what would be right. Labels: test_labels.py."""

import re

import numpy
import pytest
import torch

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VARPipeline
from pipelines.tiny import make_transformer, make_vqvae, seeded


NAN, INFINITY = float("nan"), float("inf")


def bad(name: str, message: str, *values) -> list:
    # Without addresses, which differ between the processes that share the tests.
    texts = [re.sub(r" at 0x\w+", "", repr(value)) for value in values]
    return [pytest.param(name, value, message, id=f"{name}={text}") for value, text in zip(values, texts, strict=True)]


CASES = [
    *bad(
        "guidance_scale",
        r"must be a finite number, 1 for no guidance, or a callable",
        NAN,
        INFINITY,
        -INFINITY,
        "2.5",
        True,
    ),
    *bad("guidance_scale", r"must be a finite number, 1 for no guidance, or a callable", [2.5], torch.tensor(2.5), 1j),
    *bad("top_k", r"must be from 1 to codebook_size=32, 0 for all codes or `None` for the default, got", 33, -1, 900),
    *bad("top_k", r"must be from 1 to codebook_size=32, .*got", 1.0, "5", True, NAN, numpy.float64(5)),
    *bad(
        "top_p",
        r"must be in \[0, 1\], where 0 and 1 mean all codes, got",
        -0.1,
        1.1,
        96,
        NAN,
        "0.9",
        True,
        [0.9, 0.9, 2],
    ),
    *bad("top_p", r"must be one value or 3, one per scale, got", [0.9]),
    *bad("temperature", r"must be a number above 0, got .*greedy choice is `top_k=1`", 0, 0.0, -1.0, NAN, INFINITY),
    *bad("temperature", r"must be a number above 0, got", "1", True),
    *bad("num_images_per_label", r"must be (an integer, )?at least 1, got", 0, -1, 1.0, True, "2", NAN),
    *bad("output_type", r"must be 'pil', 'np', 'pt' or 'latent', got", "jpg", None, "PIL", "tensor"),
    *bad("generator", r"must be one generator or 2, one per image, got", [], [seeded()], [seeded()] * 3),
    *bad("generator", r"must be a `torch.Generator`.*got", 0, "seed", [None, None], [seeded(), 1], (seeded(),) * 2),
    *bad(
        "callback_on_step_end_tensor_inputs",
        r"must be among \['latents', 'images'\], got",
        ["codes"],
        ["latents", "x"],
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), CASES)
def test_argument_out_of_range(pipe, name, value, message):
    calls = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=message) as caught:
        pipe([0, 1], **{name: value})
    text = str(caught.value)
    assert f"`{name}`" in text
    # The value itself, or the number of generators.
    assert repr(value) in text or isinstance(value, (list, tuple))
    assert calls == []  # before anything is computed


@pytest.mark.parametrize("name", ["guidance_scale", "top_p", "temperature"])
def test_settings_of_the_pipeline_are_checked(pipe, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        VARPipeline(**pipe.components, **{name: NAN})


def test_number_of_generators_counts_images_not_labels(pipe):
    with pytest.raises(ValueError, match="`generator` must be one generator or 6, one per image, got 2"):
        pipe([0, 1], num_images_per_label=3, generator=[seeded(), seeded()])


def test_numbers_of_numpy_are_numbers(pipe):
    settings = {"guidance_scale": 2.0, "top_k": 5, "top_p": 0.5, "temperature": 1.5, "num_images_per_label": 2}
    expected = pipe(0, generator=seeded(), output_type="pt", **settings)
    kinds = {float: numpy.float32, int: numpy.int64}
    settings = {name: kinds[type(value)](value) for name, value in settings.items()}
    output = pipe(0, generator=seeded(), output_type="pt", **settings)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)


@pytest.mark.parametrize(
    ("field", "ours", "theirs"),
    [
        ("codebook_size", 64, 32),
        ("latent_channels", 8, 4),
        ("patch_nums", (1, 3, 4), (1, 2, 4)),
        ("patch_nums", (1, 2), (1, 2, 4)),
        ("patch_nums", (1, 2, (4, 5)), (1, 2, 4)),
    ],
)
def test_components_that_do_not_belong_together(field, ours, theirs):
    message = (
        rf"`transformer` and `vqvae` do not belong together: {field} is .* in the transformer and .* in the vqvae"
    )
    with pytest.raises(ValueError, match=message):
        VARPipeline(make_transformer(**{field: ours}), make_vqvae(**{field: theirs}))


def test_equal_schedules_in_other_words_belong_together():
    VARPipeline(make_transformer(patch_nums=(1, [2, 2], 4)), make_vqvae(patch_nums=[[1, 1], 2, (4, 4)]))


def test_blocks_of_other_sizes_are_refused():
    transformer = make_transformer(block_sizes=[1, 2, 2, 16])
    with pytest.raises(
        ValueError,
        match=r"`transformer` must predict a whole scale or a single token at a time, got block_sizes=\[1, 2",
    ):
        VARPipeline(transformer, make_vqvae())
    # One block per scale in so many words is no raster.
    VARPipeline(make_transformer(block_sizes=[1, 4, 16]), make_vqvae())


def test_wrong_components_are_named(pipe):
    with pytest.raises(ValueError, match="`transformer` must be a model with a VARConfig, got VQVAEModel"):
        VARPipeline(transformer=pipe.vqvae, vqvae=pipe.transformer)
    with pytest.raises(ValueError, match="`vqvae` must be a model with a VQVAEConfig, got str"):
        VARPipeline(transformer=pipe.transformer, vqvae="user/vqvae")
    with pytest.raises(ValueError, match="`vqvae` must be a model with a VQVAEConfig, got NoneType"):
        VARPipeline(transformer=pipe.transformer, vqvae=None)
    # Without running latents there are no inputs of a scale.
    config = HierarchicalVQVAEConfig(image_size=8, base_channels=4, latent_channels=4, codebook_size=32)
    with pytest.raises(ValueError, match="`vqvae` must be a model with a VQVAEConfig, got HierarchicalVQVAEModel"):
        VARPipeline(transformer=pipe.transformer, vqvae=HierarchicalVQVAEModel(config))
