# SPDX-License-Identifier: Apache-2.0
"""
Folders of image files. `datasets` takes words such as `test` in the names of files for splits, and skips links and
unusual suffixes. Here every image file is read; if one would be skipped, the folder is refused with an error that names
the file.

The class of an image is the first folder below that of the data set. Folders called like splits are splits if there is
nothing beside them.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as DatasetsFolder
from PIL import Image

from ..files import DATA_ENDINGS


SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
IMAGE_ENDINGS = {*DatasetsFolder.EXTENSIONS, ".avif", ".heic", ".heif", ".jxl", ".dng", ".svg"}
# Suffixes of files that often accompany images; all other files are opened to see whether they are images.
TEXT_ENDINGS = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".yaml", ".yml", ".html", ".py", ".log"}
ARCHIVE_ENDINGS = {*DATA_ENDINGS, ".arrow", ".zip"}


class ImageFolder:
    """The image files of a folder: by split, with their paths below it and their classes, unless it `has_metadata`."""

    def __init__(self, argument: str, source: str):
        self.name = f"`{argument}` = {source!r}"
        self.folder = os.path.abspath(source)
        files = sorted(self._visible_files(self.folder, "", ()))
        self.images = [file for file in files if _is_image(os.path.join(self.folder, file))]
        self.has_metadata = any(os.path.basename(file) in DatasetsFolder.METADATA_FILENAMES for file in files)
        self.files = [os.path.join(self.folder, file) for file in files]
        self.splits: dict[str, list[tuple[str, str | None]]] = {}
        if not self.images:
            return
        others = [file for file in files if _ending(file) in ARCHIVE_ENDINGS and file not in self.images]
        others = [file for file in others if os.path.basename(file) not in DatasetsFolder.METADATA_FILENAMES]
        if others:
            raise ValueError(
                f"{self.name} has images such as {self.images[0]!r} beside {others[0]!r}, and only one of the two kinds "
                "can be read. Name one of them with a glob such as *.parquet, or move one of them away."
            )
        has_splits = self._has_splits()
        for image in self.images:
            *above, _ = image.split("/")
            split = SPLIT_FOLDERS[above.pop(0)] if has_splits else "train"
            self.splits.setdefault(split, []).append((image, above[0] if above else None))
        self.splits = {
            name: self.splits[name] for name in dict.fromkeys(SPLIT_FOLDERS.values()) if name in self.splits
        }
        self.names = sorted({label for images in self.splits.values() for _, label in images if label is not None})

    def load(self, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
        """The images of a split, or of slices such as `train[:100]`, with a column `label` if there are classes."""
        if self.has_metadata:
            return self._with_metadata(split, streaming)
        features = datasets.Features({"image": datasets.Image(decode=False)})
        if self.names:
            features["label"] = datasets.ClassLabel(names=self.names)
        if streaming:
            return datasets.IterableDataset.from_generator(
                _rows,
                features=features,
                # Not a list, which would make each file a shard.
                gen_kwargs={
                    "folder": self.folder,
                    "images": tuple(self.splits[split]),
                    "has_labels": bool(self.names),
                },
                split=datasets.NamedSplit(split),
            )
        lengths = {name: len(images) for name, images in self.splits.items()}
        parts: Any = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        images = [entry for part in parts for entry in self.splits[part.splitname][part.from_ : part.to]]
        paths = pyarrow.array([os.path.join(self.folder, image) for image, _ in images], pyarrow.string())
        files = pyarrow.StructArray.from_arrays(
            [pyarrow.nulls(len(paths), pyarrow.binary()), paths], ["bytes", "path"]
        )
        columns: dict[str, Any] = {"image": files}
        if self.names:
            labels = {name: label for label, name in enumerate(self.names)}
            columns["label"] = pyarrow.array([labels.get(cast(str, label)) for _, label in images], pyarrow.int64())
        dataset = datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
        dataset._fingerprint = self._fingerprint(images)
        return dataset

    def _with_metadata(self, split: str, streaming: bool) -> Any:
        """Joined with metadata by `datasets`, which skips images that the metadata do not name."""
        arguments: dict[str, Any] = {"path": self.folder}
        if list(self.splits) == ["train"]:
            # As one split, whatever words the names of the files have.
            arguments = {"path": "imagefolder", "data_files": {"train": self.files}}
        rows = cast(datasets.DatasetDict, datasets.load_dataset(**arguments))
        read = {
            os.path.realpath(row["path"])
            for part in rows.values()
            for name, feature in part.features.items()
            if isinstance(feature, datasets.Image)
            for row in cast(Any, part.cast_column(name, datasets.Image(decode=False))[name])
            if row is not None and row["path"]
        }
        missing = [image for image in self.images if os.path.realpath(os.path.join(self.folder, image)) not in read]
        if missing:
            raise ValueError(
                f"{self.name} has {len(self.images)} images, of which its metadata leave out {len(missing)}, such as "
                f"{missing[0]!r}. Name them in the metadata, or move them away."
            )
        return datasets.load_dataset(**arguments, split=split, streaming=streaming)

    def _has_splits(self) -> bool:
        """Whether the folders below are splits; refused if only some are, or if splits lie deeper."""
        for image in self.images:
            deeper = next((part for part in image.split("/")[1:-1] if part in SPLIT_FOLDERS), None)
            if deeper is not None:
                raise ValueError(
                    f"{self.name} has a folder {deeper!r} within another one, as in {image!r}, which may be a split or not. "
                    "Name the folder that holds the splits, or rename them if they are none."
                )
        called = [image for image in self.images if "/" in image and image.split("/")[0] in SPLIT_FOLDERS]
        beside = sorted(set(self.images) - set(called))
        if called and beside:
            raise ValueError(
                f"{self.name} has the split {called[0].split('/')[0]!r} and beside it {len(beside)} images of no split, such "
                f"as {beside[0]!r}. Move one of the two, or rename the folder if it is a class."
            )
        return bool(called)

    def _visible_files(self, folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
        """Paths below the folder, those behind links among them."""
        real = os.path.realpath(folder)
        if real in above:
            raise ValueError(f"{self.name} has a link {prefix.rstrip('/')!r} that leads back to a folder above it.")
        for entry in os.scandir(folder):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                yield from self._visible_files(entry.path, f"{prefix}{entry.name}/", (*above, real))
            else:
                yield prefix + entry.name

    def _fingerprint(self, images: list[tuple[str, str | None]]) -> str:
        """Changes when files do, as that of `datasets` for files that it lists."""
        digest = hashlib.sha256(self.folder.encode())
        for image, _ in images:
            path = Path(self.folder, image)
            status = path.stat() if path.exists() else None
            digest.update(f"{image} {status and (status.st_size, status.st_mtime_ns)}".encode())
        return digest.hexdigest()[:16]


def _rows(folder: str, images: tuple[tuple[str, str | None], ...], has_labels: bool) -> Iterator[dict[str, Any]]:
    for image, label in images:
        row: dict[str, Any] = {"image": {"bytes": None, "path": os.path.join(folder, image)}}
        yield row | ({"label": label} if has_labels else {})


def _is_image(path: str) -> bool:
    ending = _ending(path)
    if ending in IMAGE_ENDINGS or ending in TEXT_ENDINGS | ARCHIVE_ENDINGS:
        return ending in IMAGE_ENDINGS
    try:
        with Image.open(path):
            return True
    # Any error that Pillow raises for a file that it does not recognise.
    except Exception:
        return False


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()
