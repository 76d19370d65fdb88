# SPDX-License-Identifier: Apache-2.0
"""Emoji from packages as the registry has them: names, keywords, other colours, and what is left out."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.conftest import load_script


prepare = load_script("examples/prepare_emoji.py")

# Label, code points, group, keywords.
ENTRIES = [
    ("red apple", "1F34E", 4, ["fruit", "apple"]),
    ("red heart", "2764", 0, ["love"]),
    ("ghost", "1F47B", 0, ["boo"]),
    ("pilot", "1F9D1-200D-2708-FE0F", 1, []),
    ("flag: Chad", "1F1F9-1F1E9", 9, []),
    ("blue circle", "1F535", 8, ["round"]),
    ("recycling symbol", "267B", 8, ["recycle"]),
    *((f"thing {number}", f"1F9{number:02X}", 7, ["object"]) for number in range(16, 48)),
]
PACKAGES = ("google", "twitter")


def drawing(label: str) -> bytes:
    """A disc, red for the apple, the heart and the things, white for the ghost, with a green spot in it."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 8, 56, 56), fill="white" if label == "ghost" else "red")
    pen.ellipse((40, 10, 50, 20), fill=(0, 160, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_package(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            package.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("packages")
    names = [{"label": label, "hexcode": code, "group": group, "tags": tags} for label, code, group, tags in ENTRIES]
    found = [write_package(folder / "emojibase-data.tgz", {"en/data.json": json.dumps(names).encode()})]
    for vendor in PACKAGES:
        # A heart's file name has a mark that its name lacks.
        files = {
            f"img/{vendor}/64/{code.lower()}{'-fe0f' if code == '2764' else ''}.png": drawing(label)
            for label, code, *_ in ENTRIES
        }
        files |= {f"img/{vendor}/64/00a9.png": drawing("nameless"), f"img/{vendor}/sheets/64.png": b"sheet"}
        found.append(write_package(folder / f"{vendor}.tgz", files))
    return [str(path) for path in found]


@pytest.fixture(scope="module")
def rows(packages: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, datasets.Dataset]:
    folder = tmp_path_factory.mktemp("emoji")
    prepare.main([*packages, "--output", str(folder)])
    return {name: datasets.Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("train", "test")}


def test_all_wanted_emoji_are_in_one_of_the_files(rows: dict[str, datasets.Dataset]) -> None:
    names = {part: set(found["name"]) for part, found in rows.items()}
    assert names["train"] | names["test"] == {label for label, *_ in ENTRIES} - {
        "pilot",
        "flag: Chad",
        "recycling symbol",
    }
    assert not names["train"] & names["test"]
    assert names["test"]
    for part, per_picture in (("train", 3), ("test", 1)):
        found = rows[part]
        assert len(found) == 2 * per_picture * len(names[part])
        assert sum(found["is_plain"]) == 2 * len(names[part])
        assert set(found["vendor"]) == set(PACKAGES)


def test_captions_are_names_with_keywords_and_other_colours(rows: dict[str, datasets.Dataset]) -> None:
    rows = [row for row in rows["train"] if row["name"] == "thing 20" or row["name"] == "ghost"]
    assert rows
    for row in rows:
        caption = row["caption"].removeprefix("a ").removeprefix("an ")
        pixels = np.asarray(row["image"])
        if row["is_plain"] or row["name"] == "ghost":
            assert caption in {row["name"], "ghost, boo", "boo, ghost"}
            assert pixels[32, 32].tolist() == [255, 255 if row["name"] == "ghost" else 0, pixels[32, 32, 2], 255]
        elif "object" in caption:
            assert caption in {"thing 20, object", "object, thing 20"}
        else:
            colour, name = caption.split(" ", 1)
            assert name == "thing 20"
            hue, _ = prepare.main_hue(row["image"])
            assert prepare.distance(hue, prepare.HUES[colour]) <= 5
            # The spot is of another hue, which stays, and so does transparency.
            assert pixels[15, 45, 1] > 150
            assert pixels[0, 0, 3] == 0


def test_everything_is_always_the_same(packages: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare.main([*packages[:: 1 if name == "one" else -1], "--output", str(tmp_path / name)])
    for part in ("train", "test"):
        one, two = (datasets.Dataset.from_parquet(str(tmp_path / name / f"{part}.parquet")) for name in ("one", "two"))
        assert one["caption"][:] == two["caption"][:]
        assert all(np.array_equal(a, b) for a, b in zip(one["image"], two["image"], strict=True))


def test_other_files_are_refused(packages: list[str], tmp_path: Path) -> None:
    for found in (packages[:1], packages[1:]):
        with pytest.raises(ValueError, match="`packages` must be emojibase-data and packages of pictures"):
            prepare.main([*found, "--output", str(tmp_path)])
