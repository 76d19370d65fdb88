# SPDX-License-Identifier: Apache-2.0
"""Presets: the arguments that they fill in, and how an evaluation states that it differs from them."""

import pytest

from hf_var.evaluation.generate import image_label, image_seed
from hf_var.evaluation.protocol import EvaluationConfig, SamplingConfig
from hf_var.pipelines.options import SAMPLING_DEFAULTS
from hf_var.plain_options import PLAIN_OPTIONS


PUBLISHED = {
    "name": "VIRTUAL_imagenet256_labeled.npz",
    "num_images": 10_000,
    "statistics": ["mu", "sigma", "mu_s", "sigma_s"],
}


def arguments(**given) -> EvaluationConfig:
    return EvaluationConfig(**{"output_dir": "out", "model": "user/var", "preset": "imagenet256", **given})


def test_the_preset_is_the_published_protocol():
    args = arguments()
    resolved = {
        name: getattr(args, name) for name in ("num_images", "guidance_scale", "top_k", "top_p", "temperature")
    }
    assert resolved == {"num_images": 50_000, "guidance_scale": 2.5, "top_k": 900, "top_p": 0.96, "temperature": 1.0}
    assert args.reference.endswith("/256/VIRTUAL_imagenet256_labeled.npz")
    assert args.departures(50_000, PUBLISHED) == []


def test_every_plain_option_of_sampling_is_an_argument():
    defaults = {name: getattr(SamplingConfig(), name) for name in PLAIN_OPTIONS}
    assert defaults == {name: SAMPLING_DEFAULTS[name] for name in PLAIN_OPTIONS}


def test_arguments_override_the_preset_and_are_departures():
    args = arguments(guidance_scale=1.5, num_images=1000)
    assert (args.guidance_scale, args.top_k) == (1.5, 900)
    assert args.departures(1000, PUBLISHED) == [
        "num_images is 1000, the preset has 50000",
        "guidance_scale is 1.5, the preset has 2.5",
    ]


def test_without_a_preset_the_pipeline_decides():
    args = arguments(preset=None)
    assert (args.guidance_scale, args.num_images) == (None, None)
    assert args.departures(10, None) == []


@pytest.mark.parametrize(
    "changed", [{"name": "myVIRTUAL_imagenet256_labeled.npz"}, {"num_images": 20}, {"statistics": ["mu", "sigma"]}]
)
def test_a_reference_that_only_looks_like_the_published_one_is_a_departure(changed):
    (departure,) = arguments(reference="somewhere").departures(50_000, {**PUBLISHED, **changed})
    assert "the reference is not VIRTUAL_imagenet256_labeled.npz" in departure


def test_images_from_elsewhere_are_a_departure_and_counted():
    args = arguments(model=None, samples="samples.npz")
    assert args.departures(20, PUBLISHED) == [
        "num_images is 20, the preset has 50000",
        "the images come from elsewhere, and it is not known how they were sampled",
    ]


def test_seeds_of_two_sets_have_nothing_in_common():
    seeds = [{image_seed(seed, number) for number in range(1000)} for seed in range(3)]
    assert all(len(found) == 1000 for found in seeds)
    assert not seeds[0] & seeds[1]
    assert not seeds[1] & seeds[2]


def test_classes_take_turns():
    assert [image_label(number, 3) for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert image_label(5, 0) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "imagenet"}, "`preset` must be one of imagenet256, imagenet512, got 'imagenet'"),
        ({"num_images": 3}, "`num_images` must be above 3, got 3"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"interpolation": "nearest"}, "`interpolation` must be one of .*lanczos.*, got 'nearest'"),
    ],
)
def test_values_out_of_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changed)


def test_a_preset_is_for_one_kind_of_model():
    arguments().check_preset((256, 256), 1000)
    arguments(preset=None).check_preset((8, 8), 3)
    with pytest.raises(ValueError, match=r"`preset` = 'imagenet256' is for images of \(256, 256\) pixels"):
        arguments().check_preset((512, 512), 1000)
    with pytest.raises(ValueError, match="is for models of 1000 classes, got 10"):
        arguments().check_preset((256, 256), 10)
