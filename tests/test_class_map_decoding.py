# SPDX-License-Identifier: Apache-2.0
"""Maps of class ids from files, pictures and arrays, without a change of any id."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var.image_decoding import BrokenImageError, decode_class_map


IDS = np.random.default_rng(0).integers(0, 9, (5, 7))


def picture(mode, ids=IDS):
    if mode == "P":
        image = Image.fromarray(ids.astype(np.uint8), "P")
        # Colours that are no ids, and of which two are the same.
        image.putpalette([200, 100, 50] * 256)
        return image
    kind = {"L": np.uint8, "I": np.int32, "I;16": np.uint16, "1": bool}[mode]
    return Image.fromarray(ids.astype(kind))


def stored(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16"])
def test_pictures_and_files_hold_ids(mode, tmp_path):
    image = picture(mode)
    assert image.mode == mode
    expected = torch.from_numpy(IDS)
    found = decode_class_map(image, 9)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    for kind in ("PNG", "TIFF") if mode != "I" else ("TIFF",):
        content = stored(image, kind)
        assert torch.equal(decode_class_map(content, 9), expected), kind
        (tmp_path / "map").write_bytes(content)
        assert torch.equal(decode_class_map(tmp_path / "map", 9), expected)


def test_two_classes_in_black_and_white():
    ids = IDS % 2
    assert torch.equal(decode_class_map(stored(picture("1", ids), "PNG"), 2), torch.from_numpy(ids))


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: ids,
        lambda ids: ids.astype(np.uint8)[..., None],
        lambda ids: ids.astype(np.uint16),
        lambda ids: np.asfortranarray(ids),
        lambda ids: ids[::-1][::-1],
        lambda ids: torch.from_numpy(ids),
        lambda ids: torch.from_numpy(ids)[None].to(torch.int16),
        lambda ids: torch.from_numpy(ids).to(torch.uint8),
    ],
)
def test_arrays_and_tensors_of_integers(make):
    assert torch.equal(decode_class_map(make(IDS), 9), torch.from_numpy(IDS))


def test_the_orientation_is_that_of_the_file():
    image = picture("L")
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert torch.equal(decode_class_map(buffer.getvalue(), 9), torch.from_numpy(np.rot90(IDS, -1).copy()))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture("L"), "class ids must be from 0 to 7, got 8"),
        (picture("P"), "class ids must be from 0 to 7, got 8"),
        (IDS - 1, "class ids must be from 0 to 7, got -1"),
        (torch.from_numpy(IDS), "class ids must be from 0 to 7, got 8"),
        (Image.new("RGB", (3, 3)), "class ids have no colours or transparency, got a picture of the mode RGB"),
        (Image.new("LA", (3, 3)), "class ids have no colours or transparency, got a picture of the mode LA"),
        (Image.new("F", (3, 3)), "class ids have no colours or transparency, got a picture of the mode F"),
        (IDS.astype(float), "class ids must be integers, got float64"),
        (torch.from_numpy(IDS).float(), "class ids must be integers, got torch.float32"),
        (np.array([["x"]]), "class ids must be integers, got <U1"),
        (IDS[None], r"class ids must have the shape \(height, width\), got \(1, 5, 7\)"),
        (torch.from_numpy(IDS)[..., None], r"class ids must have the shape \(height, width\), got \(5, 7, 1\)"),
        (IDS[:0], r"class ids must have the shape \(height, width\), got \(0, 7\)"),
        (b"no picture", "UnidentifiedImageError"),
        (stored(picture("L"), "PNG")[:40], "Error"),
    ],
)
def test_what_holds_no_ids(image, message):
    with pytest.raises(BrokenImageError, match=f"^map 3: .*{message}"):
        decode_class_map(image, 8, name="map 3")


def test_files_that_are_too_large_are_not_decompressed(tmp_path):
    path = tmp_path / "large.png"
    picture("L").save(path)
    with pytest.raises(BrokenImageError, match=r"large.png: .*it has 7x5 pixels, more than `max_image_pixels` = 34"):
        decode_class_map(path, 9, max_pixels=34)
