# SPDX-License-Identifier: Apache-2.0
"""Arguments of an evaluation, and the published protocols they may name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.images import INTERPOLATIONS
from ..hub.names import is_hub_name
from ..metrics.generation import NUM_NEIGHBORS


REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
# The official evaluation of VAR: 50 images of each class, "cfg" 1.5, which is a guidance scale of 2.5.
_IMAGENET = {
    "num_images": 50_000,
    "guidance_scale": 2.5,
    "top_k": 900,
    "top_p": 0.96,
    "temperature": 1.0,
    "smooth": False,
    "num_candidates": 1,
    "feature_extractor": "inception",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "imagenet256": {**_IMAGENET, "reference": f"{REFERENCES}/256/VIRTUAL_imagenet256_labeled.npz"},
    "imagenet512": {**_IMAGENET, "reference": f"{REFERENCES}/512/VIRTUAL_imagenet512.npz"},
}
# What a preset asks of the model: images of this size, and this many classes.
PRESET_MODELS = {"imagenet256": ((256, 256), 1000), "imagenet512": ((512, 512), 1000)}
# Arguments of the drawing, which neither images that are there nor a tokenizer need.
DRAWING = (
    "seed",
    "guidance_scale",
    "top_k",
    "top_p",
    "temperature",
    "smooth",
    "classifier",
    "num_candidates",
    "dtype",
)
# Where neither a preset nor the command line says anything. `None` is what the pipeline itself has.
DEFAULTS: Mapping[str, Any] = {
    "num_images": 50_000,
    "guidance_scale": None,
    "top_k": None,
    "top_p": None,
    "temperature": None,
    "smooth": False,
    "num_candidates": 1,
    "feature_extractor": "inception",
    "reference": None,
}


@dataclass
class EvaluationArguments:
    """Arguments of [`~hf_var.evaluation.run.evaluate`]."""

    output_dir: str = field(metadata={"help": "folder for the images, their features and the report"})
    model: str | None = field(default=None, metadata={"help": "folder or repository of a pipeline or a tokenizer"})
    samples: str | None = field(
        default=None, metadata={"help": "images drawn before, in place of a model: an .npz or a data set"}
    )
    preset: str | None = field(default=None, metadata={"help": f"a published protocol: {', '.join(PRESETS)}"})

    # Reference
    reference: str | None = field(
        default=None,
        metadata={"help": "real images: an .npz of images, statistics or both, or a data set; default: the preset's"},
    )
    reference_split: str | None = field(default=None, metadata={"help": "default: train, or the only split"})
    image_column: str | None = field(default=None, metadata={"help": "default: the only column with images"})
    interpolation: str = field(
        default="lanczos", metadata={"help": "lanczos, bicubic, bilinear, hamming or box; of a data set as reference"}
    )

    # Images
    num_images: int | None = field(
        default=None, metadata={"help": "images to draw, class by class in turn; default: 50000; of a tokenizer: all"}
    )
    seed: int = field(default=0, metadata={"help": "fixes all images, each by a seed of its own"})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "the official cfg plus 1; default: the preset's or the pipeline's"}
    )
    top_k: int | None = field(default=None, metadata={"help": "default: the preset's or the pipeline's"})
    top_p: float | None = field(default=None, metadata={"help": "default: the preset's or the pipeline's"})
    temperature: float | None = field(default=None, metadata={"help": "default: the preset's or the pipeline's"})
    smooth: bool = field(default=False, metadata={"help": "the official more_smooth, which spoils figures"})
    classifier: str | None = field(
        default=None,
        metadata={"help": "image classifier of transformers for rejection sampling, with the same class ids"},
    )
    num_candidates: int | None = field(
        default=None, metadata={"help": "draw each image so often and keep the one that the classifier finds best"}
    )

    # Features
    feature_extractor: str | None = field(
        default=None, metadata={"help": "inception (default) or package.module:callable"}
    )
    feature_extractor_weights: str | None = field(
        default=None, metadata={"help": "file of weights; default: inception downloads its own"}
    )
    lpips_weights: str | None = field(
        default=None, metadata={"help": "file of VGG16's weights, to measure LPIPS of a tokenizer"}
    )

    # Run
    batch_size: int = field(default=64, metadata={"help": "images at once, per process"})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16; of the model"})
    images_per_file: int = field(
        default=250,
        metadata={"help": "images whose features become one file, the work that a process takes at a time"},
    )
    save_npz: bool = field(default=True, metadata={"help": "write samples.npz for OpenAI's evaluator"})
    push_to_hub: bool = field(default=False, metadata={"help": "add the figures to the metadata of the model's card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "default: the name of model"})

    def __post_init__(self):
        if (self.model is None) == (self.samples is None):
            raise ValueError(f"Give one of `model` and `samples`, got {self.model!r} and {self.samples!r}.")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {list(PRESETS)}, got {self.preset!r}.")
        for name in ("batch_size", "images_per_file", "num_candidates"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_images is not None and self.num_images <= NUM_NEIGHBORS:
            raise ValueError(
                f"`num_images` must be above the {NUM_NEIGHBORS} neighbours that precision and recall look at, got "
                f"{self.num_images}."
            )
        if self.seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {self.seed}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {self.dtype!r}.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {list(INTERPOLATIONS)}, got {self.interpolation!r}.")
        if (self.classifier is None) != ((self.num_candidates or 1) == 1):
            raise ValueError(
                f"`classifier` and `num_candidates` above 1 go together, got {self.classifier!r} and "
                f"{self.num_candidates}."
            )
        if self.push_to_hub and not is_hub_name(self.hub_model_id or self.model or "/"):
            raise ValueError(
                f"`push_to_hub` needs the repository's name in `hub_model_id`, since `model` is {self.model!r}."
            )
        if self.samples is not None:
            self.refuse([*DRAWING, "num_images", "lpips_weights"], "`samples` are drawn already")

    def resolved(self, name: str) -> Any:
        """The value of an argument that a preset may give: the command line's, the preset's or the default."""
        given = getattr(self, name)
        return given if given is not None else PRESETS.get(self.preset or "", DEFAULTS)[name]

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Raise a `ValueError` that gives the reason if one of these arguments is not left at its default."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` = {getattr(self, name)!r} has no meaning here: {reason}.")

    def departures(self, num_images: int, reference: Mapping[str, Any] | None) -> list[str]:
        """
        What is otherwise than in the preset.

        Args:
            num_images (`int`): Images that were measured.
            reference (`dict[str, Any]`, *optional*): What they were compared with, see
                [`~hf_var.evaluation.image_sets.ImageSet`].
        """
        preset = PRESETS.get(self.preset or "")
        if preset is None:
            return []
        found = []
        for name, value in preset.items():
            given = num_images if name == "num_images" else self.resolved(name)
            if name != "reference" and given != value:
                found.append(f"{name} is {given!r}, the preset has {value!r}")
        file = preset["reference"].rsplit("/", 1)[-1]
        wanted = {"name": file, "num_images": 10_000, "statistics": ["mu", "sigma", "mu_s", "sigma_s"]}
        if reference is None or any(reference.get(name) != value for name, value in wanted.items()):
            found.append(f"the reference is not {file} with the moments of the training set and 10,000 images")
        if self.samples is not None:
            found.append("the images were drawn elsewhere, and how is not known")
        if self.feature_extractor_weights is not None:
            found.append("the feature extractor's weights are from a file, whose fingerprint is in the report")
        return found
