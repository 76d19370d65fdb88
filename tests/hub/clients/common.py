# SPDX-License-Identifier: Apache-2.0
"""What the clients share: how they draw, and that two drawings are the same."""

from pathlib import Path

import numpy
import torch


def draw(pipe) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Codes and images for two names and no class at all."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipe(["cat", "owl", None], generator=generator, output_type="np")
    codes = output.codes.numpy()
    assert len(numpy.unique(codes)) > 5, "the drawing has too few codes to tell two pipelines apart"
    assert output.images.std() > 0.02, "the drawing is grey"
    return codes, output.images


def save_drawing(drawing: tuple[numpy.ndarray, numpy.ndarray], path: Path) -> None:
    codes, images = drawing
    numpy.savez(path, codes=codes, images=images)


def assert_draws(pipe, path: Path) -> None:
    codes, images = draw(pipe)
    expected = numpy.load(path)
    numpy.testing.assert_array_equal(codes, expected["codes"])
    numpy.testing.assert_array_equal(images, expected["images"])
