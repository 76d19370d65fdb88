# SPDX-License-Identifier: Apache-2.0
"""Where the rows come from: loading a data set, and finding its columns and labels."""

import glob
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets

from ..files import DATA_ENDINGS
from .folders import ImageFolder


AnyDataset = datasets.Dataset | datasets.IterableDataset

# Messages of datasets for parquet files without rows, and of pyarrow for tar files without members.
EMPTY_MESSAGES = ("corresponds to no data", "Must pass at least one table")
# Python's message for a `.cls` in a tar file that datasets reads as a number.
NO_NUMBER_MESSAGE = "invalid literal for int()"
# A tar file ends with two empty blocks.
TAR_END = bytes(1024)
FILE_TYPES = ("binary", "large_binary", "binary_view", "string", "large_string", "string_view")


def load_source(
    argument: str, source: str, split: str | None, preferred_splits: Sequence[str], streaming: bool = False
) -> AnyDataset:
    """
    The data set that an argument names, with images as they are stored: a Hub data set, a folder of images in class
    folders, or a glob of parquet or tar files. Without a `split` it is the first of `preferred_splits` that exists, or
    the only one.
    """
    # Its overloads want to know at once whether the result is a stream.
    load_dataset = cast(Any, datasets.load_dataset)
    source = expand_home(source)
    files = glob_files(source)
    if files is not None:
        if not files:
            raise ValueError(f"`{argument}` = {source!r} matches no file.")
        _check_archives(argument, files)
        builder = "parquet" if source.endswith(".parquet") else "webdataset"
        # Files are one split, called train, which may be sliced.
        load = partial(load_dataset, builder, data_files=files, split=split or "train", streaming=streaming)
    else:
        if source.startswith((".", "/")) and not Path(source).is_dir():
            raise ValueError(f"`{argument}` = {source!r} is not a folder.")
        folder = ImageFolder(argument, source) if Path(source).is_dir() else None
        if folder is not None and folder.images:
            splits = list(folder.splits)
            load = partial(folder.load, _choose_split(argument, source, splits, split, preferred_splits, streaming))
        else:
            _check_archives(argument, [] if folder is None else folder.files)
            splits = _split_names(argument, source)
            split = _choose_split(argument, source, splits, split, preferred_splits, streaming)
            load = partial(load_dataset, source, split=split)
        load = partial(load, streaming=streaming)
    try:
        dataset = cast(AnyDataset, load())
        if not _is_empty(dataset):
            return undecoded(with_features(dataset))
    except ValueError as error:
        if NO_NUMBER_MESSAGE in str(error):
            raise ValueError(
                f"`{argument}` = {source!r} has a file .cls that holds no number: {error}. Store names of classes as .txt and "
                "set `label_column` to txt."
            ) from error
        if not any(words in str(error) for words in EMPTY_MESSAGES):
            raise
    raise ValueError(f"`{argument}` = {source!r} is empty.")


def expand_home(source: str) -> str:
    """A path in the home folder in full; names on the Hub as they are."""
    return str(Path(source).expanduser()) if source.startswith("~") else source


def glob_files(source: str) -> list[str] | None:
    """The files that a glob of parquet or tar files finds; `None` of any other source."""
    return sorted(glob.glob(source, recursive=True)) if source.endswith(DATA_ENDINGS) else None


def with_features(dataset: AnyDataset) -> AnyDataset:
    """`dataset` with known features: those of a stream may have to be read off its first rows."""
    return dataset if isinstance(dataset, datasets.Dataset) else dataset._resolve_features()


def undecoded(dataset: AnyDataset) -> AnyDataset:
    """`dataset` with images as they are stored. Read by `datasets` itself, a single broken one would end the run."""
    if isinstance(dataset, datasets.IterableDataset):
        # Besides, this ends the threads that decode remote images ahead.
        return dataset.decode(False)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image) and feature.decode:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def features_of(dataset: AnyDataset) -> datasets.Features:
    """The columns and their types."""
    return cast(datasets.Features, with_features(dataset).features)


def find_image_column(dataset: AnyDataset, column: str | None) -> str:
    """The column of images, or of arrays in their place: `column`, or the only one there is."""
    features = features_of(dataset)
    if column is not None:
        check_column("image_column", column, features)
        return column
    arrays = (partial(_is_array, kind) for kind in (datasets.Array3D, datasets.Array2D))
    for is_kind in (_is_image, *arrays):
        found = [name for name, feature in features.items() if is_kind(feature)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ValueError(
        f"Expected one column of images, found {found or 'none'} among the columns {list(features)}. Name it with "
        "`image_column`."
    )


def check_column(argument: str, column: str, features: datasets.Features) -> None:
    """Raise a `ValueError` if there is no such column."""
    if column not in features:
        raise ValueError(f"`{argument}` = {column!r} is not among the columns {list(features)}.")


def holds_files(feature: Any) -> bool:
    """Whether a column may hold image files, or their paths: as `datasets`, pandas or polars store them."""
    return _is_image(feature) or (isinstance(feature, datasets.Value) and feature.dtype in FILE_TYPES)


def _is_image(feature: Any) -> bool:
    # Other writers store as a structure what is an image in `datasets`.
    is_structure = isinstance(feature, dict) and "bytes" in feature and feature.keys() <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or is_structure


def _is_array(kind: type, feature: Any) -> bool:
    return isinstance(feature, kind)


def _is_empty(dataset: AnyDataset) -> bool:
    if isinstance(dataset, datasets.Dataset):
        return len(dataset) == 0
    # The first image may be broken, so the peek must not decode it.
    peeked = dataset if dataset.features is None else dataset.decode(False)
    return next(iter(peeked), None) is None


def _check_archives(argument: str, files: Sequence[str]) -> None:
    """Raise a `ValueError` for a tar file that was cut off, of which `datasets` would read the beginning."""
    for file in files:
        if file.endswith(".tar"):
            with open(file, "rb") as archive:
                size = archive.seek(0, os.SEEK_END)
                archive.seek(max(0, size - len(TAR_END)))
                if archive.read() != TAR_END:
                    raise ValueError(f"`{argument}`: the file {file!r} is cut off after {size} bytes. Copy it again.")


def _split_names(argument: str, source: str) -> list[str]:
    try:
        return datasets.get_dataset_split_names(source)
    except FileNotFoundError as error:
        raise ValueError(f"`{argument}` = {source!r} cannot be loaded: {error}") from error


def _choose_split(
    argument: str,
    source: str,
    splits: Sequence[str],
    split: str | None,
    preferred_splits: Sequence[str],
    streaming: bool,
) -> str:
    if split is None:
        found = [name for name in preferred_splits if name in splits] or (splits if len(splits) == 1 else [])
        if not found:
            raise ValueError(f"`{argument}` = {source!r} has the splits {splits}: choose one of them.")
        return found[0]
    # A slice such as train[:100] is a split, too, except in a stream.
    if (split if streaming else split.split("[")[0]) not in splits:
        raise ValueError(f"`{argument}` = {source!r} has the splits {splits}, not {split!r}.")
    return split
