# SPDX-License-Identifier: Apache-2.0
"""What the app does with a pipeline, without a page: the same as the pipelines do when they are called."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Timer

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import (
    DIGITS_CHECKPOINT,
    EMOJI_CHECKPOINT,
    ARPipeline,
    PixelCNN,
    PixelCNNConfig,
    VARImg2ImgPipeline,
    VARInpaintPipeline,
    VARPipeline,
    VARTextToImagePipeline,
)
from hf_var.app.demo import Demo, SamplingInputs
from hf_var.app.growing import growing_pictures
from hf_var.scoring import classify, log_likelihood
from pipelines.stacked import image_pipeline, text_pipeline
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline, make_vqvae, seeded


THREE = SamplingInputs(condition=3, guidance_scale=2.0, number=2, seed=5)


@pytest.fixture(scope="module")
def pipe():
    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def demo(pipe):
    return Demo(pipe)


@pytest.fixture(scope="module")
def digit(pipe):
    return pipe(3, generator=seeded(0)).images[0]


def raster_pipeline(**prior):
    vqvae = make_vqvae(patch_nums=(4,), codebook_size=16)
    sizes = {"map_size": 4, "codebook_size": 16, "hidden_size": 16, "num_hidden_layers": 2}
    return ARPipeline(vqvae, PixelCNN(PixelCNNConfig(**sizes, **prior)))


def same(images, others):
    return len(images) == len(others) and all(
        np.array_equal(*pair) for pair in zip(map(np.asarray, images), map(np.asarray, others), strict=True)
    )


def last(frames):
    *_, frame = frames
    return frame


def test_pictures_grow_to_what_the_pipeline_draws(pipe, demo):
    output = pipe(3, guidance_scale=2.0, num_images_per_label=2, generator=seeded(5))
    frames = list(demo.draw(THREE))
    assert same(frames[-1].pictures, output.images)
    progress = pipe.decode_progress(output.codes)
    assert len(frames) == len(progress) + 1
    assert all(same(frame.pictures, images) for frame, images in zip(frames, progress, strict=False))
    assert same([picture for picture, _ in frames[-1].scales], [images[0] for images in progress])
    assert [name for _, name in frames[-1].scales] == ["1 x 1", "1 x 1", "2 x 2", "3 x 3", "4 x 4"]
    assert [len(frame.scales) for frame in frames] == [1, 2, 3, 4, 5, 5]


def test_pictures_of_a_prompt():
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    expected = pipe("a blue apple", guidance_scale=3.0, num_images_per_prompt=2, generator=seeded(1)).images
    demo = Demo(pipe)
    assert demo.reads_texts
    assert same(last(demo.draw(SamplingInputs("a blue apple", 3.0, 2, 1))).pictures, expected)
    with pytest.raises(ValueError, match="prompt must be a text, got '  '"):
        list(demo.draw(SamplingInputs("  ", 3.0, 2, 1)))
    # The picture on the canvas is exactly the one that was drawn, also if it is put there twice.
    canvas = demo.on_canvas(demo.on_canvas(expected[0]))
    assert canvas.size == (512, 512)
    mask = Image.new("L", (512, 512))
    mask.paste(255, (0, 0, 256, 512))
    edited = last(demo.repaint(canvas, mask, True, SamplingInputs("a red heart", 3.0, 1, 0)))
    before, after = np.asarray(expected[0]), np.asarray(edited.pictures[0])
    assert np.array_equal(before[:, 16:], after[:, 16:])
    assert not np.array_equal(before[:, :16], after[:, :16])


def test_repainting_is_that_of_the_pipeline(pipe, demo, digit):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    edit = VARInpaintPipeline.from_pipe(pipe)
    eight = SamplingInputs(8, 2.0, 2, 4)
    for keeps_rest in (True, False):
        options = {"guidance_scale": 2.0, "num_images_per_label": 2, "paste_original": keeps_rest}
        expected = edit(digit, mask, 8, **options, generator=seeded(4)).images
        assert same(last(demo.repaint(digit, mask, keeps_rest, eight)).pictures, expected)


@pytest.mark.parametrize("box", [None, (0, 0, 1, 1)])
def test_a_mask_that_repaints_nothing(demo, digit, box):
    mask = Image.new("L", (16, 16))
    if box is not None:
        mask.paste(255, box)
    with pytest.raises(ValueError, match="square of 4 x 4 of its 16 x 16 pixels"):
        list(demo.repaint(digit, mask, True, THREE))


def test_variations_are_those_of_the_pipeline(pipe, demo, digit):
    vary = VARImg2ImgPipeline.from_pipe(pipe)
    expected = vary(digit, 3, 0.5, guidance_scale=2.0, num_images_per_label=2, generator=seeded(5)).images
    frames = list(demo.vary(digit, 0.5, THREE))
    assert same(frames[-1].pictures, expected)
    assert [name for _, name in frames[-1].scales] == ["3 x 3", "4 x 4"]
    with pytest.raises(ValueError, match="strength"):
        list(demo.vary(digit, 1.5, THREE))


def test_likelihoods_and_classes(pipe, demo, digit):
    found = log_likelihood(pipe, digit, 3)
    bits, classes = demo.score(digit, 3)
    assert [name for name, _ in bits] == ["all scales", "1 x 1", "1 x 1", "2 x 2", "3 x 3", "4 x 4"]
    assert bits[0][1] == pytest.approx(-float(found.total) / 31 / np.log(2))
    assert bits[4][1] == pytest.approx(-float(found.per_scale[0, 3]) / 9 / np.log(2))
    assert sum(classes.values()) == pytest.approx(1)
    assert max(classes, key=classes.__getitem__) == classify(pipe, digit).label_names[0] == "3"


def test_likelihoods_of_prompts_and_the_best_of_them():
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    demo = Demo(pipe)
    prompts = ["a red heart", "a green apple"]
    picture = last(demo.draw(SamplingInputs(prompts[0], 3.0, 1, 0))).pictures[0]
    found = log_likelihood(demo.pipe, picture, prompt=prompts[0])
    bits, shares = demo.score(picture, " a red heart\n\na green apple\na red heart")
    assert bits[0][1] == pytest.approx(-float(found.total) / 130 / np.log(2))
    assert list(shares) == prompts
    assert shares["a red heart"] > 0.5
    assert demo.score(picture, "a red heart")[1] is None
    with pytest.raises(ValueError, match="at most 100 prompts, got 101"):
        demo.score(picture, "\n".join(map(str, range(101))))
    for nothing in ("", " \n", None):
        with pytest.raises(ValueError, match="There must be a prompt"):
            demo.score(picture, nothing)


def test_reconstruction(pipe, demo, digit):
    found = demo.reconstruct(digit)
    assert [name for _, name in found] == ["original", "1 x 1", "1 x 1", "2 x 2", "3 x 3", "4 x 4"]
    progress = pipe.decode_progress(pipe.encode_images(digit))
    assert same([picture for picture, _ in found], [digit, *(images[0] for images in progress)])


@pytest.mark.parametrize("condition", [[3, 1], True, 1.5, {"a": 1}])
def test_one_class_at_a_time(demo, condition):
    with pytest.raises(ValueError, match="The class must be one of those that are offered"):
        list(demo.draw(SamplingInputs(condition, 1.0, 1, 0)))


def test_models_without_text_encoders_are_refused():
    with pytest.raises(ValueError, match="must have text encoders"):
        Demo(make_text_pipeline(has_encoders=False))


def test_what_the_pipeline_was_told_stays():
    pipe = make_pipeline()
    pipe.enable_onednn_matmul()
    demo = Demo(pipe)
    assert demo.pipe._prefers_onednn
    assert demo.pipe is not pipe


def test_classes_of_the_same_name_are_told_apart(pipe):
    demo = Demo(pipe)
    demo.pipe = type("Pipe", (), {"id2label": {0: "crane", 1: "tench", 2: "crane"}})()
    assert demo.class_names == {0: "crane (0)", 1: "tench", 2: "crane (2)"}


def test_models_of_raster_order_have_no_edits():
    demo = Demo(raster_pipeline())
    assert demo.inpaint_pipe is None
    assert demo.vary_pipe is None
    frames = list(demo.draw(SamplingInputs(None, 1.0, 2, 0)))
    # A frame after each row, which all belong to one map.
    assert len(frames) == 5
    assert [name for _, name in frames[-1].scales] == ["4 x 4"]
    assert demo.score(frames[-1].pictures[0], None)[0][0][0] == "all scales"
    assert [name for _, name in demo.reconstruct(frames[-1].pictures[0])] == ["original", "4 x 4"]


def test_priors_without_class_dropout_are_not_guided():
    assert not Demo(raster_pipeline(num_labels=3, class_dropout_prob=0.0)).knows_unconditional
    assert Demo(raster_pipeline()).knows_unconditional


def test_an_editing_pipeline_draws_as_well(pipe, demo):
    edit = VARInpaintPipeline.from_pipe(pipe)
    assert same(last(Demo(edit).draw(THREE)).pictures, last(demo.draw(THREE)).pictures)


def test_prompts_of_models_of_raster_order():
    demo = Demo(text_pipeline())
    assert demo.reads_texts
    expected = demo.pipe(prompt="a thin three", guidance_scale=1.0, num_images_per_label=2, generator=seeded(0)).images
    assert same(last(demo.draw(SamplingInputs("a thin three", 1.0, 2, 0))).pictures, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_vqvae, "must be a pipeline such as `VARPipeline`, got VQVAEModel"),
        (partial(make_pipeline, vqvae={"in_channels": 6, "sample_type": "class_map"}), "must make pictures"),
        (partial(make_pipeline, vqvae={"in_channels": 5}), "must make pictures"),
        (image_pipeline, "conditioned on images"),
    ],
)
def test_pipelines_that_the_app_cannot_show(make, message):
    with pytest.raises(ValueError, match=message):
        Demo(make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "x"}, "seed must be an integer from 0 to 4294967295, got 'x'"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"seed": float("nan")}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": True}, "seed"),
        ({"number": 17}, "number of pictures must be an integer from 1 to 16, got 17"),
        ({"number": 10**400}, "number of pictures"),
        ({"number": 0}, "number of pictures"),
        ({"number": [1]}, "number of pictures"),
        ({"guidance_scale": "x"}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"condition": 11}, "11"),
    ],
)
def test_inputs_out_of_range(demo, change, message):
    values = {"condition": 3, "guidance_scale": 2.0, "number": 1, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        list(demo.draw(SamplingInputs(**values)))


def test_numbers_of_a_browser(demo):
    assert same(last(demo.draw(SamplingInputs(3, 2, 2.0, 5.0))).pictures, last(demo.draw(THREE)).pictures)


def test_a_file_that_is_no_picture(demo, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"The picture cannot be read: notes\.png: ") as found:
        demo.read_picture(str(path))
    assert str(tmp_path) not in str(found.value)
    with pytest.raises(ValueError, match="no picture yet"):
        demo.read_picture(None)


def test_users_at_once_do_not_mix(demo):
    seeds = range(4)
    inputs = [SamplingInputs(seed, 2.0, 1, seed) for seed in seeds]
    alone = [last(demo.draw(single)).pictures for single in inputs]
    assert not any(same(alone[0], other) for other in alone[1:])
    with ThreadPoolExecutor(len(inputs)) as users:
        together = list(users.map(lambda single: last(demo.draw(single)).pictures, inputs))
    assert all(same(*pair) for pair in zip(alone, together, strict=True))


def test_a_user_who_leaves_stops_the_call(pipe):
    steps, is_left = [], Event()

    def call(callback_on_step_end, **options):
        def show(*arguments):
            steps.append(arguments[1])
            if len(steps) > 1:
                is_left.wait(10)
            return callback_on_step_end(*arguments)

        return pipe(3, generator=seeded(0), callback_on_step_end=show, **options)

    pictures = growing_pictures(call)
    k, _ = next(pictures)
    assert k == 0
    # The second step ends after the iterator began to close.
    Timer(0.3, is_left.set).start()
    pictures.close()
    assert steps == [0, 1]


def test_an_error_of_the_call_comes_out(pipe):
    with pytest.raises(ValueError, match="class_labels"):
        list(growing_pictures(partial(pipe, 99)))
