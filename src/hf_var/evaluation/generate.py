# SPDX-License-Identifier: Apache-2.0
"""Sampling of numbered images: each one depends only on the seed and its number."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

from ..data.resumable_settings import check_settings, read_settings, write_settings
from ..fingerprints import fingerprint
from ..metrics.feature_extractors import rgb_bytes
from ..pipelines.base import PipelineBase
from ..pipelines.options import resolve_sampling
from ..plain_options import PLAIN_OPTIONS
from .image_files import read_or_sample
from .image_sets import ImageSet
from .protocol import EvaluationConfig


logger = logging.get_logger(__name__)

SETTINGS_FILE = ".evaluation.json"
NUM_IMAGES = 50_000


def image_seed(seed: int, number: int) -> int:
    """Seed of an image. With `seed + number`, neighbouring seeds of a set would share images."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def image_label(number: int, num_labels: int) -> int | None:
    """
    Class of an image. The classes take turns: the parts of the Inception Score, and the first images of a set, are
    balanced.
    """
    return number % num_labels if num_labels > 0 else None


@torch.no_grad()
def sample_images(pipeline: Any, seed: int, sampling: Mapping[str, Any], numbers: Sequence[int]) -> torch.Tensor:
    """Images by number, bytes `(len(numbers), 3, height, width)`; `sampling` are arguments of the pipeline."""
    num_labels, device = len(pipeline.id2label), pipeline.device
    # Generators of the device, so that probabilities need not be copied to the CPU for every scale.
    generators = [torch.Generator(device).manual_seed(image_seed(seed, number)) for number in numbers]
    labels = [image_label(number, num_labels) for number in numbers]
    latents = pipeline(labels, generator=generators, output_type="latent", **sampling).images
    # Decoded here, since the pipeline's output in half precision would be rounded twice.
    return rgb_bytes(pipeline.vqvae.decode(latents=latents).sample)  # pyright: ignore[reportArgumentType]


class ClassifierScore:
    """
    How sure a classifier of the pipeline's classes is that images show theirs: the score of rejection sampling (Razavi
    et al. 2019, section 3.3; the "-re" rows of Tian et al. 2024, table 1).
    """

    def __init__(self, classifier: str, num_labels: int):
        try:
            self.model = AutoModelForImageClassification.from_pretrained(classifier).eval()
            self.processor = AutoImageProcessor.from_pretrained(classifier)
        except (OSError, ValueError) as error:
            raise ValueError(f"`classifier` = {classifier!r} is not an image classifier: {error}") from error
        if self.model.config.num_labels != num_labels:
            raise ValueError(
                f"`classifier` = {classifier!r} must have the {num_labels} classes of the model, got "
                f"{self.model.config.num_labels}."
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(batch,)` of `labels` `(batch,)` for images `(batch, channels, height, width)` in `[0, 1]`."""
        colour = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
        inputs = self.processor(list(colour), return_tensors="pt", do_rescale=False)
        logits = self.model(**inputs.to(self.model.device)).logits
        return logits.float().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


class SampledImages(ImageSet):
    """
    Images that a pipeline samples on demand, on a kind of device that it must be moved `to` before, and saves as PNG files;
    files that exist are reused.
    """

    image_size: tuple[int, int]

    def __init__(self, config: EvaluationConfig, pipeline: PipelineBase, device: torch.device):
        vqvae_config, num_labels = pipeline.vqvae.config, len(pipeline.id2label)
        self.image_size = vqvae_config.image_size
        self.statistics = {}
        self.folder = Path(config.output_dir) / "images"
        if getattr(pipeline.priors[0].config, "condition_channels", None) is not None:
            raise ValueError(
                f"`model` = {config.model!r} is conditioned on embeddings, which an evaluation does not have: sample the "
                "images with `class_embeds`, and evaluate them as `samples`."
            )
        config.check_preset(self.image_size, num_labels)
        config.refuse({"lpips_weights"}, "`model` is a pipeline, and LPIPS compares images with their reconstructions")
        if vqvae_config.num_output_channels not in (1, 3) or vqvae_config.num_pixel_classes is not None:
            kind = "" if vqvae_config.num_pixel_classes is None else " of class maps"
            raise ValueError(
                f"`model` must generate images of 1 or 3 channels, got {vqvae_config.num_output_channels}{kind}."
            )
        if config.classifier is not None and not num_labels:
            raise ValueError(f"`classifier` = {config.classifier!r} needs a model with classes.")
        self.num_images = config.num_images or NUM_IMAGES
        if num_labels and self.num_images % num_labels:
            logger.warning(f"{self.num_images} images of {num_labels} classes cannot be equally many of each.")
        sampling = _sampling_arguments(config, pipeline)
        models = {name: model for name, model in pipeline.components.items() if model is not None}
        score_fn = None
        if config.classifier is not None:
            score_fn = ClassifierScore(config.classifier, num_labels)
            models["classifier"] = score_fn.model
        self._pipeline, self._score_fn = pipeline, score_fn
        self.sample = partial(sample_images, pipeline, config.seed, {**sampling, "score_fn": score_fn})
        self.settings = {"seed": config.seed, "dtype": config.dtype, "classifier": config.classifier, **sampling}
        # Everything that the images depend on, except their number.
        self.description = {
            **{f"{name}_weights": fingerprint({}, model.state_dict()) for name, model in models.items()},
            "device": device.type,
            **self.settings,
        }

    def to(self, device: torch.device) -> None:
        """Move the models."""
        self._pipeline.to(device)
        if self._score_fn is not None:
            self._score_fn.model.to(device)

    def check_folder(self) -> None:
        """Raise a `ValueError` if the folder holds images that were sampled otherwise."""
        check_settings(self.folder.parent, read_settings(self.folder.parent / SETTINGS_FILE), self.description)

    def prepare(self, folder: Path) -> None:
        """Begin the folder of the images."""
        if not self.folder.exists():
            write_settings(self.folder.parent / SETTINGS_FILE, self.description)
            self.folder.mkdir()

    def read(self, numbers: range) -> torch.Tensor:
        return read_or_sample(self.folder, self.image_size, self.sample, numbers)


def _sampling_arguments(config: EvaluationConfig, pipeline: PipelineBase) -> dict[str, Any]:
    """The arguments of the pipeline's call, with defaults filled in."""
    sampling: Any = {name: getattr(config, name) for name in PLAIN_OPTIONS}
    for name in sampling.keys() - pipeline.call_options:
        if sampling.pop(name):
            raise ValueError(f"`{name}` is not an option of `model`, a {type(pipeline).__name__}.")
    if not pipeline.id2label:
        # Without classes, guidance has nothing to contrast with.
        sampling["guidance_scale"] = 1.0
    resolved = resolve_sampling(pipeline.vqvae.config, pipeline.config, sampling)
    pipeline.check_sampling(resolved)
    found = {name: getattr(resolved, name) for name in sampling}
    # These options may differ per scale; here one value serves all scales.
    found = {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
    return {**found, "num_candidates": config.num_candidates}
