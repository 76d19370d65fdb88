# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its arguments to its report."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME
from matplotlib.figure import Figure
from torch import nn
from transformers.utils import logging

from ..autoencoders import Tokenizer, load_tokenizer
from ..data.engines import ENGINE_SETTINGS, load_cluster
from ..downloads import download_once
from ..fingerprints import fingerprint
from ..hub.push import create_repository
from ..metrics.feature_extractors import full_precision
from ..metrics.generation import DISTANCES, generation_metrics, kid_subset_size
from ..metrics.perceptual import PerceptualLoss
from ..metrics.protocol import NUM_NEIGHBORS
from ..metrics.reconstruction import measure_reconstruction
from ..pipelines.base import PipelineBase, load_pipeline
from .features import Engine, FeatureFiles, load_extractor, measure_here, write_features
from .generate import SampledImages
from .image_files import write_npz
from .image_sets import ImageSet, open_image_set
from .protocol import SAMPLING, EvaluationConfig
from .report import environment, push_metrics, write_report


logger = logging.get_logger(__name__)


def evaluate(config: EvaluationConfig, accelerator: Accelerator) -> dict[str, Any]:
    """
    Evaluate a pipeline, a tokenizer or existing images, and write the images, their features, `evaluation.json` and
    `evaluation.md` into the output folder. All processes call it together; called again with the same arguments, it
    resumes. Returns the content of `evaluation.json`, on the main process only.
    """
    repo_id = config.hub_model_id or config.model
    if config.push_to_hub and accelerator.is_main_process:
        # Fail on a missing token now, not after hours of sampling.
        repo_id = create_repository(config.output_dir, repo_id)
    cluster = load_cluster(accelerator.num_processes) if config.engine == "ray" else None
    model = None if config.model is None else load_model(config.model, config.dtype)
    if isinstance(model, Tokenizer):
        report = _evaluate_tokenizer(config, model, accelerator)
    else:
        with nullcontext() if cluster is None else cluster.cluster():
            device = accelerator.device if cluster is None else cluster.actor_device()
            report = _evaluate_images(config, model, accelerator, device)
    if accelerator.is_main_process:
        report["environment"] = environment(accelerator.device)
        write_report(config.output_dir, report)
        if config.push_to_hub:
            push_metrics(str(repo_id), report)
    return report


def load_model(name: str, dtype: str) -> PipelineBase | Tokenizer:
    """A pipeline or a tokenizer, in evaluation mode."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    try:
        is_pipeline = PipelineBase.load_config(name).get("_class_name") is not None  # pyright: ignore[reportAttributeAccessIssue]
    except OSError:
        is_pipeline = False
    try:
        if is_pipeline:
            pipeline = load_pipeline(name, **options)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline
        return load_tokenizer(name, **options).requires_grad_(False)
    except OSError as error:
        raise ValueError(f"`model` = {name!r} is neither a pipeline nor a tokenizer: {error}") from error


# --------------------------------------------------------------------------------------------------------------------
# Images


def _evaluate_images(
    config: EvaluationConfig, pipeline: PipelineBase | None, accelerator: Accelerator, sampling_device: torch.device
) -> dict[str, Any]:
    folder, device = Path(config.output_dir), accelerator.device
    # All input is checked before any work.
    samples = _existing_samples(config) if pipeline is None else SampledImages(config, pipeline, sampling_device)
    image_size = cast(tuple[int, int], samples.image_size)
    extractor, extractor_origin = load_extractor(
        config.feature_extractor, config.feature_extractor_weights, image_size, device
    )
    reference = _open_reference(config, image_size, accelerator)
    if reference is not None:
        _check_statistics(reference, extractor_origin)
    if isinstance(samples, SampledImages):
        samples.check_folder()
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        samples.prepare(folder / "features")
        if reference is not None:
            reference.prepare(folder / "features")

    begin = time.perf_counter()
    origin = {"samples": samples.description, **extractor_origin}
    files = FeatureFiles(folder / "features", "samples", samples.num_images, config.batch_size, origin)
    image_folder = samples.folder if isinstance(samples, SampledImages) else None
    write_features(files, _engine(config, samples, extractor, device), accelerator, image_folder)
    known = None
    if reference is not None and reference.num_images > 0:
        origin = {"reference": reference.description, **extractor_origin}
        known = FeatureFiles(folder / "features", "reference", reference.num_images, config.batch_size, origin)
        write_features(known, partial(measure_here, reference.read, extractor, device), accelerator)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}

    statistics = {} if reference is None else reference.statistics
    metrics = generation_metrics(files.load(), {} if known is None else known.load(), statistics, device)
    if image_folder is not None:
        write_npz(folder / "samples.npz", image_folder, samples.num_images, image_size)
    description = None if reference is None else reference.description
    settings = {"kid_subset_size": kid_subset_size(files.num_images, (known or files).num_images)}
    if isinstance(samples, SampledImages):
        settings |= samples.settings
    else:
        settings["samples_fingerprint"] = samples.description["fingerprint"]
    return {
        "metrics": metrics,
        "departures": config.departures(samples.num_images, description),
        "settings": {**_settings(config, image_size, samples.num_images, accelerator), **settings},
        "images": samples.description,
        "reference": description,
        "feature_extractor": extractor_origin,
        "seconds": time.perf_counter() - begin,
    }


def _engine(config: EvaluationConfig, samples: ImageSet, extractor: nn.Module, device: torch.device) -> Engine:
    """What measures the samples."""
    if config.engine == "ray" and isinstance(samples, SampledImages):
        # It comes with an extra.
        from .ray_engine import measure_with_ray

        return partial(measure_with_ray, samples, extractor, device, config.ray_actors)
    if isinstance(samples, SampledImages):
        samples.to(device)
    return partial(measure_here, samples.read, extractor, device)


def _existing_samples(config: EvaluationConfig) -> ImageSet:
    samples = _open_images(config, "samples", str(config.samples))
    if samples.image_size is None:
        raise ValueError(f"`samples` = {config.samples!r} must hold images, got moments alone.")
    config.check_preset(samples.image_size, None)
    return samples


def _open_reference(
    config: EvaluationConfig, image_size: tuple[int, int], accelerator: Accelerator
) -> ImageSet | None:
    """The reference images, of this height and width; `None` without a reference."""
    source = config.reference
    if source is None:
        logger.warning("Without a `reference` the only metric is the Inception Score, if the extractor has logits.")
        return None
    if urlsplit(source).scheme in ("http", "https", "file"):
        # Files of several addresses may have the same name.
        key = hashlib.sha256(source.encode()).hexdigest()[:12]
        with accelerator.main_process_first():
            source = str(download_once(source, Path(HF_HOME, "hf_var", "references", key), "reference"))
    return _open_images(config, "reference", source, split=config.reference_split, image_size=image_size)


def _open_images(config: EvaluationConfig, argument: str, source: str, **options: Any) -> ImageSet:
    if not source.endswith(".npz"):
        options |= {"image_column": config.image_column, "interpolation": config.interpolation}
    images = open_image_set(argument, source, **options)
    if 0 < images.num_images <= NUM_NEIGHBORS:
        raise ValueError(
            f"`{argument}` must have more than the {NUM_NEIGHBORS} images that precision and recall look at around each "
            f"one, has {images.num_images}."
        )
    return images


def _check_statistics(reference: ImageSet, extractor: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if stored moments have another number of features than the extractor."""
    if reference.statistics and extractor["name"] != "inception":
        logger.warning(
            f"The moments in the reference are taken to be of the feature extractor {extractor['name']!r}. Those of "
            "published files are of Inception."
        )
    for _, feature, mean, _ in DISTANCES:
        stored, width = reference.statistics.get(mean), extractor["widths"].get(feature)
        if stored is not None and width is not None and stored.shape != (width,):
            raise ValueError(
                f"`reference` has the moments {mean!r} of {stored.shape[-1]} features, but the feature extractor gives "
                f"{width} of the kind {feature!r}. Stored moments belong to one extractor."
            )


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers


def _evaluate_tokenizer(config: EvaluationConfig, vqvae: Tokenizer, accelerator: Accelerator) -> dict[str, Any]:
    image_size, in_channels, device = vqvae.config.image_size, vqvae.config.in_channels, accelerator.device
    if config.preset is not None:
        raise ValueError(
            f"`preset` = {config.preset!r} is for pipelines, but `model` = {config.model!r} is a tokenizer."
        )
    config.refuse((SAMPLING | ENGINE_SETTINGS) - {"dtype"}, "`model` is a tokenizer, which samples nothing")
    if in_channels not in (1, 3) or vqvae.config.num_pixel_classes is not None:
        kind = "" if vqvae.config.num_pixel_classes is None else " of class maps"
        raise ValueError(f"`model` must be a tokenizer of images of 1 or 3 channels, got {in_channels}{kind}.")
    extractor, extractor_origin = load_extractor(
        config.feature_extractor, config.feature_extractor_weights, image_size, device
    )
    perceptual_loss = None
    if config.lpips_weights is not None:
        perceptual_loss = PerceptualLoss(vqvae.config.num_output_channels, image_size, config.lpips_weights).to(device)
    images = _open_reference(config, image_size, accelerator)
    if images is None or images.num_images == 0:
        raise ValueError(f"A tokenizer needs images to reconstruct as `reference`, got {config.reference!r}.")
    with accelerator.main_process_first():
        images.prepare(Path(config.output_dir) / "features")
    number = min(images.num_images, config.num_images or images.num_images)
    begin = time.perf_counter()
    batches = _tokenizer_batches(images, number, in_channels, config.batch_size, accelerator)
    with full_precision(device.type):
        metrics, plots = measure_reconstruction(vqvae.to(device), batches, accelerator, perceptual_loss, extractor)  # pyright: ignore[reportArgumentType]
    if not accelerator.is_main_process:
        return {}
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        save = plot.savefig if isinstance(plot, Figure) else plot.save
        save(Path(config.output_dir) / f"{name}.png")
    return {
        "metrics": metrics,
        "settings": {**_settings(config, image_size, number, accelerator), "dtype": config.dtype},
        "images": {"vqvae_weights": fingerprint({}, vqvae.state_dict())},
        "reference": images.description,
        "feature_extractor": extractor_origin,
        "seconds": time.perf_counter() - begin,
    }


def _tokenizer_batches(
    images: ImageSet, number: int, in_channels: int, batch_size: int, accelerator: Accelerator
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches of the first images, in `[-1, 1]`."""
    starts = range(accelerator.process_index * batch_size, number, accelerator.num_processes * batch_size)
    for start in starts:
        values = images.read(range(start, min(start + batch_size, number))).to(accelerator.device).float()
        if in_channels == 1:
            # Pillow's weights of the colours; gray pixels stay unchanged.
            weights = values.new_tensor([0.299, 0.587, 0.114])[:, None, None]
            values = (values * weights).sum(dim=1, keepdim=True).round()
        yield {"pixel_values": values / 127.5 - 1}


def _settings(
    config: EvaluationConfig, image_size: tuple[int, int], num_images: int, accelerator: Accelerator
) -> dict[str, Any]:
    """The arguments that affect metrics, without those of sampling, which do not apply to all subjects."""
    others = SAMPLING | ENGINE_SETTINGS | {"output_dir", "push_to_hub", "hub_model_id"}
    settings = {name: value for name, value in asdict(config).items() if name not in others}
    counted = {"image_size": list(image_size), "num_images": num_images}
    return {**settings, **counted, "num_processes": accelerator.num_processes}
