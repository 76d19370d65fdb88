# SPDX-License-Identifier: Apache-2.0
"""Tiny models and pipelines of every kind, and inputs for the models."""

import torch

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel
from pipelines import tiny_ar
from pipelines.stacked import image_pipeline, make_raster, make_stacked
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline, make_vqvae, seeded
from priors.pixels import pixel_inputs, pixel_prior
from priors.rq import rq_inputs, rq_model
from priors.text import text_inputs, text_model
from priors.tiny import tiny_inputs, tiny_model


def make_hierarchy() -> HierarchicalVQVAEModel:
    sizes = {"base_channels": 8, "residual_channels": 4, "latent_channels": 4, "codebook_size": 16, "in_channels": 1}
    model = HierarchicalVQVAEModel(HierarchicalVQVAEConfig(image_size=16, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=seeded(parameter.numel()))
    return model


def pixels(model, batch_size: int) -> torch.Tensor:
    """Images, or maps of class ids, that a tokenizer reads."""
    config = model.config
    if getattr(config, "num_pixel_classes", None) is not None:
        return torch.randint(config.num_pixel_classes, (batch_size, *config.image_size), generator=seeded())
    return torch.rand(batch_size, config.in_channels, *config.image_size, generator=seeded()) * 2 - 1


def codes(model, batch_size: int) -> torch.Tensor:
    config = model.config
    return torch.randint(config.codebook_size, (batch_size, sum(config.scale_lengths)), generator=seeded())


FSQ = {"quantizer": "fsq", "fsq_levels": (4, 3, 3, 2), "codebook_size": 72}
# Each with the inputs of its `forward` for a number of images.
MODELS = {
    "vqvae": (make_vqvae, lambda model, size: {"pixel_values": pixels(model, size)}),
    "fsq": (lambda: make_vqvae(**FSQ), lambda model, size: {"pixel_values": pixels(model, size)}),
    "class_maps": (
        lambda: make_vqvae(in_channels=5, sample_type="class_map"),
        lambda model, size: {"pixel_values": pixels(model, size)},
    ),
    "hierarchy": (make_hierarchy, lambda model, size: {"pixel_values": pixels(model, size)}),
    "var": (tiny_model, lambda model, size: tiny_inputs(model.config, size)),
    "shared_adaln": (
        lambda: tiny_model(shared_adaln=True, condition_channels=16),
        lambda model, size: tiny_inputs(model.config, size),
    ),
    "text": (lambda: text_model(crop_conditioning=True), lambda model, size: text_inputs(model.config, size)),
    "text_scales": (lambda: text_model(is_causal=False), lambda model, size: text_inputs(model.config, size)),
    "rq": (rq_model, lambda model, size: rq_inputs(model.config, size)),
    "rq_text": (lambda: rq_model("bidirectional"), lambda model, size: rq_inputs(model.config, size)),
    "gpt": (lambda: rq_model("gpt"), lambda model, size: rq_inputs(model.config, size)),
    "cnn": (lambda: pixel_prior("cnn"), lambda model, size: pixel_inputs(model.config, size)),
    "snail": (lambda: pixel_prior("snail_fine_classes"), lambda model, size: pixel_inputs(model.config, size)),
    "snail_attention": (lambda: pixel_prior("snail"), lambda model, size: pixel_inputs(model.config, size)),
}
PIPELINES = {
    "classes": make_pipeline,
    "texts": make_text_pipeline,
    "levels": lambda: tiny_ar.make_pipeline(2),
    "pixelcnn": tiny_ar.make_pipeline,
    "stacks": make_stacked,
    "condition_images": image_pipeline,
    "raster": lambda: make_raster((1, 2)),
}
