# SPDX-License-Identifier: Apache-2.0
"""What blocks say of themselves: the inputs, outputs, components and configurations that they share."""

import inspect
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ComponentSpec, ConfigSpec, InputParam, OutputParam
from transformers import CLIPTextModel, CLIPTokenizer

from ..autoencoders import VQVAEModel
from ..pipelines.conditions import Condition
from ..pipelines.options import SAMPLING_DEFAULTS, TEXT_SAMPLING_DEFAULTS, CallSettings
from ..pipelines.scale_sampling import GivenCodes
from ..priors import TextVARTransformer, VARTransformer


Images = PIL.Image.Image | np.ndarray | torch.Tensor | list

TRANSFORMER = ComponentSpec("transformer", VARTransformer, description="predicts the token maps")
TEXT_TRANSFORMER = ComponentSpec("transformer", TextVARTransformer, description="predicts the token maps")
VQVAE = ComponentSpec("vqvae", VQVAEModel, description="turns token maps into images")
TEXT_ENCODERS = [
    ComponentSpec("text_encoder", CLIPTextModel),
    ComponentSpec("tokenizer", CLIPTokenizer),
    ComponentSpec("text_encoder_2", CLIPTextModel),
    ComponentSpec("tokenizer_2", CLIPTokenizer),
]

# One line for each; the classes of the pipelines describe them in full.
DESCRIPTIONS = {
    "guidance_scale": "Classifier-free guidance, a number or a callable of (k, K); 1 is off, None the checkpoint's value.",
    "top_k": "Sample from this many most likely codes, one number or one per scale; 0 is off, None the default.",
    "top_p": "Sample from the most likely codes of this probability, as `top_k`; None is the checkpoint's value.",
    "temperature": "Divides the guided logits, as `top_k`; None is the checkpoint's value.",
    "smooth": "Mix code vectors instead of choosing one.",
    "logits_processor": "transformers' processors, which change the guided logits.",
    "refiner": "Another transformer, which samples the last scales.",
    "refiner_start": "First scale of the refiner.",
    "layer_hooks": "Changes of what the layers compute, such as token pruning.",
    "guidance_start": "First scale that is guided.",
    "guidance_end": "First scale that is not guided any more.",
    "smooth_start": "First scale of which code vectors are mixed.",
    "num_images_per_label": "Images for each label, next to each other, 1 by default.",
    "num_images_per_prompt": "Images for each prompt, next to each other, 1 by default.",
    "generator": "Source of randomness: one generator, or a list with one for each image.",
    "output_type": "Form of the images: 'pil', 'np', 'pt' or 'latent'.",
    "class_labels": "Ids or names of classes, one image each; None and -1 are unconditional.",
    "class_embeds": "Class embeddings (batch, condition_size) in place of `class_labels`.",
    "prompt": "Texts, one image each.",
    "negative_prompt": "What guidance leads away from, one text for all images or one for each prompt.",
    "prompt_embeds": "Hidden states of texts in place of `prompt`.",
    "negative_prompt_embeds": "Hidden states in place of `negative_prompt`.",
    "pooled_prompt_embeds": "Pooled vectors, beside `prompt_embeds`.",
    "negative_pooled_prompt_embeds": "Pooled vectors, beside `negative_prompt_embeds`.",
    "prompt_attention_mask": "1 for tokens and 0 for padding, beside `prompt_embeds`.",
    "negative_prompt_attention_mask": "The same, beside `negative_prompt_embeds`.",
    "original_size": "Height and width that the model shall take an image for a square crop of.",
    "image": "Images whose codes are given; those of another size are resized.",
    "mask_image": "White is repainted, black is kept.",
    "strength": "Share of the scales that are sampled, 0.5 by default.",
    "num_kept_scales": "Number of scales that are kept, in place of `strength`.",
    "paste_original": "Whether black areas of the mask show the original pixels.",
    "feather_width": "Pixels over which the original fades out, half a token by default.",
}
DEFAULTS = {**SAMPLING_DEFAULTS, **TEXT_SAMPLING_DEFAULTS, "paste_original": False}
DEFAULTS |= {entry.name: entry.default for entry in fields(CallSettings)}
# Two names that mean the same, of which one is passed.
NUMBERS = ("num_images_per_label", "num_images_per_prompt")
DEFAULTS |= dict.fromkeys(NUMBERS)

# What blocks hand on.
SETTINGS = {"name": "settings", "type_hint": CallSettings, "description": "How images are sampled, checked."}
CONDITION = {"name": "condition", "type_hint": Condition, "description": "What images are drawn for."}
PIXELS = {"name": "pixels", "type_hint": torch.Tensor, "description": "Images as the tokenizer reads them."}
MASK = {
    "name": "mask",
    "type_hint": torch.Tensor,
    "description": "1 where images are repainted, 0 where they are kept.",
}
NUM_GIVEN = {"name": "num_given_scales", "type_hint": int, "description": "Number of scales that images keep."}
GIVEN = {"name": "given", "type_hint": GivenCodes, "description": "Codes of images in place of sampled ones."}
LATENTS = {"name": "latents", "type_hint": torch.Tensor, "description": "Latents (batch, channels, height, width)."}
CODES = {"name": "codes", "type_hint": torch.Tensor, "description": "Sampled codes (batch, length), coarse to fine."}
IMAGES = {"name": "images", "type_hint": list, "description": "The images in the form of `output_type`."}
IMAGES["metadata"] = {"mellon": "image"}
# What a node of a user interface shows for an argument: all others are connected to other nodes.
NODES = {"prompt": "textbox", "negative_prompt": "textbox", "image": "image", "mask_image": "image"}
NODES |= {"smooth": "checkbox", "paste_original": "checkbox"}
NODES |= dict.fromkeys(NUMBERS, "number")


def needed(*values: dict[str, Any]) -> list[InputParam]:
    """Inputs that other blocks make."""
    return [InputParam(**value, required=True) for value in values]


def made(*values: dict[str, Any]) -> list[OutputParam]:
    """Outputs of a block."""
    return [OutputParam(**value) for value in values]


def option(name: str, type_hint: Any = None, **fields: Any) -> InputParam:
    """An argument of the caller, with the default that it has in the pipelines."""
    node: Any = {"mellon": NODES[name]} if name in NODES else None
    return InputParam(name, type_hint, DEFAULTS.get(name), description=DESCRIPTIONS[name], metadata=node, **fields)


def options_of(kind: type) -> list[InputParam]:
    """All arguments of the caller that a typed dictionary lists."""
    return [option(name, hint) for name, hint in get_type_hints(kind).items()]


def configs_of(pipeline_class: type[DiffusionPipeline]) -> list[ConfigSpec]:
    """What a checkpoint of a pipeline may choose for itself, with the values for one that does not."""
    entries = inspect.signature(pipeline_class.__init__).parameters
    return [
        ConfigSpec(name, entry.default)
        for name, entry in entries.items()
        if entry.default not in (None, inspect.Parameter.empty)
    ]


def loaded(components: Any, *names: str) -> list[Any]:
    """Components of a pipeline; a `ValueError` if one is not loaded."""
    for name in names:
        if getattr(components, name, None) is None:
            raise ValueError(
                f"`{name}` is not loaded: call `load_components()`, or pass it to `update_components({name}=...)`."
            )
    return [getattr(components, name) for name in names]
