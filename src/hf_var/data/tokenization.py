# SPDX-License-Identifier: Apache-2.0
"""
Images to parquet files of codes, once for all trainings on them.

The work is cut into units, each of which becomes one file. What a file holds depends on the images, the arguments and its
number alone, and it is written atomically. A resumed run encodes the units without a file. Who encodes is the engine: the
processes of Accelerate, which share the units, or the workers of a Ray cluster.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from accelerate import Accelerator
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from PIL import Image
from transformers.utils import logging

from ..autoencoders import Tokenizer, TokenizerConfig, load_tokenizer
from ..hub.names import is_hub_name, public_recipe, without_folders
from ..hub.push import push_card
from ..progress import progress_bar
from ..text_encoders import load_text_encoders
from .batches import warn_of_broken
from .codes import codes_schema, is_codes_dataset, tokenizer_fingerprint
from .codes_files import (
    FILES,
    SETTINGS_FILE,
    CodesCount,
    CodesFile,
    codes_path,
    count_codes,
    read_codes_settings,
)
from .conditions import (
    LabelCondition,
    find_label_column,
    label_condition,
    label_feature,
    training_labels,
)
from .encoding import CAPTIONS_COLUMN, EncodedPart, PartEncoder
from .engines import ENGINE_SETTINGS, load_cluster
from .images import ImageRows, ImageTransform, image_rows
from .resumable_settings import check_settings, write_settings
from .rows import Tally
from .sources import AnyDataset, load_source
from .text_conditions import caption_condition, embedded_caption_feature
from .tokenization_config import TokenizationConfig
from .work_units import IndexedUnits, StreamedUnits


logger = logging.get_logger(__name__)

# Arguments that may change while files are missing. The tokenizer counts by its fingerprint, wherever it lies.
FREE_SETTINGS = {
    "text_encoder",
    "text_encoder_2",
    "output_dir",
    "vqvae",
    "batch_size",
    "dataloader_num_workers",
    "max_broken_share",
    "license",
}
# Those that a reader of the result need not know either.
PRIVATE_SETTINGS = {*ENGINE_SETTINGS, "push_to_hub", "hub_dataset_id"}
FREE_SETTINGS |= PRIVATE_SETTINGS


# --------------------------------------------------------------------------------------------------------------------
# Data


class CropTransform(ImageTransform):
    """All crops of an image, each followed by its mirror image if `horizontal_flip`."""

    def __init__(
        self,
        config: TokenizationConfig,
        image_size: tuple[int, int],
        num_channels: int,
        num_classes: int | None = None,
    ):
        super().__init__(config, config if config.num_crops > 1 else None, image_size, num_channels, num_classes)
        self.num_crops = config.num_crops
        self.adds_mirrors = config.horizontal_flip
        # Both the image and its mirror image become rows, without randomness.
        self.flips = False

    def pixels(self, image: Image.Image | torch.Tensor, generator: random.Random | None = None) -> np.ndarray:
        """Bytes `(rows_per_image, channels, height, width)`, or class ids `(rows_per_image, height, width)`."""
        crops = []
        for _ in range(self.num_crops):
            crop = super().pixels(image, generator)
            crops += [crop, crop[..., ::-1]] if self.adds_mirrors else [crop]
        return np.stack(crops)


def find_labels(
    config: TokenizationConfig, dataset: AnyDataset
) -> tuple[LabelCondition | None, datasets.ClassLabel | datasets.Value | None]:
    """The labels and the type they are stored with; neither where `num_labels` is 0."""
    if config.num_labels == 0:
        return None, None
    # Numbers whose names are not known remain what they are.
    are_numbers = config.num_labels is None and isinstance(label_feature(dataset, config.label_column), datasets.Value)
    if are_numbers and isinstance(dataset, datasets.IterableDataset):
        return label_condition(dataset, find_label_column(dataset, config.label_column)), datasets.Value("int64")
    condition, id2label = training_labels(dataset, config.label_column, config.num_labels)
    names = list((id2label or {}).values())
    return condition, datasets.Value("int64") if are_numbers else datasets.ClassLabel(names=names)


def make_units(
    config: TokenizationConfig, dataset: AnyDataset, read_row: ImageRows, num_processes: int, begun: dict[str, Any]
) -> IndexedUnits | StreamedUnits:
    """What becomes a file each, cut as in the run that was `begun` in the same folder, if there was one."""
    images_per_batch = max(1, config.batch_size // config.rows_per_image)
    if isinstance(dataset, datasets.Dataset):
        return IndexedUnits(dataset, read_row, config.seed, config.rows_per_shard, images_per_batch)
    return StreamedUnits(dataset, read_row, config.seed, images_per_batch, num_processes, begun.get("units"))


# --------------------------------------------------------------------------------------------------------------------
# Run


def ray_engine(accelerator: Accelerator) -> Callable[..., Iterator[EncodedPart]]:
    """[`~hf_var.data.ray_engine.encode_with_ray`], or a `ValueError` if it cannot run."""
    load_cluster(accelerator.num_processes)
    from .ray_engine import encode_with_ray

    return encode_with_ray


def tokenize_dataset(config: TokenizationConfig, accelerator: Accelerator) -> CodesCount:
    """
    Write the codes of all images of a data set as parquet files with the columns `codes` and, where the images have
    labels, `label`, and a data set card. All processes call it together, with the engine "ray" a single one; called again
    with the same arguments, by either engine, it resumes. The random numbers of an image depend on `seed` and its place
    in the data set (in its shard, if it is streamed).
    """
    # All input is checked before any work.
    encode_with_ray = ray_engine(accelerator) if config.engine == "ray" else None
    vqvae = load_tokenizer(config.vqvae, dtype=torch.float32).requires_grad_(False)
    dataset = load_source("data", config.data, config.split, ["train"], config.streaming)
    if is_codes_dataset(dataset):
        raise ValueError(f"`data` = {config.data!r} has a column of codes already.")
    encoders, others = None, {}
    if config.caption_column is None:
        condition, stored_label = find_labels(config, dataset)
        others = {} if stored_label is None else {"label": stored_label}
    else:
        encoders = load_text_encoders(config.text_encoder, config.text_encoder_2, config.max_caption_length)
        condition = caption_condition(dataset, config.caption_column, encoders.tokenizers, encoders.length)
        widths = encoders.widths
        others = {
            CAPTIONS_COLUMN: embedded_caption_feature(widths["cross_attention_dim"], widths["pooled_projection_dim"])
        }
    image_size, in_channels = vqvae.config.image_size, vqvae.config.in_channels
    num_classes = vqvae.config.num_pixel_classes
    read_row = image_rows(config, None, dataset, image_size, in_channels, condition, num_classes)
    read_row.transform = CropTransform(config, image_size, in_channels, num_classes)
    begun = read_codes_settings(config.output_dir)
    num_processes = accelerator.num_processes if encode_with_ray is None else config.ray_actors
    units = make_units(config, dataset, read_row, num_processes, begun)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    settings |= {"vqvae": tokenizer_fingerprint(vqvae), **units.settings}
    text_fingerprint = None
    if encoders is not None:
        text_fingerprint = settings["text_encoder"] = encoders.fingerprint
    check_settings(config.output_dir, begun, settings)
    repo_id = Path(config.output_dir).resolve().name
    if config.push_to_hub and accelerator.is_main_process:
        repo_id = HfApi().create_repo(config.hub_dataset_id or repo_id, repo_type="dataset", exist_ok=True).repo_id

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_settings(Path(config.output_dir) / SETTINGS_FILE, settings)
    accelerator.wait_for_everyone()
    schema = codes_schema(vqvae, others, text_fingerprint)
    paths = [codes_path(config.output_dir, unit, units.number) for unit in range(units.number)]
    encoder = PartEncoder(config, vqvae, encoders, schema)

    def encode(missing: list[int]) -> Iterator[EncodedPart]:
        if encode_with_ray is not None:
            return encode_with_ray(encoder, units, missing)
        encoder.to(accelerator.device)
        parts = units.parts(missing, config.dataloader_num_workers)
        return (encoder.encode(part, accelerator) for part in parts)

    write_units(config, units, encode, paths, schema, accelerator)
    accelerator.wait_for_everyone()

    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"`output_dir` = {config.output_dir!r} must be one folder for all processes, lacks {missing[0]}."
        )
    count = count_codes(paths)
    Tally(count.images, count.broken_images).check(config.max_broken_share)
    if count.rows == 0:
        raise ValueError(f"No image of `data` = {config.data!r} can be read.")
    if accelerator.is_main_process:
        if count.broken_images > 0:
            logger.warning(f"{count.broken_images} of {count.images} images cannot be read and are left out.")
        describe = partial(
            make_codes_card,
            config,
            vqvae,
            count,
            repo_id,
            has_labels="label" in others,
            has_captions=encoders is not None,
        )
        describe().save(Path(config.output_dir) / "README.md")
        if config.push_to_hub:
            push_codes(config.output_dir, repo_id, describe(split=re.split(r"\W", str(dataset.split))[0]))
    return count


def write_units(
    config: TokenizationConfig,
    units: IndexedUnits | StreamedUnits,
    encode: Callable[[list[int]], Iterator[EncodedPart]],
    paths: list[Path],
    schema: pyarrow.Schema,
    accelerator: Accelerator,
) -> None:
    """Write the missing ones of this process's share of `paths`, the files of all units, which `encode` encodes."""
    own = list(range(accelerator.process_index, units.number, accelerator.num_processes))
    missing = [unit for unit in own if not paths[unit].exists()]
    before = count_codes([paths[unit] for unit in own if paths[unit].exists()])
    total = Tally(before.images, before.broken_images)
    is_shown, known = accelerator.is_local_main_process, {"total": units.num_rows(own), "initial": total.seen}
    progress = progress_bar(is_shown=is_shown, desc="tokenize", unit="image", **known)
    files: dict[int, CodesFile] = {}
    for part in encode(missing):
        if part.unit not in files:
            files[part.unit] = CodesFile(paths[part.unit], schema)
        file = files[part.unit]
        if part.tally.broken > 0 and total.last_reason is None:
            warn_of_broken(part.tally)
        file.tally.add(part.tally)
        total.add(part.tally)
        total.check(config.max_broken_share)
        if part.rows is not None:
            file.add(part.rows)
        if part.is_last:
            files.pop(part.unit).finish()
        progress.update(part.tally.seen)
    progress.close()


# --------------------------------------------------------------------------------------------------------------------
# Result


def make_codes_card(
    config: TokenizationConfig,
    vqvae: Tokenizer,
    count: CodesCount,
    repo_id: str,
    has_labels: bool,
    has_captions: bool = False,
    split: str | None = None,
) -> DatasetCard:
    """
    What the files hold and how to use them, for somebody who loads `repo_id`. The card's metadata name the `split` only on
    the Hub: of a folder with such metadata datasets caches the rows by the folder's name alone, and takes them for those
    of any other folder with that name.
    """
    tokenizer: TokenizerConfig = vqvae.config
    recipe = {name: value for name, value in asdict(config).items() if name not in PRIVATE_SETTINGS}
    configs = [{"config_name": "default", "data_files": [{"split": split, "path": FILES}]}]
    name = repo_id.split("/")[-1]
    card_data = DatasetCardData(
        license=config.license,
        pretty_name=name,
        tags=["image-tokens", "var"],
        source_datasets=[config.data] if is_hub_name(config.data) else None,
        configs=None if split is None else configs,
    )
    return DatasetCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("codes_card.md")),
        name=name,
        repo_id=repo_id,
        source=without_folders(config.data),
        count=count,
        rows_per_image=config.rows_per_image,
        length=sum(tokenizer.scale_lengths),
        codebook_size=tokenizer.codebook_size,
        maps=[f"{height}x{width}" for height, width in tokenizer.scale_sizes],
        has_labels=has_labels,
        has_captions=has_captions,
        model_class=type(vqvae).__name__,
        vqvae=without_folders(config.vqvae),
        fingerprint=tokenizer_fingerprint(vqvae),
        split=split or "train",
        recipe=public_recipe(recipe),
    )


def push_codes(output_dir: str | Path, repo_id: str, card: DatasetCard) -> None:
    """Upload the files of codes, in place of those that the repository has, and their card."""
    push_card(card, repo_id, "Describe the codes of a data set", repo_type="dataset")
    HfApi().upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=output_dir,
        allow_patterns=FILES,
        delete_patterns=FILES,
        commit_message="Upload the codes of a data set",
    )
