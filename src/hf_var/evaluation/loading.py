# SPDX-License-Identifier: Apache-2.0
"""What an evaluation works with, checked before any work: the model, the reference and the feature extractor."""

import hashlib
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.utils import logging

from ..autoencoders import VQVAEModel
from ..metrics.feature_extractors import extract_features, full_precision, load_feature_extractor
from ..metrics.generation import DISTANCES, NUM_NEIGHBORS
from ..pipelines import VARPipeline
from .arguments import EvaluationArguments
from .download import find_reference
from .image_sets import ImageSet, open_image_set
from .report import weights_fingerprint


logger = logging.get_logger(__name__)


def load_model(name: str, dtype: str) -> VARPipeline | VQVAEModel:
    """
    A pipeline or a tokenizer, in evaluation mode.

    Raises:
        `ValueError`: If `name` is neither.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    try:
        is_pipeline = VARPipeline.load_config(name).get("_class_name") is not None  # pyright: ignore[reportAttributeAccessIssue]
    except OSError:
        is_pipeline = False
    try:
        if is_pipeline:
            pipeline = VARPipeline.from_pretrained(name, **options)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline
        return VQVAEModel.from_pretrained(name, **options).eval().requires_grad_(False)
    except OSError as error:
        raise ValueError(f"`model` = {name!r} is neither a pipeline nor a tokenizer: {error}") from error


def open_reference(
    args: EvaluationArguments, image_size: tuple[int, int], accelerator: Accelerator
) -> ImageSet | None:
    """The real images, of this height and width; `None` where there are none to compare with."""
    source = args.resolved("reference")
    if source is None:
        logger.warning("Without a `reference` the only figure is the Inception Score, if the extractor has logits.")
        return None
    with accelerator.main_process_first():
        source = find_reference(source)
    reference = open_images(args, "reference", source, split=args.reference_split, image_size=image_size)
    check_number("reference", reference.num_images)
    return reference


def open_images(args: EvaluationArguments, argument: str, source: str, **options: Any) -> ImageSet:
    """The images that an argument names, see [`~hf_var.evaluation.image_sets.open_image_set`]."""
    if not source.endswith(".npz"):
        options |= {"image_column": args.image_column, "interpolation": args.interpolation}
    return open_image_set(argument, source, **options)


def check_number(argument: str, number: int) -> None:
    """Raise a `ValueError` if a set has images, but too few of them for all figures."""
    if 0 < number <= NUM_NEIGHBORS:
        raise ValueError(
            f"`{argument}` must have more than the {NUM_NEIGHBORS} images that precision and recall look at around each "
            f"one, has {number}."
        )


def check_reference(reference: ImageSet, name: str, widths: dict[str, int]) -> None:
    """Raise a `ValueError` if stored moments are not of as many features as the extractor gives."""
    if reference.statistics and name != "inception":
        logger.warning(
            f"The moments in the reference are taken to be of the feature extractor {name!r}. Those of published files are "
            "of Inception."
        )
    for _, feature, mean, _ in DISTANCES:
        stored = reference.statistics.get(mean)
        if feature in widths and stored is not None and stored.shape != (widths[feature],):
            raise ValueError(
                f"`reference` has the moments {mean!r} of {stored.shape[-1]} features, but the feature extractor gives "
                f"{widths[feature]} of the kind {feature!r}. Stored moments are of one extractor alone."
            )


def load_extractor(
    args: EvaluationArguments, image_size: tuple[int, int], device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The feature extractor, tried on noise, and what the features depend on."""
    name = args.resolved("feature_extractor")
    extractor = load_feature_extractor(name, args.feature_extractor_weights).to(device)
    # What it does is not only a matter of its weights.
    noise = torch.randint(256, (2, 3, *image_size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with full_precision(device.type):
        found = extract_features(extractor, noise.to(device))
    digest = hashlib.sha256()
    for values in found.values():
        digest.update(values.cpu().numpy().tobytes())
    origin = {
        "name": name,
        "weights": weights_fingerprint(extractor),
        "features_of_noise": digest.hexdigest()[:16],
        "widths": {feature: values.shape[1] for feature, values in found.items()},
    }
    # The main process's, should others compute otherwise in the last bit.
    return extractor, broadcast_object_list([origin])[0]
