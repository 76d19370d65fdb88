# SPDX-License-Identifier: Apache-2.0
"""Drawing images so that each one depends on the seed and its number alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..metrics.feature_extractors import rgb_bytes
from ..pipelines import VARPipeline


def image_seed(seed: int, number: int) -> int:
    """
    Seed of an image. Neighbouring seeds of a set share no images, as `seed + number` would.

    Args:
        seed (`int`): Seed of the set, from 0.
        number (`int`): Number of the image, from 0.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def image_label(number: int, num_labels: int) -> int | None:
    """
    Class of an image; `None` where the model has none. The classes take turns: the Inception Score is a mean over runs of
    5,000 images, which must hold all classes, and the first images of a set are a balanced set as well.
    """
    return number % num_labels if num_labels > 0 else None


class ImageDrawer:
    """
    Draws images by number.

    Args:
        pipeline ([`VARPipeline`]): On its device.
        seed (`int`): Seed of the set.
        sampling (`dict[str, Any]`): Arguments of the pipeline's call, such as `guidance_scale`.
        score_fn (`Callable`, *optional*): With `num_candidates` in `sampling`, see [`VARPipeline.__call__`].
    """

    def __init__(
        self,
        pipeline: VARPipeline,
        seed: int,
        sampling: Mapping[str, Any],
        score_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.pipeline = pipeline
        self.seed = seed
        self.sampling = {**sampling, "score_fn": score_fn}

    def latents(self, numbers: Sequence[int]) -> torch.Tensor:
        """
        The latents of images.

        Args:
            numbers (`Sequence[int]`): Which images.

        Returns:
            `torch.Tensor` of shape `(len(numbers), channels, height, width)`.
        """
        config, device = self.pipeline.transformer.config, self.pipeline.device
        # Generators of the device: probabilities are not to be copied to the CPU for every draw.
        generators = [torch.Generator(device).manual_seed(image_seed(self.seed, number)) for number in numbers]
        labels = [image_label(number, config.num_labels or 0) for number in numbers]
        return self.pipeline(labels, generator=generators, output_type="latent", **self.sampling).images

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The images of latents: a `torch.ByteTensor` of shape `(batch, 3, height, width)`."""
        return rgb_bytes(self.pipeline.vqvae.decode(latents=latents).sample)  # pyright: ignore[reportArgumentType]


class ClassifierScore:
    """
    How sure a classifier is that images show their classes: the score of rejection sampling (Razavi et al. 2019, section
    3.3; the "-re" rows of Tian et al. 2024, table 1).

    Args:
        classifier (`str`): Folder or repository of an image classifier of transformers.
        num_labels (`int`): Classes of the pipeline. The classifier's must be the same, in the same order.
        device (`torch.device`): Where it works.

    Raises:
        `ValueError`: If it cannot be loaded or has another number of classes.
    """

    def __init__(self, classifier: str, num_labels: int, device: torch.device):
        try:
            self.model = AutoModelForImageClassification.from_pretrained(classifier).eval().to(device)
            self.processor = AutoImageProcessor.from_pretrained(classifier)
        except (OSError, ValueError) as error:
            raise ValueError(f"`classifier` = {classifier!r} is no image classifier: {error}") from error
        if self.model.config.num_labels != num_labels:
            raise ValueError(
                f"`classifier` = {classifier!r} must have the {num_labels} classes of the model, got "
                f"{self.model.config.num_labels}."
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Logarithms of the probabilities of `labels`.

        Args:
            images (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Images in `[0, 1]`.
            labels (`torch.LongTensor` of shape `(batch,)`): Their classes.

        Returns:
            `torch.FloatTensor` of shape `(batch,)`.
        """
        colour = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
        inputs = self.processor(list(colour), return_tensors="pt", do_rescale=False)
        logits = self.model(**inputs.to(self.model.device)).logits
        return logits.float().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
