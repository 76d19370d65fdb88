# SPDX-License-Identifier: Apache-2.0
"""Setup and end of the trainings of both stages: rows, batches and the contents of model cards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from datasets import IterableDataset

from ..data import AnyDataset, DataConfig, TrainingBatches, ValidationBatches, load_source
from ..data.rows import RowReader
from .curves import curves_plot
from .run import RunConfig, TrainingRun


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
