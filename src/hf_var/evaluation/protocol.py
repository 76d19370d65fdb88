# SPDX-License-Identifier: Apache-2.0
"""The arguments of an evaluation, and the published protocols that they may name."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from ..data.config import INTERPOLATION_NAMES
from ..data.engines import ENGINE_SETTINGS, EngineConfig
from ..hub.names import is_hub_name
from ..metrics.protocol import NUM_NEIGHBORS
from ..ranges import CheckedFields, Interval, NonNegativeInt, OneOf, PositiveInt, argument


REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True)
class Preset:
    """A published protocol: VAR's evaluation, with 50 images of each class and `cfg` 1.5, a guidance scale of 2.5."""

    image_size: tuple[int, int]
    reference: str
    num_labels: int = 1000
    num_images: int = 50_000
    guidance_scale: float = 2.5
    top_k: int = 900
    top_p: float = 0.96
    temperature: float = 1.0
    smooth: bool = False
    num_candidates: int = 1
    feature_extractor: str = "inception"


PRESETS = {
    "imagenet256": Preset((256, 256), f"{REFERENCES}/256/VIRTUAL_imagenet256_labeled.npz"),
    "imagenet512": Preset((512, 512), f"{REFERENCES}/512/VIRTUAL_imagenet512.npz"),
}


@dataclass(kw_only=True)
class SamplingConfig(CheckedFields):
    """Arguments of sampling. They do not apply to existing images or to a tokenizer."""

    seed: NonNegativeInt = argument(0, help="fixes all images, each by a seed of its own")
    guidance_scale: float | None = argument(
        None, help="the official cfg plus 1; default: the preset's or the pipeline's"
    )
    top_k: int | None = argument(None, help="default: the preset's or the pipeline's")
    top_p: float | None = argument(None, help="default: the preset's or the pipeline's")
    temperature: float | None = argument(None, help="default: the preset's or the pipeline's")
    smooth: bool = argument(False, help="the official more_smooth, which worsens metrics")
    classifier: str | None = argument(
        None, help="image classifier of transformers for rejection sampling, with the same class ids"
    )
    num_candidates: PositiveInt = argument(
        1, help="candidates for each image, of which the classifier's favourite is kept"
    )
    dtype: Annotated[str, OneOf("float32", "bfloat16", "float16")] = argument(
        "float32", help="float32, bfloat16 or float16; of the model"
    )


@dataclass(kw_only=True)
class EvaluationConfig(SamplingConfig, EngineConfig):
    """Arguments of [`~hf_var.evaluation.run.evaluate`]. The preset fills in arguments that are not set."""

    output_dir: str = field(
        metadata={"help": "folder for the images, their features and the report", "aliases": ["--output"]}
    )
    model: str | None = argument(None, help="folder or repository of a pipeline or a tokenizer")
    samples: str | None = argument(None, help="existing images in place of a model: an .npz or a data set")
    preset: Annotated[str, OneOf(*PRESETS)] | None = argument(None, help=f"a published protocol: {', '.join(PRESETS)}")
    num_images: Annotated[int, Interval(above=NUM_NEIGHBORS)] | None = argument(
        None, help="images to sample, class by class in turn; default: 50000; of a tokenizer: all"
    )

    # Reference
    reference: str | None = argument(
        None, help="real images: an .npz of images, statistics or both, or a data set; default: the preset's"
    )
    reference_split: str | None = argument(None, help="default: train, or the only split")
    image_column: str | None = argument(None, help="default: the only column with images")
    interpolation: Annotated[str, OneOf(*INTERPOLATION_NAMES)] = argument(
        "lanczos", help="lanczos, bicubic, bilinear, hamming or box; of a data set as reference"
    )

    # Features
    feature_extractor: str = argument("inception", help="inception or package.module:callable")
    feature_extractor_weights: str | None = argument(
        None, help="file of weights; default: inception downloads its own"
    )
    lpips_weights: str | None = argument(None, help="file of VGG16's weights, to measure LPIPS of a tokenizer")

    # Run
    batch_size: PositiveInt = argument(64, help="images at once, per process")
    push_to_hub: bool = argument(False, help="add the metrics to the metadata of the model's card")
    hub_model_id: str | None = argument(None, help="default: the name of model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.samples is None):
            raise ValueError(f"Give one of `model` and `samples`, got {self.model!r} and {self.samples!r}.")
        if (self.classifier is None) != (self.num_candidates == 1):
            raise ValueError(
                f"`classifier` and `num_candidates` above 1 go together, got {self.classifier!r} and "
                f"{self.num_candidates}."
            )
        if self.push_to_hub and not is_hub_name(self.hub_model_id or self.model or "/"):
            raise ValueError(
                f"`push_to_hub` needs the repository's name in `hub_model_id`, since `model` is {self.model!r}."
            )
        if self.samples is not None:
            self.refuse({*SAMPLING, *ENGINE_SETTINGS, "num_images", "lpips_weights"}, "`samples` exist already")
        if self.preset is not None:
            for name, value in vars(PRESETS[self.preset]).items():
                if getattr(self, name, value) is None:
                    setattr(self, name, value)

    def refuse(self, names: Collection[str], reason: str) -> None:
        """Raise a `ValueError` that gives the reason if one of these arguments is not left at its default."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in names and value != entry.default:
                raise ValueError(f"`{entry.name}` = {value!r} has no meaning here: {reason}.")

    def check_preset(self, image_size: tuple[int, int], num_labels: int | None) -> None:
        """Raise a `ValueError` if the preset is for other images or, if known, for another number of classes."""
        preset = PRESETS.get(self.preset or "")
        if preset is not None and image_size != preset.image_size:
            raise ValueError(
                f"`preset` = {self.preset!r} is for images of {preset.image_size} pixels, got {image_size}."
            )
        if preset is not None and num_labels not in (None, preset.num_labels):
            raise ValueError(
                f"`preset` = {self.preset!r} is for models of {preset.num_labels} classes, got {num_labels}."
            )

    def departures(self, num_images: int, reference: Mapping[str, Any] | None) -> list[str]:
        """How the evaluation differs from its preset, by number of images and description of the reference."""
        if self.preset is None:
            return []
        preset, found = PRESETS[self.preset], []
        for name in ("num_images", *sorted(SAMPLING), "feature_extractor"):
            given = num_images if name == "num_images" else getattr(self, name)
            if given != getattr(preset, name, given):
                found.append(f"{name} is {given!r}, the preset has {getattr(preset, name)!r}")
        file = preset.reference.rsplit("/", 1)[-1]
        wanted = {"name": file, "num_images": 10_000, "statistics": ["mu", "sigma", "mu_s", "sigma_s"]}
        if reference is None or any(reference.get(name) != value for name, value in wanted.items()):
            found.append(f"the reference is not {file} with the moments of the training set and 10,000 images")
        if self.samples is not None:
            found.append("the images come from elsewhere, and it is not known how they were sampled")
        if self.feature_extractor_weights is not None:
            found.append("the feature extractor's weights are from a file, whose fingerprint is in the report")
        return found


SAMPLING = frozenset(entry.name for entry in fields(SamplingConfig))
