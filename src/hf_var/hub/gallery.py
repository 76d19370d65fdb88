# SPDX-License-Identifier: Apache-2.0
"""A call that shows what a pipeline does, and the pictures that it draws, for the Hub's gallery."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..priors import RQTransformerConfig, TextVARConfig, VARConfig


FOLDER = "images"
# Of a model of texts whose captions are not known.
PROMPTS = ("a photo",)
# The Hub's category of all images that are not generated from a text or an image, also of those of classes.
WITHOUT_TEXT = "unconditional-image-generation"


class Example(NamedTuple):
    """What a pipeline is conditioned on, arguments as code, the Hub's category, and arguments with a text for each image."""

    kind: str
    code: str
    task: str = WITHOUT_TEXT
    inputs: Mapping[str, Any] = {}
    texts: Sequence[str] = ()


def example_of(pipeline: Any, prompts: Sequence[str] = PROMPTS) -> Example:
    """An example without inputs needs what only a user has."""
    config = pipeline.priors[0].config
    if config.num_labels:
        labels = _example_labels(pipeline)
        texts = [pipeline.id2label[pipeline.get_label_ids(label)[0]] for label in labels]
        return Example("Class-conditional", f"class_labels={labels!r}", inputs={"class_labels": labels}, texts=texts)
    reads_tokens = isinstance(config, RQTransformerConfig) and not config.has_classes
    encodes = isinstance(config, TextVARConfig) and pipeline.text_encoder is not None
    if encodes or (reads_tokens and pipeline.tokenizer is not None):
        # As JSON, whose texts are Python's, too, with the usual quotes.
        code = f"prompt={json.dumps(prompts[0] if len(prompts) == 1 else list(prompts), ensure_ascii=False)}"
        return Example("Text-conditional", code, "text-to-image", {"prompt": list(prompts)}, prompts)
    if isinstance(config, TextVARConfig):
        states = f"prompt_embeds=torch.zeros(1, 77, {config.cross_attention_dim})"
        pooled = f"pooled_prompt_embeds=torch.zeros(1, {config.pooled_projection_dim})"
        code = f"{states}, {pooled}, prompt_attention_mask=torch.ones(1, 77).long(), guidance_scale=1.0"
        return Example("Text-conditional", code, "text-to-image")
    if isinstance(config, VARConfig) and config.condition_channels is not None:
        # In place of the embeddings that a user has.
        return Example("Embedding-conditional", f"class_embeds=torch.zeros(2, {config.condition_channels})")
    if reads_tokens and pipeline.condition_vqvae is not None:
        code = 'condition_image=PIL.Image.open("condition.png")'
        return Example("Image-conditional", code, "image-to-image")
    if reads_tokens:
        ids = f"torch.zeros(1, {config.condition_length}, dtype=torch.long)"
        return Example("Token-conditional", f"condition_codes={ids}")
    return Example("Unconditional", "num_images_per_label=2", inputs={"num_images_per_label": 2}, texts=["-", "-"])


def draw_gallery(folder: Path, pipeline: Any, example: Example) -> list[dict[str, Any]]:
    """
    Draw the pictures of an example, which are those of the card's code, and return the `widget` of the card's metadata:
    nothing where there are no inputs, the models are on several devices, or images are no pictures.
    """
    devices = {weight.device for model in (*pipeline.priors, pipeline.vqvae) for weight in model.parameters()}
    tokenizer = pipeline.vqvae.config
    is_picture = tokenizer.num_output_channels in (1, 3, 4) and tokenizer.num_pixel_classes is None
    if not example.inputs or len(devices) > 1 or not is_picture:
        return []
    images = pipeline(**example.inputs, generator=torch.Generator().manual_seed(0)).images
    (folder / FOLDER).mkdir(exist_ok=True)
    widget = []
    for number, (text, image) in enumerate(zip(example.texts, images, strict=True)):
        url = f"{FOLDER}/example_{number}.png"
        image.save(folder / url)
        widget.append({"text": text, "output": {"url": url}})
    return widget


def _example_labels(pipeline: Any, number: int = 3) -> list[int | str]:
    """The first labels, by their names where these are unambiguous."""
    labels: list[int | str] = []
    for label, name in list(pipeline.id2label.items())[:number]:
        try:
            is_known = pipeline.get_label_ids(name) == [label]
        except ValueError:
            is_known = False
        labels.append(name if is_known else label)
    return labels
