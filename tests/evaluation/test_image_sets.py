# SPDX-License-Identifier: Apache-2.0
"""Images to compare with: from any source, in order, all of them, and nothing damaged without a word."""

import io
import itertools
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_var.evaluation import image_sets
from hf_var.evaluation.image_sets import ImageSet


def open_image_set(argument: str, source: str, **options) -> ImageSet:
    """Open a set, with its array beside it."""
    images = image_sets.open_image_set(argument, source, **options)
    images.prepare(Path(source).with_name("arrays"))
    return images


def make_images(number: int, size: tuple[int, int] = (6, 4), channels: int = 3) -> np.ndarray:
    """Noise of shape `(number, height, width, channels)`."""
    return np.random.default_rng(0).integers(0, 256, (number, *size, channels), dtype=np.uint8)


def make_statistics(features: int = 5) -> dict[str, np.ndarray]:
    samples = np.random.default_rng(1).normal(size=(20, features))
    return {"mu": samples.mean(0), "sigma": np.cov(samples, rowvar=False)}


def read_all(images: ImageSet, *edges: int) -> np.ndarray:
    """The images between consecutive edges, in the layout of `make_images`."""
    pieces = [images.read(range(start, stop)) for start, stop in itertools.pairwise(edges)]
    assert [len(piece) for piece in pieces] == [stop - start for start, stop in itertools.pairwise(edges)]
    assert all(piece.dtype == torch.uint8 and piece.is_contiguous() for piece in pieces)
    return torch.cat(pieces).permute(0, 2, 3, 1).numpy()


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, images: np.ndarray) -> str:
    # The order on the disk is another one.
    for index in reversed(range(len(images))):
        (folder / f"{index:06d}.png").write_bytes(png(images[index]))
    return str(folder)


def write_parquet(folder: Path, contents: list[bytes]) -> str:
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": content, "path": None} for content in contents]
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(folder / "images.parquet")
    return str(folder / "*.parquet")


# --------------------------------------------------------------------------------------------------------------------
# Files of arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [3, 1])
def test_npz_in_any_pieces(save, channels: int, tmp_path: Path) -> None:
    pixels = make_images(11, channels=channels)
    save(tmp_path / "set.npz", pixels, np.arange(11))
    images = open_image_set("reference", str(tmp_path / "set.npz"))
    assert (images.num_images, images.image_size, images.statistics) == (11, (6, 4), {})
    colour = pixels.repeat(3 // channels, axis=-1)
    assert np.array_equal(read_all(images, 0, 11), colour)
    assert np.array_equal(read_all(images, 0, 1, 5, 11), colour)
    # In any order.
    found = torch.cat([images.read(range(7, 8)), images.read(range(2, 4))]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, colour[[7, 2, 3]])


def test_npz_written_by_hand(tmp_path: Path) -> None:
    # Version 2 of the header, which numpy writes where the first one is too short.
    pixels = make_images(3)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, pixels, version=(2, 0))
    assert np.array_equal(read_all(open_image_set("reference", str(tmp_path / "set.npz")), 0, 3), pixels)


def test_npz_is_never_whole_in_memory(tmp_path: Path) -> None:
    pixels = make_images(400, size=(128, 128))
    np.savez_compressed(tmp_path / "set.npz", pixels)
    tracemalloc.start()
    try:
        images = open_image_set("reference", str(tmp_path / "set.npz"))
        total = sum(int(images.read(range(index, index + 10)).sum()) for index in range(200, 400, 10))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == pixels[200:].sum(dtype=np.int64)
    assert peak < pixels.nbytes / 2


def test_an_array_is_extracted_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", make_images(4))
    for _ in range(2):
        open_image_set("reference", str(tmp_path / "set.npz"))
        (path,) = (tmp_path / "arrays").iterdir()
        path.chmod(0o444)
    # Another set of the same name.
    np.savez(tmp_path / "set.npz", make_images(5))
    assert read_all(open_image_set("reference", str(tmp_path / "set.npz")), 0, 5).shape == (5, 6, 4, 3)
    assert len(list((tmp_path / "arrays").iterdir())) == 2


def test_statistics_alone(tmp_path: Path) -> None:
    stored = make_statistics()
    spatial = {f"{key}_s": value.astype(np.float32) for key, value in make_statistics(3).items()}
    np.savez(tmp_path / "set.npz", **stored, **spatial)
    images = open_image_set("reference", str(tmp_path / "set.npz"), image_size=(8, 8))
    assert (images.num_images, images.image_size) == (0, None)
    assert list(images.statistics) == ["mu", "sigma", "mu_s", "sigma_s"]
    for key, value in (stored | spatial).items():
        assert images.statistics[key].dtype == np.float64
        assert np.array_equal(images.statistics[key], value)


def test_images_beside_statistics(tmp_path: Path) -> None:
    pixels = make_images(4)
    np.savez(tmp_path / "set.npz", pixels, **make_statistics())
    images = open_image_set("reference", str(tmp_path / "set.npz"))
    assert list(images.statistics) == ["mu", "sigma"]
    assert np.array_equal(read_all(images, 0, 4), pixels)
    assert images.description | {"fingerprint": ""} == {
        "kind": "npz",
        "name": "set.npz",
        "num_images": 4,
        "image_size": [6, 4],
        "statistics": ["mu", "sigma"],
        "fingerprint": "",
    }


def test_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    pixels = make_images(4)
    np.savez(tmp_path / "first.npz", pixels)
    np.savez_compressed(tmp_path / "second.npz", pixels)
    pixels[3, 0, 0, 0] += 1
    np.savez(tmp_path / "third.npz", pixels)
    names = ("first", "second", "third")
    found = [open_image_set("a", str(tmp_path / f"{name}.npz")).description["fingerprint"] for name in names]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": make_images(4) / 255}, r"must be bytes \(uint8\) .* got float64. Scale images of floats"),
        ({"arr_0": make_images(4).astype(np.int64)}, r"must be bytes \(uint8\) .* got int64\.$"),
        ({"arr_0": np.array([None, None])}, r"must be bytes \(uint8\) .* got object"),
        ({"arr_0": make_images(4).transpose(0, 3, 1, 2)}, r"shape \(images, height, width, 3\), got \(4, 3, 6, 4\)"),
        ({"arr_0": make_images(4, channels=4)}, r"got \(4, 6, 4, 4\)"),
        ({"arr_0": make_images(4)[..., 0]}, r"got \(4, 6, 4\)"),
        ({"arr_0": np.asfortranarray(make_images(4))}, r"got \(4, 6, 4, 3\) in Fortran order"),
        ({"arr_0": make_images(1)}, r"must have at least 2 images, has 1"),
        ({"arr_0": make_images(0)}, r"must have at least 2 images, has 0"),
        ({"images": make_images(4)}, r"must hold images as 'arr_0' or 'mu' and 'sigma', has \['images'\]"),
        ({"mu": np.zeros(3)}, r"has \(3,\) and None"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, r"has \(3,\) and \(3, 4\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, r"'sigma' of .* must hold finite floating point"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])}, r"'sigma' of .* must be symmetric.* 0\.5"),
        ({"mu_s": np.zeros(3, int), "sigma_s": np.eye(3)}, r"'mu_s' of .* must hold finite .* got int64"),
    ],
)
def test_other_arrays_are_refused(arrays: dict, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        open_image_set("reference", str(tmp_path / "set.npz"))
    assert "`reference`" in str(caught.value)
    assert "set.npz" in str(caught.value)


def test_npz_of_another_size_or_with_options_of_data_sets(tmp_path: Path) -> None:
    source = str(tmp_path / "set.npz")
    np.savez(source, make_images(4))
    assert open_image_set("reference", source, image_size=(6, 4)).image_size == (6, 4)
    with pytest.raises(ValueError, match=r"must have images of 8x8 pixels, has 6x4"):
        open_image_set("reference", source, image_size=(8, 8))
    for options in ({"split": "train"}, {"image_column": "image"}):
        with pytest.raises(ValueError, match=r"`reference` = .* neither splits nor columns"):
            open_image_set("reference", source, **options)
    with pytest.raises(ValueError, match=r"`reference` = .*missing\.npz' is not a file"):
        open_image_set("reference", str(tmp_path / "missing.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["truncated", "flipped", "zeroed", "text", "empty"])
def test_a_damaged_npz_is_found(save, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    save(path, make_images(40, size=(32, 32)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if kind == "truncated":
        content = content[:middle]
    elif kind == "flipped":
        content[middle] ^= 1
    elif kind == "zeroed":
        content[middle : middle + 1000] = bytes(1000)
    else:
        content = bytearray(b"no archive" if kind == "text" else b"")
    path.write_bytes(content)
    # Before any image is read, and nothing is left that looks whole.
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`reference` = .*set\.npz' is damaged or no npz file: "):
            open_image_set("reference", str(path))
    assert not list(tmp_path.glob("arrays/*"))


def test_damaged_statistics_are_found(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **make_statistics(40))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged or no npz file: BadZipFile: Bad CRC"):
        open_image_set("reference", str(path))


def test_an_array_that_is_shorter_than_it_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (40, 6, 4, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(make_images(39).tobytes())
    with pytest.raises(ValueError, match=r"`reference` = .*set\.npz' is damaged or no npz file: "):
        open_image_set("reference", str(tmp_path / "set.npz"))


# --------------------------------------------------------------------------------------------------------------------
# Data sets


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_data_set_in_any_pieces(kind: str, channels: int, tmp_path: Path) -> None:
    pixels = make_images(11, channels=channels)
    source = (
        write_folder(tmp_path, pixels) if kind == "folder" else write_parquet(tmp_path, [png(one) for one in pixels])
    )
    images = open_image_set("reference", source)
    assert (images.num_images, images.image_size, images.statistics) == (11, (6, 4), {})
    colour = pixels.repeat(3 // channels, axis=-1)
    assert np.array_equal(read_all(images, 0, 11), colour)
    assert np.array_equal(read_all(images, 0, 1, 5, 11), colour)
    found = torch.cat([images.read(range(7, 8)), images.read(range(2, 4))]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, colour[[7, 2, 3]])
    fixed = {"kind": "files", "split": "train", "num_images": 11, "image_size": [6, 4], "resize": None}
    assert images.description.items() >= fixed.items()
    assert images.description["name"] == (tmp_path.name if kind == "folder" else "*.parquet")
    assert str(tmp_path) not in str(images.description)


def test_files_of_a_folder_are_sorted_by_path(tmp_path: Path) -> None:
    pixels = make_images(6)
    for name, image in zip(["b/2", "a/10", "b/1", "a/9", "a/1", "b/3"], pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png(image))
    # As text, so that 10 comes before 9.
    assert np.array_equal(read_all(open_image_set("reference", str(tmp_path)), 0, 6), pixels[[4, 1, 3, 2, 0, 5]])


def test_arrays_as_images(tmp_path: Path) -> None:
    pixels = make_images(5)
    features = datasets.Features({"pixels": datasets.Array3D((3, 6, 4), "uint8")})
    rows = {"pixels": list(pixels.transpose(0, 3, 1, 2))}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert np.array_equal(read_all(open_image_set("reference", str(tmp_path / "a.parquet")), 0, 5), pixels)
    features = datasets.Features({"pixels": datasets.Array3D((2, 6, 4), "uint8")})
    rows = {"pixels": list(pixels.transpose(0, 3, 1, 2)[:, :2])}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"must hold images, or bytes \(uint8\) .* got uint8 of shape \(2, 6, 4\)"):
        open_image_set("reference", str(tmp_path / "b.parquet"))


def test_images_are_resized_and_cut_in_the_middle(tmp_path: Path) -> None:
    # Three flat fields side by side, the middle one as wide as high.
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    wide[:, 16:] = 90
    # The next one has that size already.
    contents = [png(wide), png(make_images(1, size=(4, 4))[0]), png(wide.transpose(1, 0, 2))]
    source = write_parquet(tmp_path, contents)
    images = open_image_set("reference", source, image_size=(4, 4), interpolation="box")
    found = read_all(images, 0, 3)
    assert (found[[0, 2]] == 200).all()
    assert np.array_equal(found[1], make_images(1, size=(4, 4))[0])
    assert images.description["resize"] == "box, centre cut"
    with pytest.raises(ValueError, match=r"`interpolation` must be one of"):
        open_image_set("reference", source, image_size=(4, 4), interpolation="nearest")


def test_images_of_several_sizes_are_named(tmp_path: Path) -> None:
    contents = [png(image) for image in make_images(4)]
    contents[2] = png(make_images(1, size=(4, 6))[0])
    images = open_image_set("reference", write_parquet(tmp_path, contents))
    with pytest.raises(ValueError, match=r"Row 2 of `reference` = .* it has 4x6 pixels, the first image 6x4"):
        read_all(images, 0, 4)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_a_broken_image_is_named(damage: str, place: int, tmp_path: Path) -> None:
    source = write_folder(tmp_path, make_images(5, size=(32, 32)))
    path = tmp_path / f"{place:06d}.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    changed = {"truncated": content[: len(content) // 2], "flipped": content, "text": b"no image"}
    path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=rf"Row {place} of `reference` = .* cannot be used: .*00000{place}\.png"):
        read_all(open_image_set("reference", source), 0, 5)


def test_words_in_names_of_files_are_no_splits(tmp_path: Path) -> None:
    pixels = make_images(5)
    source = write_folder(tmp_path, pixels)
    (tmp_path / "000003.png").rename(tmp_path / "000003_test.png")
    assert np.array_equal(read_all(open_image_set("reference", source), 0, 5), pixels)
    with pytest.raises(ValueError, match=r"has the splits \['train'\], not 'test'"):
        open_image_set("reference", source, split="test")


def test_splits_are_read_where_they_are_chosen(tmp_path: Path) -> None:
    pixels = make_images(7)
    for split, part in (("train", pixels[:4]), ("test", pixels[4:])):
        (tmp_path / split).mkdir()
        write_folder(tmp_path / split, part)
    assert np.array_equal(read_all(open_image_set("a", str(tmp_path), split="test"), 0, 3), pixels[4:])
    assert open_image_set("a", str(tmp_path), split="train[:3]").num_images == 3
    with pytest.raises(ValueError, match=r"has the splits .*, not 'validation'"):
        open_image_set("a", str(tmp_path), split="validation")
    with pytest.raises(ValueError, match=r"has 7 images, of which datasets reads 4"):
        open_image_set("a", str(tmp_path))


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have at least 2 images, has 1"):
        open_image_set("reference", write_parquet(tmp_path, [png(make_images(1)[0])]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`reference`"):
        open_image_set("reference", str(tmp_path / "empty"))
