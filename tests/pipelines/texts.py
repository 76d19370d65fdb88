# SPDX-License-Identifier: Apache-2.0
"""Pipelines of texts small enough to draw in milliseconds, with real encoders and tokenizers of texts."""

import functools

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from hf_var import TextVARConfig, TextVARTransformer, VARTextToImagePipeline
from parity import load_switti_case
from pipelines.tiny import SCHEDULE, make_vqvae, seeded
from priors.text import give_contrast


PROMPTS = ["a red cat on the mat", "two birds", "dark"]
WIDTHS = {1: 24, 2: 16}


@functools.cache
def make_tokenizer(number: int) -> CLIPTokenizer:
    """A tokenizer of the fixtures; the second one counts other tokens than the first."""
    return CLIPTokenizer.from_pretrained(load_switti_case().folder / f"tokenizer_{number}")


def make_text_encoder(number: int, seed: int = 0, **config) -> CLIPTextModel:
    tokenizer = make_tokenizer(number)
    sizes = {"hidden_size": WIDTHS[number], "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, **ids, **sizes}
    model = CLIPTextModel(CLIPTextConfig(**{**options, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=seeded(seed + parameter.numel()))
    return model.eval()


def make_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP of pictures of 16 pixels and of the texts of the first tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(load_switti_case().folder / "tokenizer_1", model_max_length=20)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, **ids, **sizes}
    vision = {"image_size": 16, "patch_size": 8, **sizes}
    # Vectors such as the class embedding come from torch's own generator.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=seeded(parameter.numel()))
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model.eval(), CLIPProcessor(images, tokenizer)


def make_text_transformer(seed: int = 1, **config) -> TextVARTransformer:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    widths = {"cross_attention_dim": sum(WIDTHS.values()), "pooled_projection_dim": WIDTHS[2]}
    return give_contrast(TextVARTransformer(TextVARConfig(**{**SCHEDULE, **widths, **sizes, **config})), seed).eval()


def make_text_pipeline(
    transformer: dict | None = None, vqvae: dict | None = None, has_encoders: bool = True, **schedule
) -> VARTextToImagePipeline:
    """A pipeline of tiny components; `schedule` goes to both models, the two dictionaries to one of them."""
    encoders = {}
    if has_encoders:
        for number, suffix in ((1, ""), (2, "_2")):
            encoders[f"text_encoder{suffix}"] = make_text_encoder(number)
            encoders[f"tokenizer{suffix}"] = make_tokenizer(number)
    transformer = make_text_transformer(**schedule, **transformer or {})
    pipe = VARTextToImagePipeline(transformer, make_vqvae(**schedule, **vqvae or {}), **encoders)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings_of(pipe: VARTextToImagePipeline, *args, **kwargs) -> dict[str, torch.Tensor]:
    """What `encode_prompt` returns, as arguments of a call."""
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    names += ["prompt_attention_mask", "negative_prompt_attention_mask"]
    return dict(zip(names, pipe.encode_prompt(*args, **kwargs), strict=True))
