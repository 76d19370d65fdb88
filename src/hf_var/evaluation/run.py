# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its arguments to its report."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from transformers.utils import logging

from ..autoencoders import VQVAEModel
from ..data.resumable_settings import check_settings, read_settings, write_settings
from ..hub.push import create_repository
from ..metrics.feature_extractors import full_precision
from ..metrics.generation import kid_subset_size
from ..metrics.perceptual import PerceptualLoss
from ..metrics.reconstruction import measure_reconstruction
from ..pipelines import VARPipeline
from ..pipelines.settings import resolve_settings
from .arguments import DRAWING, PRESET_MODELS, EvaluationArguments
from .comparison import compute_figures
from .feature_extraction import DrawnImages, ImageSource, Outputs, Stopwatch, missing_batches, write_features
from .feature_files import FeatureFiles
from .generate import ClassifierScore, ImageDrawer
from .image_files import check_pngs, write_npz
from .image_sets import ImageSet
from .loading import check_number, check_reference, load_extractor, load_model, open_images, open_reference
from .report import environment, push_figures, weights_fingerprint, write_report


logger = logging.get_logger(__name__)

SETTINGS_FILE = ".evaluation.json"


def evaluate(args: EvaluationArguments, accelerator: Accelerator) -> dict[str, Any]:
    """
    Evaluate a pipeline, a tokenizer or images that were drawn before, and write the images, their features,
    `evaluation.json` and `evaluation.md` into the output folder. All processes call it together. It may be killed at any
    time: called again with the same arguments, it goes on with what is missing.

    Args:
        args ([`EvaluationArguments`]): The arguments.
        accelerator (`Accelerator`): The device and the processes.

    Returns:
        `dict[str, Any]`: What `evaluation.json` holds, on the main process; an empty dictionary on the others.

    Raises:
        `ValueError`:
            If the model, the reference, the extractor and the preset do not fit together, if images are broken, or if the
            folder was begun with other arguments.
    """
    if args.push_to_hub and accelerator.is_main_process:
        # A missing token is not to be found out at the end.
        args.hub_model_id = create_repository(args.output_dir, args.hub_model_id or args.model)
    model = None if args.model is None else load_model(args.model, args.dtype)
    if isinstance(model, VQVAEModel):
        return _evaluate_tokenizer(args, model, accelerator)
    return _evaluate_images(args, model, accelerator)


# --------------------------------------------------------------------------------------------------------------------
# Images


@dataclass
class Subject:
    """The images to judge: how many, what they depend on, where they come from and where their PNG files go."""

    num_images: int
    image_size: tuple[int, int]
    origin: dict[str, Any]
    source: ImageSource
    settings: dict[str, Any]
    report: dict[str, Any]
    image_folder: Path | None = None


def _evaluate_images(
    args: EvaluationArguments, pipeline: VARPipeline | None, accelerator: Accelerator
) -> dict[str, Any]:
    # Everything that can be wrong with the input is found before any work.
    stopwatch = Stopwatch()
    subject = _given(args) if pipeline is None else _drawn(args, pipeline, accelerator.device, stopwatch)
    extractor, extractor_origin = load_extractor(args, subject.image_size, accelerator.device)
    reference = open_reference(args, subject.image_size, accelerator)
    if reference is not None:
        check_reference(reference, extractor_origin["name"], extractor_origin["widths"])
    _begin_folder(args, subject, accelerator)

    begin = time.perf_counter()
    files = _feature_files(args, "samples", subject.num_images, {**subject.origin, **extractor_origin})
    outputs = Outputs(files, extractor, accelerator.device, stopwatch, subject.image_folder)
    _write_missing(args, subject.source, outputs, accelerator)
    seconds = {"wall": time.perf_counter() - begin, **stopwatch.seconds}
    known = None
    if reference is not None and reference.num_images > 0:
        origin = {"reference": reference.description, **extractor_origin}
        known = _feature_files(args, "reference", reference.num_images, origin)
        outputs = Outputs(known, extractor, accelerator.device, Stopwatch())
        _write_missing(args, _reader(reference), outputs, accelerator)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}

    figures = compute_figures(files, known, {} if reference is None else reference.statistics, accelerator.device)
    if subject.image_folder is not None:
        images = subject.image_folder, subject.num_images, subject.image_size
        if args.save_npz:
            write_npz(Path(args.output_dir) / "samples.npz", *images)
        else:
            check_pngs(*images)
    report = {
        "figures": figures,
        "departures": args.departures(subject.num_images, None if reference is None else reference.description),
        "settings": {
            **_settings(args, subject.image_size, subject.num_images),
            **subject.settings,
            "kid_subset_size": kid_subset_size(files.num_images, (known or files).num_images),
            "num_processes": accelerator.num_processes,
        },
        **subject.report,
        "reference": None if reference is None else reference.description,
        "feature_extractor": extractor_origin,
        "seconds": seconds,
    }
    return _finish(args, report, accelerator.device)


def _given(args: EvaluationArguments) -> Subject:
    """Images that were drawn before."""
    samples = open_images(args, "samples", str(args.samples))
    if samples.image_size is None:
        raise ValueError(f"`samples` = {args.samples!r} must hold images, got moments alone.")
    check_number("samples", samples.num_images)
    _check_preset(args, samples.image_size, None)
    return Subject(
        num_images=samples.num_images,
        image_size=samples.image_size,
        origin={"samples": samples.description},
        source=_reader(samples),
        settings={"samples_fingerprint": samples.description["fingerprint"]},
        report={"samples": samples.description},
    )


def _drawn(args: EvaluationArguments, pipeline: VARPipeline, device: torch.device, stopwatch: Stopwatch) -> Subject:
    """Images that are drawn as far as they are no files yet."""
    image_size, num_labels = pipeline.vqvae.config.image_size, pipeline.transformer.config.num_labels
    _check_preset(args, image_size, num_labels)
    args.refuse(["lpips_weights"], "`model` is a pipeline, and LPIPS compares images with their reconstructions")
    if pipeline.vqvae.config.num_output_channels not in (1, 3):
        raise ValueError(
            f"`model` must draw images of 1 or 3 channels, got {pipeline.vqvae.config.num_output_channels}."
        )
    number = args.resolved("num_images")
    if num_labels and number % num_labels:
        logger.warning(f"{number} images of {num_labels} classes cannot be equally many of each.")
    sampling = _sampling(args, pipeline)
    weights = {name: weights_fingerprint(getattr(pipeline, name)) for name in ("transformer", "vqvae")}
    pipeline.to(device)
    score_fn = None
    if args.classifier is not None:
        score_fn = ClassifierScore(args.classifier, num_labels, device)
        weights["classifier"] = weights_fingerprint(score_fn.model)
    drawer = ImageDrawer(pipeline, args.seed, sampling, score_fn)
    image_folder = Path(args.output_dir) / "images"
    run = {"dtype": args.dtype, "seed": args.seed, "classifier": args.classifier, "device": device.type}
    return Subject(
        num_images=number,
        image_size=image_size,
        origin={**{f"{model}_weights": digest for model, digest in weights.items()}, **run, **sampling},
        source=DrawnImages(drawer, image_folder, image_size, stopwatch),
        image_folder=image_folder,
        settings={"seed": args.seed, "dtype": args.dtype, "classifier": args.classifier, **sampling},
        report={"weights": weights},
    )


def _begin_folder(args: EvaluationArguments, subject: Subject, accelerator: Accelerator) -> None:
    """Make the folder, or see that what it holds was drawn alike."""
    path = Path(args.output_dir) / SETTINGS_FILE
    if subject.image_folder is not None:
        # Fewer images of a set are the first ones of more.
        check_settings(args.output_dir, read_settings(path), subject.origin)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        if subject.image_folder is not None:
            write_settings(path, subject.origin)
    accelerator.wait_for_everyone()
    if subject.image_folder is not None:
        subject.image_folder.mkdir(parents=True, exist_ok=True)


def _write_missing(args: EvaluationArguments, source: ImageSource, outputs: Outputs, accelerator: Accelerator) -> None:
    missing = missing_batches(outputs.files, source, args.batch_size)
    # Nobody writes before all have looked.
    accelerator.wait_for_everyone()
    own = missing[accelerator.process_index :: accelerator.num_processes]
    # Around all threads at once: the switch is the process's.
    with full_precision(accelerator.device.type):
        write_features([batch for batches in own for batch in batches], source, outputs, accelerator.is_main_process)


def _sampling(args: EvaluationArguments, pipeline: VARPipeline) -> dict[str, Any]:
    """The arguments of the pipeline's call, all of them by their values."""
    config = pipeline.transformer.config
    sampling = {name: args.resolved(name) for name in ("guidance_scale", "top_k", "top_p", "temperature")}
    if not config.num_labels:
        # What it would be guided away from is what it draws.
        sampling["guidance_scale"] = 1.0
    resolved = resolve_settings(
        pipeline.transformer,
        pipeline.config,
        **sampling,
        smooth=args.smooth,
        logits_processor=None,
        refiner=None,
        refiner_start=None,
    )
    if args.classifier is not None and not config.num_labels:
        raise ValueError(f"`classifier` = {args.classifier!r} needs a model with classes.")
    return {
        "guidance_scale": resolved.guidance_scale,
        "top_k": resolved.top_k[0],
        "top_p": resolved.top_p[0],
        "temperature": resolved.temperature[0],
        "smooth": args.smooth,
        "num_candidates": args.resolved("num_candidates"),
    }


def _check_preset(args: EvaluationArguments, image_size: tuple[int, int], num_labels: int | None) -> None:
    if args.preset is None:
        return
    wanted_size, wanted_labels = PRESET_MODELS[args.preset]
    if image_size != wanted_size:
        raise ValueError(f"`preset` = {args.preset!r} is for images of {wanted_size} pixels, got {image_size}.")
    if num_labels not in (None, wanted_labels):
        raise ValueError(f"`preset` = {args.preset!r} is for models of {wanted_labels} classes, got {num_labels}.")


def _reader(images: ImageSet) -> ImageSource:
    return lambda batches: images.read((batch.start, batch.stop) for batch in batches)


def _feature_files(args: EvaluationArguments, kind: str, number: int, origin: dict[str, Any]) -> FeatureFiles:
    return FeatureFiles(Path(args.output_dir) / "features", kind, number, args.images_per_file, origin)


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers


def _evaluate_tokenizer(args: EvaluationArguments, vqvae: VQVAEModel, accelerator: Accelerator) -> dict[str, Any]:
    config, device = vqvae.config, accelerator.device
    if args.preset is not None:
        raise ValueError(f"`preset` = {args.preset!r} is for pipelines, but `model` = {args.model!r} is a tokenizer.")
    args.refuse([name for name in DRAWING if name != "dtype"], "`model` is a tokenizer, which draws nothing")
    if config.in_channels not in (1, 3):
        raise ValueError(f"`model` must be a tokenizer of images of 1 or 3 channels, got {config.in_channels}.")
    extractor, extractor_origin = load_extractor(args, config.image_size, device)
    perceptual_loss = None
    if args.lpips_weights is not None:
        perceptual_loss = PerceptualLoss(config.num_output_channels, config.image_size, args.lpips_weights).to(device)
    images = open_reference(args, config.image_size, accelerator)
    if images is None or images.num_images == 0:
        raise ValueError(f"A tokenizer needs images to reconstruct as `reference`, got {args.reference!r}.")
    number = min(images.num_images, args.num_images or images.num_images)
    begin = time.perf_counter()
    batches = _tokenizer_batches(images, number, config.in_channels, args.batch_size, accelerator)
    with full_precision(device.type):
        figures, pictures = measure_reconstruction(vqvae.to(device), batches, accelerator, perceptual_loss, extractor)  # pyright: ignore[reportArgumentType]
    if not accelerator.is_main_process:
        return {}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        save = picture.savefig if isinstance(picture, Figure) else picture.save
        save(Path(args.output_dir) / f"{name}.png")
    report = {
        "figures": figures,
        "settings": {**_settings(args, config.image_size, number), "dtype": args.dtype},
        "weights": {"vqvae": weights_fingerprint(vqvae)},
        "reference": images.description,
        "feature_extractor": extractor_origin,
        "seconds": {"wall": time.perf_counter() - begin},
    }
    return _finish(args, report, device)


def _tokenizer_batches(
    images: ImageSet, number: int, in_channels: int, batch_size: int, accelerator: Accelerator
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches of the first images, in `[-1, 1]`."""
    starts = range(accelerator.process_index * batch_size, number, accelerator.num_processes * batch_size)
    for pixels in images.read((start, min(start + batch_size, number)) for start in starts):
        values = pixels.to(accelerator.device).float()
        if in_channels == 1:
            # As Pillow weighs colours. What is gray stays as it is.
            values = (
                (values * values.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True).round()
            )
        yield {"pixel_values": values / 127.5 - 1}


# --------------------------------------------------------------------------------------------------------------------
# Report


def _settings(args: EvaluationArguments, image_size: tuple[int, int], num_images: int) -> dict[str, Any]:
    settings = asdict(args) | {name: args.resolved(name) for name in ("feature_extractor", "reference")}
    # What a drawing was done with is told by what was drawn.
    for name in ("output_dir", "push_to_hub", "hub_model_id", "save_npz", *DRAWING):
        del settings[name]
    return {**settings, "image_size": list(image_size), "num_images": num_images}


def _finish(args: EvaluationArguments, report: dict[str, Any], device: torch.device) -> dict[str, Any]:
    report = {**report, "environment": environment(device)}
    write_report(args.output_dir, report)
    if args.push_to_hub:
        push_figures(str(args.hub_model_id or args.model), report["figures"], report)
    return report
