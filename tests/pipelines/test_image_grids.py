# SPDX-License-Identifier: Apache-2.0
"""Strips and animations from coarse to fine."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from hf_var.pipelines.image_grids import progress_strip, save_progress_gif
from pipelines.tiny import make_pipeline, seeded


@pytest.fixture
def progress(pipe):
    """Of two images of 8x8 pixels after each of three scales."""
    return pipe.decode_progress(pipe([0, 1], generator=seeded()).codes)


def pixels(image):
    return np.asarray(image.convert("RGB"))


def enlarged(image, factor=8):
    return pixels(image).repeat(factor, axis=0).repeat(factor, axis=1)


def test_a_strip_has_a_row_per_image_and_a_column_per_scale(progress):
    strip = pixels(progress_strip(progress))
    assert strip.shape == (2 * 64, 3 * 64, 3)
    for scale, images in enumerate(progress):
        for row, image in enumerate(images):
            found = strip[64 * row : 64 * (row + 1), 64 * scale : 64 * (scale + 1)]
            assert np.array_equal(found, enlarged(image))
    assert len({image.tobytes() for images in progress for image in images}) == 6


def test_large_images_keep_their_size():
    images = [[Image.new("L", (150, 100), level)] for level in (0, 128, 255)]
    strip = progress_strip(images)
    assert strip.size == (450, 100)
    assert [strip.getpixel((x, 50)) for x in (0, 150, 449)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_an_animation_has_a_frame_per_scale_and_lingers_on_the_last(progress, tmp_path):
    path = tmp_path / "progress.gif"
    save_progress_gif(progress, path, fps=5)
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        frames = [(pixels(frame), frame.info["duration"]) for frame in ImageSequence.Iterator(animation)]
    shown = [sum(duration for frame, duration in frames if near(frame, images)) for images in progress]
    assert shown == [200, 200, 800]


def near(frame, images):
    """Whether a frame shows these images side by side, as far as the 256 colours of a GIF go."""
    expected = np.concatenate([enlarged(image) for image in images], axis=1).astype(int)
    return frame.shape == expected.shape and np.abs(frame.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_transparent_images(channels, tmp_path):
    pipe = make_pipeline(vqvae={"in_channels": channels})
    progress = pipe.decode_progress(pipe([0], generator=seeded()).codes)
    assert progress_strip(progress).mode == "RGB"
    save_progress_gif(progress, tmp_path / "progress.gif")
    with Image.open(tmp_path / "progress.gif") as animation:
        assert animation.size == (64, 64)


def test_wrong_input(progress, tmp_path):
    for wrong in ([], [[], []], [progress[0], progress[1][:1]]):
        with pytest.raises(ValueError, match="`progress` must hold, for each scale, the same number of images"):
            progress_strip(wrong)
        with pytest.raises(ValueError, match="`progress` must hold"):
            save_progress_gif(wrong, tmp_path / "progress.gif")
    with pytest.raises(ValueError, match=r"`path` must end with .gif, got .*progress.png"):
        save_progress_gif(progress, tmp_path / "progress.png")
    with pytest.raises(ValueError, match="`fps` must be an integer of at least 1, got 0"):
        save_progress_gif(progress, tmp_path / "progress.gif", fps=0)
