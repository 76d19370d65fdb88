# SPDX-License-Identifier: Apache-2.0
"""Images as PNG files and as one file of arrays: whole, in order, and nothing half written under a final name."""

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_var.evaluation.image_files import png_path, read_png, write_npz, write_png


def make_images(number: int, size: tuple[int, int] = (6, 4)) -> np.ndarray:
    """Noise of shape `(number, 3, height, width)`."""
    return np.random.default_rng(0).integers(0, 256, (number, 3, *size), dtype=np.uint8)


def write_images(folder: Path, images: np.ndarray) -> None:
    # Not in the order of their numbers, as several processes would.
    for index in reversed(range(len(images))):
        write_png(png_path(folder, index), images[index])


def test_names_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    names = [png_path(tmp_path, index).name for index in (0, 9, 10, 99_999, 100_000)]
    assert names == sorted(names)
    assert names[:2] == ["000000.png", "000009.png"]


def test_pixels_are_kept(tmp_path: Path) -> None:
    (image,) = make_images(1)
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(read_png(tmp_path / "a.png", (6, 4)), image)
    # Seen by another reader, too: the first channel is red.
    assert Image.open(tmp_path / "a.png").getpixel((3, 1)) == tuple(image[:, 1, 3])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch) -> None:
    first, second = make_images(2)
    write_png(tmp_path / "a.png", first)

    def fail(*_) -> None:
        raise OSError("killed")

    with monkeypatch.context() as context:
        context.setattr("os.replace", fail)
        with pytest.raises(OSError, match="killed"):
            write_png(tmp_path / "a.png", second)
        with pytest.raises(OSError, match="killed"):
            write_png(tmp_path / "b.png", second)
    assert np.array_equal(read_png(tmp_path / "a.png", (6, 4)), first)
    assert [path.name for path in tmp_path.glob("*.png")] == ["a.png"]
    write_png(tmp_path / "a.png", second)
    assert np.array_equal(read_png(tmp_path / "a.png", (6, 4)), second)


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "flipped":
        content[len(content) // 2] ^= 4
    elif kind == "empty":
        content = bytearray()
    elif kind == "text":
        content = bytearray(b"no image")
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_png_is_found(kind: str, tmp_path: Path) -> None:
    images = make_images(5, size=(32, 32))
    write_images(tmp_path, images)
    damage(png_path(tmp_path, 3), kind)
    with pytest.raises(ValueError, match=r"000003\.png' is damaged .* Delete it and run the command again"):
        read_png(png_path(tmp_path, 3), (32, 32))
    with pytest.raises(ValueError, match=r"000003\.png' is damaged"):
        write_npz(tmp_path / "samples.npz", tmp_path, 5, (32, 32))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".png"] == []


def test_every_flipped_bit_of_the_pixels_is_found(tmp_path: Path) -> None:
    (image,) = make_images(1, size=(16, 16))
    path = tmp_path / "a.png"
    write_png(path, image)
    content = path.read_bytes()
    # From behind the header to before the checksum of the last chunk.
    for place in np.random.default_rng(0).integers(60, len(content) - 20, 50):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="is damaged"):
            read_png(path, (16, 16))


def test_missing_and_foreign_images_are_named(tmp_path: Path) -> None:
    images = make_images(3)
    write_images(tmp_path, images)
    with pytest.raises(ValueError, match=r"000003\.png' is missing"):
        write_npz(tmp_path / "samples.npz", tmp_path, 4, (6, 4))
    with pytest.raises(ValueError, match=r"000000\.png' must be a colour image of 4x6 pixels, .*\(6, 4, 3\)"):
        write_npz(tmp_path / "samples.npz", tmp_path, 3, (4, 6))
    Image.new("L", (4, 6)).save(png_path(tmp_path, 1))
    with pytest.raises(ValueError, match=r"000001\.png' must be a colour image"):
        write_npz(tmp_path / "samples.npz", tmp_path, 3, (6, 4))
    Image.new("RGB", (4, 6)).save(png_path(tmp_path, 1), "JPEG")
    with pytest.raises(ValueError, match=r"000001\.png' is damaged"):
        read_png(png_path(tmp_path, 1), (6, 4))
    assert not (tmp_path / "samples.npz").exists()


def test_npz_has_the_images_in_order_and_is_always_the_same(tmp_path: Path) -> None:
    # More than one block of images.
    images = make_images(150)
    write_images(tmp_path, images)
    write_npz(tmp_path / "samples.npz", tmp_path, 150, (6, 4))
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
        stored = file["arr_0"]
    assert stored.dtype == np.uint8
    assert np.array_equal(stored, images.transpose(0, 2, 3, 1))
    content = (tmp_path / "samples.npz").read_bytes()
    write_npz(tmp_path / "again.npz", tmp_path, 150, (6, 4))
    assert (tmp_path / "again.npz").read_bytes() == content
    # The time of writing is no part of it, which two files made in a row would not tell.
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.getinfo("arr_0.npy").date_time == (1980, 1, 1, 0, 0, 0)


def test_a_failing_npz_leaves_the_one_before(tmp_path: Path) -> None:
    images = make_images(3)
    write_images(tmp_path, images)
    write_npz(tmp_path / "samples.npz", tmp_path, 3, (6, 4))
    content = (tmp_path / "samples.npz").read_bytes()
    png_path(tmp_path, 2).unlink()
    with pytest.raises(ValueError, match="is missing"):
        write_npz(tmp_path / "samples.npz", tmp_path, 3, (6, 4))
    assert (tmp_path / "samples.npz").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 3


def test_npz_is_never_whole_in_memory(tmp_path: Path) -> None:
    (image,) = make_images(1, size=(64, 64))
    for index in range(400):
        write_png(png_path(tmp_path, index), image)
    whole = 400 * image.nbytes
    tracemalloc.start()
    try:
        write_npz(tmp_path / "samples.npz", tmp_path, 400, (64, 64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "samples.npz").stat().st_size > whole
    assert peak < whole / 2
