# SPDX-License-Identifier: Apache-2.0
"""
How the time of an image grows with the map of its codes, for models of the entrants' own sizes with random weights: all from
the class to the pixels, one image on one thread. The images have 4 times the side of the map. VAR's maps grow to the last one
as the published schedules do, VQ-VAE-2 has a map of half the side above the last one. An entrant whose tokenizer halves the
image once more than the others (RQ and the KL autoencoder alone on the digits) has maps of half the side.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DPMSolverMultistepScheduler
from speed.growth import schedule
from torch import nn

import hf_var
from hf_var import ARPipeline, VARPipeline
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, read_recipe
from hf_var.training.autoencoder_kl import autoencoder_kl_config

from .dit import DiTConfig, make_transformer
from .entrants import DIT, DataSet, Entrant, Training
from .samplers import DiffusionSampler, NormalSampler, PipelineSampler, Sampler


SIDES = (4, 8, 16)
FACTOR = 4
ROUNDS = 5
NUM_LABELS = 10
# The configurations whose fields a script's recipes have.
CONFIGURATIONS: dict[str, list[type]] = {
    "train_vqvae.py": [hf_var.VQVAEConfig, hf_var.HierarchicalVQVAEConfig],
    "train_autoencoder_kl.py": [AutoencoderKL],
    "train_var.py": [hf_var.VARConfig],
    "train_pixel_prior.py": [hf_var.PixelSNAILConfig, hf_var.PixelCNNConfig],
    "train_rq.py": [hf_var.RQTransformerConfig],
}


def measure_growth(data: DataSet, entrant: Entrant, sides: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Milliseconds of one image by the side of the map, the median of several calls."""
    found = {}
    for side in sides:
        torch.manual_seed(0)
        sampler = random_sampler(data, entrant, side)
        generator, times = torch.Generator().manual_seed(0), []
        for _ in range(rounds + 1):
            start = time.process_time()
            sampler.images([0], generator)
            times.append(time.process_time() - start)
        # The first call has costs of its own.
        found[str(side)] = 1000 * statistics.median(times[1:])
    return found


def random_sampler(data: DataSet, entrant: Entrant, side: int) -> Sampler:
    """An entrant that is not trained, for images of `FACTOR` times the side."""
    tokenizer_fields = recipe_fields(entrant.tokenizer, data.name)
    if entrant.priors and entrant.priors[0].script != DIT:
        return PipelineSampler(_pipeline(data, entrant, side, tokenizer_fields))
    num_levels = len(tokenizer_fields["block_out_channels"])
    config = autoencoder_kl_config({**tokenizer_fields, "sample_size": side * FACTOR})
    autoencoder: Any = AutoencoderKL(**config).eval()
    if not entrant.priors:
        return NormalSampler(autoencoder)
    names = {"hidden_size", "num_hidden_layers", "num_attention_heads"}
    sizes = DiTConfig(autoencoder="", latents="", output_dir="", **{name: data.dit[name] for name in names})
    transformer: Any = make_transformer(
        sizes, config["latent_channels"], side * FACTOR // 2 ** (num_levels - 1), NUM_LABELS
    )
    # As it is made, its output is zero.
    nn.init.normal_(transformer.proj_out_2.weight, std=0.02)
    return DiffusionSampler(DiTPipeline(transformer, autoencoder, DPMSolverMultistepScheduler()))  # pyright: ignore


def _pipeline(data: DataSet, entrant: Entrant, side: int, tokenizer_fields: dict[str, Any]) -> Any:
    fields = [recipe_fields(training, data.name) for training in entrant.priors]
    options: dict[str, Any] = {"guidance_scale": 1.0, "top_p": 1.0}
    if entrant.tokenizer.name == "vqvae2":
        config = hf_var.HierarchicalVQVAEConfig(**{**tokenizer_fields, "image_size": side * FACTOR})
        vqvae = hf_var.HierarchicalVQVAEModel(config).eval()
        priors: list[nn.Module] = []
        for level, (height, _) in enumerate(config.scale_sizes):
            coarser = {"condition_map_size": config.scale_sizes[level - 1]} if level > 0 else {}
            priors.append(_prior("PixelSNAIL", {**fields[level], **coarser, "map_size": height}, config))
        return ARPipeline(vqvae, priors[0], bottom_prior=priors[1], **options)
    # Every level but the last halves the image.
    side = side * FACTOR // 2 ** (len(tokenizer_fields["channel_multipliers"]) - 1)
    patch_nums = list(schedule(side)) if entrant.name == "var" else [side] * len(tokenizer_fields["patch_nums"])
    config = hf_var.VQVAEConfig(**{**tokenizer_fields, "patch_nums": patch_nums})
    vqvae = hf_var.VQVAEModel(config).eval()
    script = Path(entrant.priors[0].script).name
    if script == "train_pixel_prior.py":
        return ARPipeline(vqvae, _prior("PixelCNN", {**fields[0], "map_size": side}, config), **options)
    fields[0] |= {"patch_nums": patch_nums, "latent_channels": config.latent_channels}
    if script == "train_rq.py":
        return ARPipeline(vqvae, _prior("RQTransformer", fields[0], config), **options)
    if entrant.name == "raster":
        return ARPipeline(
            vqvae, _prior("VARTransformer", {**fields[0], "block_sizes": [1] * side**2}, config), **options
        )
    return VARPipeline(_prior("VARTransformer", fields[0], config), vqvae, **options)


def _prior(name: str, fields: dict[str, Any], tokenizer: Any) -> Any:
    """A prior of a class of the package, for the codes of a tokenizer."""
    config_class = getattr(hf_var, "VARConfig" if name == "VARTransformer" else f"{name}Config")
    config = config_class(**{**fields, "codebook_size": tokenizer.codebook_size, "num_labels": NUM_LABELS})
    return getattr(hf_var, name)(config).eval()


def recipe_fields(training: Training, data: str) -> dict[str, Any]:
    """What a recipe says about the model, as its configuration takes it."""
    classes = CONFIGURATIONS[Path(training.script).name]
    recipe = read_recipe(training.recipe_path(data) or "")
    fields_class = config_fields_class(*classes)
    known = fields_class.__dataclass_fields__
    arguments: list[str] = []
    for name, value in recipe.items():
        if name in known and value is not None:
            arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    (fields,) = parse_arguments([fields_class], arguments)
    return given_fields(fields)
