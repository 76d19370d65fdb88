# SPDX-License-Identifier: Apache-2.0
"""What the app does with a pipeline: functions of what a user gives, without a page."""

import math
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from .. import (
    VARImg2ImgPipeline,
    VARInpaintPipeline,
    VARPipeline,
    VARTextImg2ImgPipeline,
    VARTextInpaintPipeline,
    VARTextToImagePipeline,
)
from ..image_decoding import PIL_MODES, BrokenImageError, decode_picture
from ..pipelines.base import PipelineBase
from ..pipelines.checks import is_number
from ..pipelines.conditions import knows_unconditional
from ..pipelines.images import given_tokens, image_pixels, mask_pixels
from ..scoring import classify, log_likelihood
from .growing import growing_pictures


MAX_PICTURES = 16
MAX_PROMPTS = 100
# What a browser's numbers hold exactly, and torch takes.
MAX_SEED = 2**32 - 1
NO_PICTURE = "There is no picture yet: upload one, or send one here that was drawn."
# About the side of a picture that is painted on.
CANVAS_SIDE = 512
EDITS = {
    VARTextToImagePipeline: (VARTextInpaintPipeline, VARTextImg2ImgPipeline),
    VARPipeline: (VARInpaintPipeline, VARImg2ImgPipeline),
}


@dataclass
class Frame:
    """The pictures of a call so far, and the first one after each scale with the size of the scale's token map."""

    pictures: list[Image.Image]
    scales: list[tuple[Image.Image, str]] = field(default_factory=list)


@dataclass(frozen=True)
class SamplingInputs:
    """What a user chooses for all calls that draw."""

    condition: Any
    guidance_scale: Any
    number: Any
    seed: Any


class Demo:
    """A pipeline as the app uses it; `None` in place of the pipelines of edits that the model does not have."""

    def __init__(self, pipe: PipelineBase):
        if not isinstance(pipe, PipelineBase):
            raise ValueError(f"`pipe` must be a pipeline such as `VARPipeline`, got {type(pipe).__name__}.")
        self.config = pipe.vqvae.config
        channels = {self.config.in_channels, self.config.num_output_channels}
        if self.config.num_pixel_classes is not None or not channels <= PIL_MODES.keys():
            raise ValueError("`pipe` must make pictures, but its tokenizer codes class maps or other channels.")
        if getattr(pipe, "condition_vqvae", None) is not None:
            raise ValueError("`pipe` is conditioned on images, for which the app has no place.")
        encoders = getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None)
        if isinstance(pipe, VARTextToImagePipeline) and encoders == (None, None):
            raise ValueError("`pipe` must have text encoders, since the app draws of prompts.")
        kind = next((kind for kind in EDITS if isinstance(pipe, kind)), type(pipe))
        inpaint, vary = EDITS.get(kind, (None, None))
        self.pipe: Any = self._quiet(kind, pipe)
        self.inpaint_pipe: Any = None if inpaint is None else self._quiet(inpaint, pipe)
        self.vary_pipe: Any = None if vary is None else self._quiet(vary, pipe)

    @staticmethod
    def _quiet(kind: type, pipe: PipelineBase) -> PipelineBase:
        # The pipeline itself keeps what it was told, such as to compile.
        made: Any = copy(pipe) if type(pipe) is kind else kind.from_pipe(pipe)  # pyright: ignore
        made.set_progress_bar_config(disable=True)
        return made

    @property
    def reads_texts(self) -> bool:
        """Whether pictures are drawn of prompts."""
        return isinstance(self.pipe, VARTextToImagePipeline) or getattr(self.pipe, "tokenizer", None) is not None

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the classes by their ids, all different."""
        names = self.pipe.id2label
        times = Counter(names.values())
        return {key: name if times[name] == 1 else f"{name} ({key})" for key, name in names.items()}

    @property
    def knows_unconditional(self) -> bool:
        """Whether the model draws without a class, which guidance needs as well."""
        return all(knows_unconditional(prior.config) for prior in self.pipe.priors)

    @property
    def scale_names(self) -> list[str]:
        """Sizes of the token maps."""
        return [f"{height} x {width}" for height, width in self.config.scale_sizes]

    # ----------------------------------------------------------------------------------------------------------------
    # Drawing

    def draw(self, inputs: SamplingInputs) -> Iterator[Frame]:
        """Pictures of a prompt or a class."""
        return self._grow(self.pipe, inputs)

    def repaint(
        self, picture: Image.Image, mask: Image.Image, keeps_rest: bool, inputs: SamplingInputs
    ) -> Iterator[Frame]:
        """The picture with what is white in the mask drawn anew; the rest exactly as it is if `keeps_rest`."""
        if given_tokens(mask_pixels(mask, self.config), self.config).all():
            height, width = self.config.image_size
            rows, columns = height // self.config.latent_size[0], width // self.config.latent_size[1]
            raise ValueError(
                "Paint over the part of the picture that shall be drawn anew. The strokes must cover at least one half of a "
                f"square of {rows} x {columns} of its {height} x {width} pixels."
            )
        edits = {"image": self._off_canvas(picture), "mask_image": mask, "paste_original": bool(keeps_rest)}
        return self._grow(self.inpaint_pipe, inputs, **edits)

    def vary(self, picture: Image.Image, strength: Any, inputs: SamplingInputs) -> Iterator[Frame]:
        """Pictures with the coarse scales of another one."""
        return self._grow(self.vary_pipe, inputs, image=picture, strength=strength)

    def _grow(self, pipe: Any, inputs: SamplingInputs, **edits: Any) -> Iterator[Frame]:
        call = partial(pipe, **self._arguments(inputs), **edits)
        stages: dict[int, Image.Image] = {}
        for k, pictures in growing_pictures(call):
            if k is not None:
                stages[k] = pictures[0]
            yield Frame(pictures, [(picture, self.scale_names[k]) for k, picture in stages.items()])

    def _arguments(self, inputs: SamplingInputs) -> dict[str, Any]:
        """The arguments of a pipeline's call."""
        number = _integer("number of pictures", inputs.number, 1, MAX_PICTURES)
        seed = _integer("seed", inputs.seed, 0, MAX_SEED)
        given = {"guidance_scale": inputs.guidance_scale, "generator": torch.Generator().manual_seed(seed)}
        if not self.reads_texts:
            # A list would be as many pictures.
            if isinstance(inputs.condition, bool) or not isinstance(inputs.condition, int | str | None):
                raise ValueError(f"The class must be one of those that are offered, got {inputs.condition!r}.")
            return {"class_labels": inputs.condition, "num_images_per_label": number, **given}
        if not isinstance(inputs.condition, str) or not inputs.condition.strip():
            raise ValueError(f"The prompt must be a text, got {inputs.condition!r}.")
        return {"prompt": inputs.condition, "num_images_per_prompt": number, **given}

    # ----------------------------------------------------------------------------------------------------------------
    # Measuring

    def score(self, picture: Image.Image, condition: Any) -> tuple[list[tuple[str, float]], dict[str, float] | None]:
        """
        Bits per token of a picture of a class, or of the first of some prompts: of all tokens, then of each scale. And how
        probable each class is, or each prompt; `None` if there is nothing to choose from.
        """
        prompts = _prompts(condition) if self.reads_texts else None
        names = list(self.class_names.values()) if prompts is None else prompts
        given: Any = {"class_labels": condition} if prompts is None else {"prompt": prompts[0]}
        found = log_likelihood(self.pipe, picture, **given)
        pieces = [found.per_token[0], *found.per_token[0].split(self.config.scale_lengths)]
        named = zip(["all scales", *self.scale_names], pieces, strict=True)
        bits = [(name, -float(piece.mean()) / math.log(2)) for name, piece in named]
        if len(names) < 2:
            return bits, None
        choices: Any = {} if prompts is None else {"prompt": prompts}
        posterior = classify(self.pipe, codes=found.codes, **choices).posterior[0]
        return bits, dict(zip(names, posterior.tolist(), strict=True))

    def reconstruct(self, picture: Image.Image) -> list[tuple[Image.Image, str]]:
        """The picture as the model reads it, and what its codes keep after each scale."""
        codes = self.pipe.encode_images(picture)
        progress = [pictures[0] for pictures in self.pipe.decode_progress(codes)]
        return [(self.at_model_size(picture), "original"), *zip(progress, self.scale_names, strict=True)]

    # ----------------------------------------------------------------------------------------------------------------
    # Pictures

    def read_picture(self, path: str | None) -> Image.Image:
        """The picture in a file that a user uploaded."""
        if path is None:
            raise ValueError(NO_PICTURE)
        try:
            return decode_picture(path, self.config.in_channels, name=Path(path).name)
        except BrokenImageError as error:
            # Where the file lies is not the user's business.
            raise ValueError(f"The picture cannot be read: {str(error).replace(path, Path(path).name)}") from error

    def at_model_size(self, picture: Image.Image) -> Image.Image:
        """The picture as the model reads it."""
        pixels = image_pixels(picture, self.config)
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]

    def on_canvas(self, picture: Image.Image) -> Image.Image:
        """The same, large enough to be painted on."""
        picture = self.at_model_size(self._off_canvas(picture))
        return ImageOps.scale(picture, self._canvas_factor(), Image.Resampling.NEAREST)

    def _off_canvas(self, picture: Image.Image) -> Image.Image:
        """A picture of the canvas' size exactly as it was before it was enlarged; others as they are."""
        height, width = self.config.image_size
        factor = self._canvas_factor()
        return picture.reduce(factor) if picture.size == (width * factor, height * factor) else picture

    def _canvas_factor(self) -> int:
        return max(1, CANVAS_SIDE // max(self.config.image_size))


def _prompts(text: Any) -> list[str]:
    """Prompts that a user typed, one in a line, each once."""
    lines = [line.strip() for line in text.splitlines()] if isinstance(text, str) else []
    prompts = list(dict.fromkeys(filter(None, lines)))
    if not prompts:
        raise ValueError(f"There must be a prompt, or several, one in a line, got {text!r}.")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"There must be at most {MAX_PROMPTS} prompts, got {len(prompts)}.")
    return prompts


def _integer(name: str, value: Any, least: int, most: int) -> int:
    """A number that a user typed."""
    if not is_number(value) or not least <= value <= most or value != int(value):
        raise ValueError(f"The {name} must be an integer from {least} to {most}, got {value!r}.")
    return int(value)
