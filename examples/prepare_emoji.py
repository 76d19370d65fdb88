# SPDX-License-Identifier: Apache-2.0
"""
Write emoji with their names as parquet files, from three packages of the npm registry.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@16.0.3
    python examples/prepare_emoji.py *.tgz --output data/emoji

The pictures are Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter and other contributors, CC-BY 4.0: name the source where
pictures or weights that are made from it are published), the names and keywords those of Unicode's CLDR by emojibase (MIT).

`train.parquet` and `test.parquet` have the columns `image` (64x64 pixels with transparency), `caption`, `name`, `category`,
`vendor` and `is_plain`, true in one row of each picture, which is as it was drawn. An emoji is in one of the files alone, whoever drew it. In training each picture comes in three rows: with its name, with its name
and a keyword, and, where it has a main colour, with another one and its name: "blue apple". So a colour is more than a part of a
name. People, flags, signs and skin tones are left out: they are many that look nearly alike.
"""

import argparse
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


# The groups of Unicode, as emojibase numbers them.
CATEGORIES = {
    0: "Smileys & Emotion",
    1: "People & Body",
    3: "Animals & Nature",
    4: "Food & Drink",
    5: "Travel & Places",
    6: "Activities",
    7: "Objects",
    8: "Symbols",
    9: "Flags",
}
DEFAULT_GROUPS = (0, 3, 4, 5, 6, 7)
# Coloured hearts and shapes are symbols, and how a model learns colours by name.
COLOURED = ("circle", "square", "diamond", "star")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey")
# What pictures are painted in anew: hues in degrees.
HUES = {"red": 2, "orange": 28, "yellow": 50, "green": 120, "blue": 214, "purple": 275, "pink": 330}
# A picture has a main colour if this share of what is seen is of about one hue; hues of so many degrees are about one.
MAIN_SHARE = 0.4
HUE_WIDTH = 30
TEXTS = ("caption", "name", "category", "vendor")
FEATURES = Features({"image": Image(), **{name: Value("string") for name in TEXTS}, "is_plain": Value("bool")})
# One emoji of so many is for tests.
TEST_SHARE = 14


def read_package(path: Path) -> dict[str, bytes]:
    """The files of a package, by their paths in it, without pictures of other sizes."""
    with tarfile.open(path) as package:
        return {
            member.name: package.extractfile(member).read()
            for member in package
            if member.isfile() and ("/64/" in member.name or member.name.endswith("data.json"))
        }


def read_names(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Names and keywords by code points, as pictures' files are called."""
    entries = json.loads(files["package/en/data.json"])
    return {plain_code(entry["hexcode"]): entry for entry in entries}


def plain_code(code: str) -> str:
    """Code points without the mark that asks for a picture instead of a letter, which not all sources write."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def is_wanted(entry: dict[str, Any], groups: list[int]) -> bool:
    """Whether an emoji is of one of the groups, or a coloured shape."""
    words = entry["label"].split()
    return entry.get("group") in groups or (words[0] in COLOURS and words[-1] in COLOURED)


def with_keyword(entry: dict[str, Any], generator: random.Random) -> str:
    """The name with a keyword before or behind it, if there is one that it does not have: "pizza, cheese"."""
    words = [word for word in entry.get("tags", ()) if word not in entry["label"]]
    parts = [entry["label"], *([generator.choice(words)] if words else [])]
    generator.shuffle(parts)
    return ", ".join(parts)


def distance(first: Any, second: Any) -> Any:
    """Degrees between hues."""
    return abs((first - second + 180) % 360 - 180)


def split_colours(picture: PILImage.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in bytes, `(height, width)` each."""
    bands = np.asarray(picture.convert("RGB").convert("HSV"), dtype=np.int64)
    return bands[..., 0] * 360 // 256, bands[..., 1], bands[..., 2]


def main_hue(picture: PILImage.Image) -> tuple[int | None, np.ndarray]:
    """The mean hue of most of what is seen, in degrees, and where it is; `None` if there is no such hue."""
    hue, saturation, value = split_colours(picture)
    seen = np.asarray(picture.convert("RGBA"))[..., 3] > 127
    coloured = seen & (saturation > 80) & (value > 60)
    areas = {degrees: coloured & (distance(hue, degrees) <= HUE_WIDTH) for degrees in range(0, 360, 5)}
    middle = max(areas, key=lambda degrees: areas[degrees].sum())
    area = areas[middle]
    if area.sum() == 0 or area.sum() < MAIN_SHARE * seen.sum():
        return None, area
    # On a circle: of the differences, which are small.
    differences = (hue[area] - middle + 180) % 360 - 180
    return round(middle + differences.mean()) % 360, area


def in_another_colour(content: bytes, entry: dict[str, Any], generator: random.Random) -> tuple[bytes, str] | None:
    """The picture with another main colour, and a name of it; `None` of a picture without a main colour."""
    picture = PILImage.open(io.BytesIO(content)).convert("RGBA")
    main, area = main_hue(picture)
    if main is None:
        return None
    colour = generator.choice([name for name, degrees in HUES.items() if distance(main, degrees) > HUE_WIDTH])
    hue, saturation, value = split_colours(picture)
    moved = np.where(area, hue + HUES[colour] - main, hue) % 360
    bands = np.stack([moved * 256 // 360, saturation, value], axis=-1).astype(np.uint8)
    painted = PILImage.fromarray(bands, "HSV").convert("RGB")
    painted.putalpha(picture.getchannel("A"))
    file = io.BytesIO()
    painted.save(file, "PNG")
    words = [word for word in entry["label"].split() if word not in COLOURS]
    return file.getvalue(), " ".join([colour, *words])


def training_rows(content: bytes, entry: dict[str, Any], seed: str) -> list[tuple[bytes, str]]:
    """Pictures and captions, always the same."""
    generator = random.Random(seed)
    label = entry["label"]
    rows = [(content, label), (content, with_keyword(entry, generator))]
    rows.append(in_another_colour(content, entry, generator) or (content, label))
    return [(picture, with_article(caption, generator)) for picture, caption in rows]


def with_article(caption: str, generator: random.Random) -> str:
    """Every third caption with an article, as prompts may have it."""
    article = "an" if caption[0] in "aeiou" else "a"
    return f"{article} {caption}" if generator.random() < 1 / 3 else caption


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", help="the three .tgz files")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--groups", type=int, nargs="+", default=list(DEFAULT_GROUPS), help=f"among {CATEGORIES}")
    args = parser.parse_args(argv)

    packages = [read_package(path) for path in args.packages]
    names = [read_names(files) for files in packages if "package/en/data.json" in files]
    pictures = {
        (Path(name).parts[2], plain_code(Path(name).stem)): content
        for files in packages
        for name, content in files.items()
        if name.endswith(".png")
    }
    if len(names) != 1 or not pictures:
        raise ValueError(
            "`packages` must be emojibase-data and packages of pictures, emoji-datasource-google or -twitter."
        )
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for (vendor, code), content in sorted(pictures.items()):
        entry = names[0].get(code)
        if entry is None or not is_wanted(entry, args.groups):
            continue
        # By the emoji alone, so that both vendors' pictures of it are in the same file.
        is_test = int(hashlib.sha256(code.encode()).hexdigest(), 16) % TEST_SHARE == 0
        found = [(content, entry["label"])] if is_test else training_rows(content, entry, f"{vendor} {code}")
        for number, (picture, caption) in enumerate(found):
            row = {"image": {"bytes": picture}, "caption": caption.lower(), "name": entry["label"].lower()}
            row |= {"category": CATEGORIES[entry["group"]], "vendor": vendor, "is_plain": number == 0}
            rows["test" if is_test else "train"].append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        Dataset.from_list(found, features=FEATURES).to_parquet(args.output / f"{name}.parquet")
        print(f"{name}.parquet: {len(found)} rows")


if __name__ == "__main__":
    main()
