# SPDX-License-Identifier: Apache-2.0
"""The readers of images and codes as functions of their configurations."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from . import batches, codes, images, validation
from .config import AugmentConfig, DataConfig


def _arguments(config: DataConfig, augment: AugmentConfig | None = None, seed: int = 0) -> Any:
    return SimpleNamespace(**asdict(config), **asdict(augment or AugmentConfig()), seed=seed)


def image_rows(data, augment, is_augmented, dataset, image_size, in_channels, label_column=None, num_labels=None):
    arguments = _arguments(data, augment)
    return images.image_rows(arguments, dataset, image_size, in_channels, is_augmented, label_column, num_labels)


class TrainingBatches(batches.TrainingBatches):
    def __init__(self, dataset, read_row, config, seed, process_index=0, num_processes=1):
        super().__init__(dataset, read_row, _arguments(config, seed=seed), process_index, num_processes)


class ValidationBatches(validation.ValidationBatches):
    def __init__(self, dataset, read_row, config, process_index=0, num_processes=1):
        arguments = _arguments(config)
        super().__init__(dataset, read_row, arguments, process_index, num_processes, config.validation_images)


def tokenized_copies(dataset, read_row, config, seed, vqvae, copies, show_progress):
    return codes.tokenized_copies(dataset, read_row, _arguments(config, seed=seed), vqvae, copies, show_progress)
