# SPDX-License-Identifier: Apache-2.0
"""Images or codes from any source that `datasets` reads, in an order that a resumed run continues exactly."""

import glob
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as transforms
from tqdm.auto import tqdm

from ..autoencoders import VQVAEModel
from .arguments import TrainingArguments


INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling if mode != Image.Resampling.NEAREST}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CODES_COLUMN = "codes"
TOKENIZER_KEY = "hf_var.tokenizer"


# --------------------------------------------------------------------------------------------------------------------
# Sources and columns


def load_source(argument: str, source: str, split: str | None, preferred_splits: Sequence[str]) -> datasets.Dataset:
    """
    Load the data set that `--train_data` or `--validation_data` names.

    Args:
        argument (`str`): Name of the argument, for messages.
        source (`str`): A Hub data set, a folder of images in class folders, or a glob of parquet or tar files.
        split (`str`, *optional*): Name of the split.
        preferred_splits (`Sequence[str]`): Where `split` is `None`, the first of these that exists, or the only one.

    Raises:
        `ValueError`: If the source does not exist, has no such split or is empty.
    """
    if source.endswith((".parquet", ".tar")):
        files = sorted(glob.glob(source, recursive=True))
        if not files:
            raise ValueError(f"`{argument}` = {source!r} matches no file.")
        builder = "parquet" if source.endswith(".parquet") else "webdataset"
        load = partial(datasets.load_dataset, builder, data_files=files, split="train")
    else:
        if source.startswith((".", "/", "~")) and not Path(source).is_dir():
            raise ValueError(f"`{argument}` = {source!r} is no folder.")
        split = _choose_split(argument, source, split, preferred_splits)
        load = partial(datasets.load_dataset, source, split=split)
    try:
        dataset = cast(datasets.Dataset, load())
    except ValueError as error:
        # datasets' own words for files without rows.
        if "corresponds to no data" not in str(error):
            raise
        dataset = None
    if dataset is None or len(dataset) == 0:
        raise ValueError(f"`{argument}` = {source!r} is empty.")
    return dataset


def is_codes_dataset(dataset: datasets.Dataset) -> bool:
    """Whether the rows are token maps instead of images."""
    return CODES_COLUMN in dataset.column_names


def find_image_column(dataset: datasets.Dataset, column: str | None) -> str:
    """The column of images: `column`, or the only one there is."""
    if column is not None:
        _check_column("image_column", column, dataset)
        return column
    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one column of images, found {found or 'none'} among the columns {dataset.column_names}. Name it "
            "with `image_column`."
        )
    return found[0]


def find_label_column(dataset: datasets.Dataset, column: str | None) -> str:
    """The column of labels: `column`, or one that is called or typed like labels."""
    if column is not None:
        _check_column("label_column", column, dataset)
        return column
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in ("label", "cls") if name in dataset.column_names]
    for found in (named, typed):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"Found no column of labels among the columns {dataset.column_names}. Name it with `label_column`, or train "
        "without classes with `num_labels` 0."
    )


def label_names(dataset: datasets.Dataset, column: str) -> dict[int, str]:
    """`id2label` of a column of labels: its names where it has some, its numbers otherwise."""
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    return {label: str(label) for label in range(max(dataset[column]) + 1)}


def check_labels(dataset: datasets.Dataset, column: str, num_labels: int) -> None:
    """Raise a `ValueError` if a label of `column` is not one of `num_labels` classes."""
    labels = np.asarray(dataset[column])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`label_column` = {column!r} must hold integers, got {dataset.features[column]}.")
    lowest, highest = labels.min(), labels.max()
    if lowest < 0 or highest >= num_labels:
        raise ValueError(
            f"`label_column` = {column!r} must hold labels from 0 to {num_labels - 1}, got values from {lowest} to "
            f"{highest}."
        )


def check_codes(dataset: datasets.Dataset, length: int, codebook_size: int) -> None:
    """Raise a `ValueError` if the first rows are no token maps of the tokenizer."""
    codes = np.asarray(dataset[:64][CODES_COLUMN])
    if codes.ndim != 2 or codes.shape[1] != length or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"The column {CODES_COLUMN!r} must hold {length} integers in every row, as the tokenizer's maps."
        )
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(
            f"The column {CODES_COLUMN!r} must hold codes from 0 to {codebook_size - 1}, got values from {codes.min()} to "
            f"{codes.max()}."
        )


def tokenizer_fingerprint(vqvae: VQVAEModel) -> str:
    """A short text that changes with everything that decides which codes a tokenizer gives."""
    digest = hashlib.sha256(json.dumps(vqvae.config.patch_nums).encode())
    for name, tensor in sorted(vqvae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantizer.")):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def codes_fingerprint(source: str) -> str | None:
    """The tokenizer that made a data set of codes, if the parquet files tell."""
    files = sorted(glob.glob(source, recursive=True)) if source.endswith(".parquet") else []
    metadata = (pyarrow.parquet.read_schema(files[0]).metadata or {}) if files else {}
    value = metadata.get(TOKENIZER_KEY.encode())
    return None if value is None else json.loads(value)


def _choose_split(argument: str, source: str, split: str | None, preferred_splits: Sequence[str]) -> str:
    try:
        splits = datasets.get_dataset_split_names(source)
    except FileNotFoundError as error:
        raise ValueError(f"`{argument}` = {source!r} cannot be loaded: {error}") from error
    if split is None:
        found = [name for name in preferred_splits if name in splits] or (splits if len(splits) == 1 else [])
        if not found:
            raise ValueError(f"`{argument}` = {source!r} has the splits {splits}: choose one of them.")
        return found[0]
    # A slice such as train[:100] is a split, too.
    if split.split("[")[0] not in splits:
        raise ValueError(f"`{argument}` = {source!r} has the splits {splits}, not {split!r}.")
    return split


def _check_column(argument: str, column: str, dataset: datasets.Dataset) -> None:
    if column not in dataset.column_names:
        raise ValueError(f"`{argument}` = {column!r} is not among the columns {dataset.column_names}.")


# --------------------------------------------------------------------------------------------------------------------
# Images to tensors


def image_transform(
    args: TrainingArguments, image_size: tuple[int, int], num_channels: int, augment: bool
) -> Callable[[Image.Image], torch.Tensor]:
    """
    How images become model inputs: enlarged or reduced until they cover `resize_ratio` times the size, cut to it (at
    random places and with random distortions if `augment`, in the middle otherwise) and scaled to `[-1, 1]`.

    Raises:
        `ValueError`: If `args` or `num_channels` ask for something that images cannot be.
    """
    if num_channels not in PIL_MODES:
        raise ValueError(
            f"`in_channels` of the tokenizer must be one of {list(PIL_MODES)} for images, got {num_channels}."
        )
    if args.interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {list(INTERPOLATIONS)}, got {args.interpolation!r}.")
    if args.resize_ratio < 1:
        raise ValueError(f"`resize_ratio` must be at least 1, got {args.resize_ratio}.")
    height, width = image_size
    interpolation = INTERPOLATIONS[args.interpolation]
    distortions: list[Callable[[Image.Image], Image.Image]] = []
    if augment and args.horizontal_flip:
        distortions.append(v2.RandomHorizontalFlip())
    if augment and (args.augment_rotation or args.augment_translation or args.augment_zoom or args.augment_shear):
        distortions.append(random_affine(args, image_size))
    crop = v2.RandomCrop(image_size) if augment else v2.CenterCrop(image_size)

    def transform(image: Image.Image) -> torch.Tensor:
        image = image.convert(PIL_MODES[num_channels])
        ratio = args.resize_ratio * max(height / image.height, width / image.width)
        # Rounding may cost a pixel, which the cut needs.
        size = (max(width, round(image.width * ratio)), max(height, round(image.height * ratio)))
        image = image.resize(size, resample=interpolation)
        if size != (width, height):
            image = crop(image)
        for distortion in distortions:
            image = distortion(image)
        return transforms.pil_to_tensor(image).float().div_(127.5).sub_(1)  # (channels, height, width)

    return transform


def random_affine(args: TrainingArguments, image_size: tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
    """
    Rotation, shift, zoom and shear by random amounts. torchvision's own `RandomAffine` shifts by whole pixels, which is
    all or nothing for small images.
    """
    height, width = image_size
    shift = args.augment_translation
    limits = torch.tensor(
        [
            args.augment_rotation,
            shift * width,
            shift * height,
            args.augment_zoom,
            args.augment_shear,
            args.augment_shear,
        ]
    )

    def distort(image: Any) -> Any:
        angle, right, down, zoom, *shear = ((torch.rand(6) * 2 - 1) * limits).tolist()
        return transforms.affine(image, angle, [right, down], 1 + zoom, shear, interpolation=InterpolationMode.BICUBIC)

    return distort


# --------------------------------------------------------------------------------------------------------------------
# Order


class EndlessDataset(Dataset):
    """
    An endless shuffled walk through a data set: item `position` is an item of epoch `position // length`, and both its
    place in the shuffled order and its augmentation follow from `seed` and `position` alone. A run can therefore be
    resumed at any position without a state, whatever was prefetched and however many processes load.

    Args:
        dataset (`datasets.Dataset`): The rows.
        collate_row (`Callable`): Turns a row into a dictionary of tensors or numbers.
        seed (`int`): Seed of the order and of the augmentation.
    """

    def __init__(self, dataset: datasets.Dataset, collate_row: Callable[[dict[str, Any]], dict[str, Any]], seed: int):
        self.dataset = dataset
        self.collate_row = collate_row
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def _row_index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return int(self._order[place])

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        columns = self.dataset[[self._row_index(position) for position in positions]]
        # torchvision draws from torch's default generator, which belongs to the training loop: give it back untouched.
        state = torch.get_rng_state()
        items = []
        for index, position in enumerate(positions):
            torch.default_generator.manual_seed((self.seed << 40) + position)
            items.append(self.collate_row({name: values[index] for name, values in columns.items()}))
        torch.set_rng_state(state)
        return items


def image_row(
    image_column: str, label_column: str | None, transform: Callable[[Image.Image], torch.Tensor]
) -> Callable:
    """Turns a row of images into `pixel_values` and, with a `label_column`, `class_labels`."""

    def collate_row(row: dict[str, Any]) -> dict[str, Any]:
        item = {"pixel_values": transform(row[image_column])}
        return item if label_column is None else item | {"class_labels": row[label_column]}

    return collate_row


def codes_row(label_column: str | None) -> Callable:
    """Turns a row of codes into `codes` and, with a `label_column`, `class_labels`."""

    def collate_row(row: dict[str, Any]) -> dict[str, Any]:
        item = {"codes": torch.as_tensor(row[CODES_COLUMN], dtype=torch.long)}
        return item if label_column is None else item | {"class_labels": row[label_column]}

    return collate_row


def first_items(dataset: EndlessDataset, number: int) -> dict[str, torch.Tensor]:
    """The first `number` items of the walk as one batch, augmented as in training."""
    return torch.utils.data.default_collate(dataset.__getitems__(range(number)))


@torch.no_grad()
def tokenized_copies(
    dataset: EndlessDataset, vqvae: VQVAEModel, copies: int, batch_size: int, show_progress: bool
) -> EndlessDataset:
    """
    The codes of `copies` augmented copies of every image, as an endless dataset in their place.

    Training on them costs less than encoding every batch anew. A resumed run makes the same ones again.
    """
    columns: dict[str, list[torch.Tensor]] = {}
    number = copies * len(dataset.dataset)
    mininterval = 0.1 if sys.stderr.isatty() else 30
    starts = tqdm(range(0, number, batch_size), desc="tokenize", disable=not show_progress, mininterval=mininterval)
    for first in starts:
        items = dataset.__getitems__(range(first, min(first + batch_size, number)))
        batch = torch.utils.data.default_collate(items)
        *_, codes = vqvae.encode(batch.pop("pixel_values").to(vqvae.device), return_dict=False)
        batch[CODES_COLUMN] = codes.cpu()
        for name, values in batch.items():
            columns.setdefault(name, []).append(values)
    table = datasets.Dataset.from_dict({name: torch.cat(values).numpy() for name, values in columns.items()})
    label_column = "class_labels" if "class_labels" in columns else None
    return EndlessDataset(table, codes_row(label_column), dataset.seed)


def training_loader(
    dataset: EndlessDataset, args: TrainingArguments, num_processes: int, first_step: int
) -> DataLoader:
    """Batches from optimizer step `first_step` to the last one, for all processes together."""
    images_per_step = args.train_batch_size * num_processes * args.gradient_accumulation_steps
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        sampler=range(first_step * images_per_step, args.max_train_steps * images_per_step),
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Without its own, an iterator takes a number from torch's default generator, and a resumed run has one more.
        generator=torch.Generator(),
    )


def validation_loader(dataset: datasets.Dataset, collate_row: Callable, args: TrainingArguments) -> DataLoader:
    """The rows of `dataset` once, in their order."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return torch.utils.data.default_collate([collate_row(row) for row in rows])

    return DataLoader(
        cast(Dataset, dataset), batch_size=args.train_batch_size, collate_fn=collate, generator=torch.Generator()
    )
