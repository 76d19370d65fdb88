# SPDX-License-Identifier: Apache-2.0
"""Setup and end of the trainings of both stages: rows, batches, measures and the contents of model cards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import IterableDataset
from torch import nn

from ..autoencoders import TokenizerConfig
from ..data import AnyDataset, DataConfig, TrainingBatches, ValidationBatches, load_source
from ..data.rows import RowReader
from ..metrics.feature_extractors import load_feature_extractor
from ..metrics.perceptual import PerceptualLoss
from ..ranges import CheckedFields, argument
from .adversary import AdversaryConfig
from .curves import curves_plot
from .losses import PixelLossConfig, ReconstructionConfig
from .run import RunConfig, TrainingRun


@dataclass(kw_only=True)
class FrechetConfig(CheckedFields):
    """Whether a validation measures the rFID of reconstructions."""

    rfid_extractor: str | None = argument(
        None, help="inception, or package.module:function that makes another extractor"
    )
    rfid_weights: str | None = argument(None, help="file of the weights of inception")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rfid_extractor is None and self.rfid_weights is not None:
            raise ValueError(f"`rfid_weights` = {self.rfid_weights!r} needs `rfid_extractor`.")


class Rows(NamedTuple):
    """A data set, and how its rows become items."""

    dataset: AnyDataset
    reader: RowReader

    @property
    def number(self) -> int | None:
        """How many there are; unknown of a stream."""
        return None if isinstance(self.dataset, IterableDataset) else len(self.dataset)


def load_splits(data: DataConfig, run: RunConfig) -> tuple[AnyDataset, AnyDataset | None]:
    """The rows of the training, and those of its validation if it has one."""
    if data.validation_data is None and run.validation_steps > 0:
        raise ValueError(f"`validation_steps` = {run.validation_steps} needs `validation_data`.")
    train = load_source("train_data", data.train_data, data.train_split, ["train"], data.streaming)
    if data.validation_data is None:
        return train, None
    splits = ["validation", "test"]
    return train, load_source("validation_data", data.validation_data, data.validation_split, splits, data.streaming)


def load_image_rows(
    data: DataConfig, run: RunConfig, make_reader: Callable[..., RowReader]
) -> tuple[Rows, Rows | None]:
    """The same with what `make_reader(dataset, augment=...)` makes of each; only those of the training are augmented."""
    train, validation = load_splits(data, run)
    rows = Rows(train, make_reader(train, augment=True))
    return rows, None if validation is None else Rows(validation, make_reader(validation, augment=False))


def check_autoencoder_run(
    run: RunConfig, data: DataConfig, frechet: FrechetConfig, adversary: AdversaryConfig
) -> None:
    """Raise a `ValueError` for arguments of several components that contradict each other."""
    if data.validation_data is None and frechet.rfid_extractor is not None:
        raise ValueError(f"`rfid_extractor` = {frechet.rfid_extractor!r} needs `validation_data`.")
    if adversary.adversarial_weight == 0:
        return
    if adversary.discriminator_start >= run.max_train_steps:
        raise ValueError(
            f"`discriminator_start` must be below `max_train_steps`, got {adversary.discriminator_start}."
        )
    if run.torch_compile:
        raise ValueError(
            "`torch_compile` cannot go with `adversarial_weight`, which takes several gradients of a graph."
        )
    if run.mixed_precision == "fp16":
        raise ValueError("`mixed_precision` fp16 has one loss scale, too few for two players: take bf16.")


def check_sample_type(
    tokenizer: TokenizerConfig,
    reconstruction: ReconstructionConfig,
    data: DataConfig,
    frechet: FrechetConfig,
    adversary: AdversaryConfig,
) -> None:
    """Raise a `ValueError` unless the objective and the metrics fit what the tokenizer reads, images or class maps."""
    if tokenizer.num_pixel_classes is None:
        if reconstruction.bce_weight > 0:
            raise ValueError(
                f"`bce_weight` must be 0.0 for a tokenizer of images, got {reconstruction.bce_weight}: it is for "
                "sample_type='class_map'."
            )
        return
    if reconstruction.bce_weight == 0:
        raise ValueError("`bce_weight` must be positive with sample_type='class_map', got 0.0.")
    given = {
        **{
            name: getattr(reconstruction, name) for name in ("l1_weight", "l2_weight", "lpips_weight", "lpips_weights")
        },
        "rfid_extractor": frechet.rfid_extractor,
        "adversarial_weight": adversary.adversarial_weight,
        "image_range": data.image_range,
    }
    for name, value in given.items():
        if value:
            needed = 0.0 if isinstance(value, float) else None
            raise ValueError(
                f"`{name}` must be {needed} with sample_type='class_map', whose samples are logits of classes and no "
                f"images, got {value!r}."
            )


def make_measures(
    pixel_loss: PixelLossConfig, frechet: FrechetConfig, image_shape: tuple[int, int, int], device: torch.device
) -> tuple[nn.Module | None, nn.Module | None]:
    """LPIPS and the feature extractor of rFID, each `None` unless an argument asks for it."""
    perceptual_loss, feature_extractor = None, None
    if pixel_loss.lpips_weight > 0 or pixel_loss.lpips_weights is not None:
        perceptual_loss = PerceptualLoss(image_shape[0], image_shape[1:], pixel_loss.lpips_weights).to(device)
    if frechet.rfid_extractor is not None:
        feature_extractor = load_feature_extractor(frechet.rfid_extractor, frechet.rfid_weights).to(device)
    return perceptual_loss, feature_extractor


def make_batches(
    config: DataConfig, seed: int, accelerator: Accelerator, train: Rows, validation: Rows | None
) -> tuple[TrainingBatches, ValidationBatches | None]:
    """This process's batches of the training, and those of its validation if it has one."""
    processes = accelerator.process_index, accelerator.num_processes
    batches = TrainingBatches(train.dataset, train.reader, config, seed, *processes)
    if validation is None:
        return batches, None
    return batches, ValidationBatches(validation.dataset, validation.reader, config, *processes)


def card_contents(
    run: TrainingRun,
    metrics: Sequence[str],
    curves: Sequence[str],
    captions: Mapping[str, str],
    marks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Plot the curves, and collect the metrics and pictures of a model card that the run has."""
    logged = [name for name in curves if run.log.last(name) is not None]
    run.write_image("curves", curves_plot(run.log.path, logged, marks))
    folder = Path(run.config.output_dir)
    values = {name: run.log.last(f"validation_{name}") for name in metrics}
    return {
        "metrics": {name: value for name, value in values.items() if value is not None},
        "pictures": {name: text for name, text in captions.items() if (folder / name).is_file()},
    }
