# SPDX-License-Identifier: Apache-2.0
"""Model cards of trained tokenizers, autoencoders and pipelines."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData

from ..autoencoders import HierarchicalVQVAEConfig, Tokenizer, TokenizerConfig, VQVAEConfig
from ..metrics.latents import latent_shape
from ..priors import RQTransformerConfig, TextVARConfig, VARConfig
from .gallery import PROMPTS, WITHOUT_TEXT, draw_gallery, example_of
from .names import is_hub_name, public_recipe, without_folders
from .results import metric_label, metric_results


# The Hub has no category for tokenizers; this is the one of encoders.
OF_TOKENIZERS = "image-feature-extraction"
# The Hub's categories of converted checkpoints, by what loads them; others generate images without texts.
CONVERTED_TASKS = {
    "VQVAEModel": OF_TOKENIZERS,
    "HierarchicalVQVAEModel": OF_TOKENIZERS,
    "TextVARTransformer": "text-to-image",
    "VARTextToImagePipeline": "text-to-image",
}
# Of the pictures in the Hub's gallery.
MAX_PROMPTS = 3


def write_model_card(
    output_dir: str | Path,
    vqvae: Tokenizer,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    pictures: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    Write the `README.md` of a tokenizer: how to use it, what it is, how good it is and how it was trained. `recipe`
    are the arguments of the training; `train_data`, `validation_data`, `validation_split` and `pretrained_vqvae`
    become metadata if they are names on the Hub. No path of this machine is published.
    """
    config: TokenizerConfig = vqvae.config
    bits = sum(config.scale_lengths) * math.log2(config.codebook_size)
    return _write_card(
        "vqvae_card.md",
        output_dir,
        {
            "pipeline_tag": OF_TOKENIZERS,
            "tags": ["image-tokenizer", "vq-vae", "var"],
            "base_model": _hub_name(recipe, "pretrained_vqvae"),
            "license": license,
        },
        "image-reconstruction",
        recipe,
        metrics,
        pictures,
        repo_id,
        model_class=type(vqvae).__name__,
        system=_system(config),
        config=config,
        num_tokens=sum(config.scale_lengths),
        bits=bits,
        compression=_pixel_bits(config) * math.prod(config.image_size) / bits if bits > 0 else math.inf,
        num_parameters=vqvae.num_parameters(),
        **_sizes(config),
    )


def _pixel_bits(config: TokenizerConfig) -> float:
    """Bits of a pixel, of bytes or one of several classes."""
    return 8 * config.in_channels if config.num_pixel_classes is None else math.log2(config.num_pixel_classes)


def write_autoencoder_kl_card(
    output_dir: str | Path,
    autoencoder: AutoencoderKL,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    pictures: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    The same for diffusers' `AutoencoderKL`, as [`write_model_card`], with `pretrained_autoencoder` in place of
    `pretrained_vqvae`.
    """
    shape = latent_shape(autoencoder.config)
    return _write_card(
        "autoencoder_kl_card.md",
        output_dir,
        {
            "library_name": "diffusers",
            "pipeline_tag": OF_TOKENIZERS,
            "tags": ["vae", "autoencoder-kl"],
            "base_model": _hub_name(recipe, "pretrained_autoencoder"),
            "license": license,
        },
        "image-reconstruction",
        recipe,
        metrics,
        pictures,
        repo_id,
        config=autoencoder.config,
        shape=shape,
        num_latents=math.prod(shape),
        num_parameters=autoencoder.num_parameters(),
    )


def write_pipeline_card(
    output_dir: str | Path,
    pipeline: Any,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    pictures: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    data_license: str | None = None,
    prompts: Sequence[str] | None = None,
) -> ModelCard:
    """
    Write the `README.md` of a [`VARPipeline`] or [`ARPipeline`], as [`write_model_card`], and the pictures that its example
    draws; `recipe` has `pretrained_var`, `vqvae`. `prompts` are texts for the example of a model of texts.
    """
    config = pipeline.priors[0].config
    is_var, is_stacked = isinstance(config, VARConfig | TextVARConfig), isinstance(config, RQTransformerConfig)
    tokenizer: VQVAEConfig = pipeline.vqvae.config
    unknown = "not stated"
    example = example_of(pipeline, list(prompts or PROMPTS)[:MAX_PROMPTS])
    system = "var" if is_var else ("rq-transformer" if config.depth > 1 else "vqgan") if is_stacked else "vq-vae"
    tags = [] if example.kind == "Unconditional" else [example.kind.lower()]
    widget = draw_gallery(Path(output_dir), pipeline, example)
    return _write_card(
        "pipeline_card.md",
        output_dir,
        {
            "pipeline_tag": example.task,
            "tags": [system, "autoregressive", *tags],
            "widget": widget or _widget(pictures),
            "base_model": _hub_name(recipe, "pretrained_var"),
            "license": license,
        },
        example.task,
        recipe,
        metrics,
        pictures,
        repo_id,
        kind=example.kind,
        has_gallery=len(widget) > 0,
        config=config,
        tokenizer=tokenizer,
        num_tokens=sum(tokenizer.scale_lengths),
        tokenizer_name=without_folders(recipe.get("vqvae") or recipe.get("pretrained_var") or "its own"),
        is_picture=tokenizer.num_output_channels in (1, 3, 4) or tokenizer.num_pixel_classes is not None,
        example=example.code,
        is_var=is_var,
        is_stacked=is_stacked,
        num_classes=config.num_labels,
        pipeline_class=type(pipeline).__name__,
        priors=[(type(prior).__name__, prior.num_parameters()) for prior in pipeline.priors],
        tokenizer_parameters=pipeline.vqvae.num_parameters(),
        sampling=[(name, pipeline.config[name]) for name in ("guidance_scale", "top_p", "temperature")],
        licenses=[
            ("code", "`hf_var`, Apache-2.0"),
            ("weights", license or unknown),
            (f"data, {without_folders(recipe['train_data'])}", data_license or unknown),
        ],
        **_sizes(tokenizer),
    )


def write_prior_card(
    output_dir: str | Path,
    prior: Any,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    pictures: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Write the `README.md` of the prior of a coarse level, which draws no images alone, as [`write_model_card`]."""
    arguments = "codes=codes, class_labels=torch.tensor([0])" if prior.config.num_labels else "codes=codes"
    return _write_card(
        "prior_card.md",
        output_dir,
        {"pipeline_tag": WITHOUT_TEXT, "tags": ["vq-vae", "autoregressive", "prior"], "license": license},
        WITHOUT_TEXT,
        recipe,
        metrics,
        pictures,
        repo_id,
        model_class=type(prior).__name__,
        config=prior.config,
        length=prior.config.length,
        arguments=arguments,
        num_parameters=prior.num_parameters(),
        tokenizer_name=without_folders(recipe.get("vqvae") or "its own"),
    )


def write_converted_card(
    output_dir: str | Path,
    model_class: str,
    origins: Sequence[Mapping[str, str | None]],
    license: str | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """
    Write the `README.md` of a converted checkpoint: where it comes from, and the licences of what was released there.

    Args:
        output_dir (`str` or `Path`): Its folder.
        model_class (`str`): What loads it.
        origins (`list[dict]`): Code bases, with `name`, `url`, `code_license` and `weights_license`.
        license (`str`, *optional*): Licence of these weights, by default that of the released ones.
        repo_id (`str`, *optional*): Its repository.
    """
    released = [origin["weights_license"] for origin in origins if origin["weights_license"]]
    folder = Path(output_dir).resolve()
    repo_id = repo_id or folder.name
    license = license or (released[0] if len(set(released)) == 1 else None)
    card = ModelCard.from_template(
        ModelCardData(
            library_name="hf_var",
            license=license,
            pipeline_tag=CONVERTED_TASKS.get(model_class, WITHOUT_TEXT),
            tags=["autoregressive", "converted"],
        ),
        template_str=Path(__file__).with_name("converted_card.md").read_text(encoding="utf-8"),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        model_class=model_class,
        origins=origins,
        is_non_commercial="-nc" in (license or ""),
    )
    card.save(folder / "README.md")
    return card


def _write_card(
    template: str,
    output_dir: str | Path,
    metadata: Mapping[str, Any],
    task: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
    pictures: Mapping[str, str] | None,
    repo_id: str | None,
    **contents: Any,
) -> ModelCard:
    """The part that all cards share; `contents` is what `template` needs in addition."""
    output_dir = Path(output_dir).resolve()
    pictures = pictures or {}
    for picture in pictures:
        if Path(picture).name != picture or not (output_dir / picture).is_file():
            raise ValueError(f"`pictures` must be names of files in `output_dir`, got {picture!r}.")
    repo_id = repo_id or output_dir.name
    name = repo_id.split("/")[-1]
    metrics = {key: round(value, 4) for key, value in (metrics or {}).items()}
    templates = [Path(__file__).with_name(part).read_text(encoding="utf-8") for part in (template, "card_results.md")]
    card = ModelCard.from_template(
        ModelCardData(
            datasets=_hub_name(recipe, "train_data"),
            model_name=name,
            eval_results=metric_results(
                metrics,
                task=task,
                dataset=_hub_name(recipe, "validation_data"),
                dataset_name=_dataset_name(recipe),
                split=recipe.get("validation_split"),
            )
            or None,
            **{"library_name": "hf_var", "widget": _widget(pictures), **metadata},
        ),
        template_str="".join(templates),
        name=name,
        repo_id=repo_id,
        dataset=_dataset_name(recipe),
        metrics=[(metric_label(key), value) for key, value in metrics.items()],
        pictures=[(quote(picture), caption) for picture, caption in pictures.items()],
        recipe=public_recipe(recipe),
        **contents,
    )
    card.save(output_dir / "README.md")
    return card


def _widget(pictures: Mapping[str, str] | None) -> list[dict[str, Any]] | None:
    """The pictures of a training as the Hub's gallery has them, without its curves."""
    shown = {name: caption for name, caption in (pictures or {}).items() if name != "curves.png"}
    return [{"text": caption, "output": {"url": quote(name)}} for name, caption in shown.items()] or None


def _sizes(tokenizer: TokenizerConfig) -> dict[str, Any]:
    height, width = tokenizer.image_size
    return {"height": height, "width": width, "maps": [f"{rows}x{columns}" for rows, columns in tokenizer.scale_sizes]}


def _system(config: TokenizerConfig) -> str:
    if isinstance(config, HierarchicalVQVAEConfig):
        if len(config.strides) == 1:
            return "VQ-VAE ([van den Oord et al. 2017](https://arxiv.org/abs/1711.00937))"
        return f"Hierarchical VQ-VAE of {len(config.strides)} levels ([VQ-VAE-2](https://arxiv.org/abs/1906.00446))"
    system = _schedule(config)
    if config.quantizer == "fsq":
        levels = " x ".join(map(str, config.fsq_levels or ()))
        system = f"{system} with finite scalar quantization ([FSQ](https://arxiv.org/abs/2309.15505)), {levels} levels"
    return system if config.num_pixel_classes is None else f"{system}, of maps of {config.num_pixel_classes} classes"


def _schedule(config: VQVAEConfig) -> str:
    if len(config.patch_nums) == 1:
        return "VQ-VAE with one token map"
    if len(set(config.scale_sizes)) == 1:
        return "Residual-quantized VAE (RQ-VAE)"
    return (
        "Multi-scale residual VQ-VAE, the tokenizer of visual autoregressive modeling ([VAR]("
        "https://arxiv.org/abs/2404.02905), section 3.2)"
    )


def _dataset_name(recipe: Mapping[str, Any]) -> str:
    return str(without_folders(recipe.get("validation_data") or recipe["train_data"]))


def _hub_name(recipe: Mapping[str, Any], name: str) -> str | None:
    value = recipe.get(name)
    return value if value is not None and is_hub_name(value) else None
