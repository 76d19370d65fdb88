# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained tokenizer, and how a result gets to the Hub."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from ..autoencoders import VQVAEConfig, VQVAEModel


METRIC_LABELS = {
    "psnr": "PSNR in dB, higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "rfid": "rFID, lower is better",
    "usage": "share of the codebook in use, higher is better",
}
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What makes a result. Checkpoints and the trackers' logs lie in folders, which are left out as a whole: the client's `*`
# matches slashes, so that these patterns alone would find the weights in checkpoints, too.
RESULT_FILES = ["README.md", "*.json", "*.safetensors", "train_log.jsonl", "*.png"]
FOLDERS = ["*/*"]


def is_hub_name(value: str) -> bool:
    """
    Whether an argument of a training script that may be a path or a name on the Hub is the latter: what exists here is
    read from here.
    """
    return HUB_NAME.fullmatch(value) is not None and not value.endswith((".parquet", ".tar")) and not _exists(value)


def public_recipe(recipe: Mapping[str, Any]) -> str:
    """
    The arguments of a training as YAML that its script takes as a recipe: without those that were left at `None`, and
    with paths reduced to their last part, since folders tell of people and machines.

    Args:
        recipe (`dict[str, Any]`): Values by argument.
    """
    public = {name: _without_folders(value) for name, value in recipe.items() if value is not None}
    return yaml.safe_dump(public, sort_keys=False, allow_unicode=True).rstrip()


def write_model_card(
    output_dir: str | Path,
    vqvae: VQVAEModel,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    pictures: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    Write `README.md`: how to use the tokenizer, what it is, how good it is and how it was trained. No path of this
    machine appears in it.

    Args:
        output_dir (`str`): Folder of the result.
        vqvae ([`VQVAEModel`]): The trained tokenizer.
        recipe (`dict[str, Any]`):
            Arguments of the training; `train_data`, `validation_data`, `validation_split` and `pretrained_vqvae` also
            become metadata if they are names on the Hub.
        metrics (`dict[str, float]`, *optional*):
            Figures of the validation, such as those of [`~hf_var.training.metrics.ReconstructionMetrics`].
        pictures (`dict[str, str]`, *optional*): Captions by name of a file in `output_dir`, in the order to show them.
        repo_id (`str`, *optional*, defaults to the name of `output_dir`):
            What the example loads: the repository with its namespace, see [`create_repository`].
        license (`str`, *optional*): Identifier of a license, as the Hub has them, such as `apache-2.0`.

    Returns:
        `ModelCard`: What was written.

    Raises:
        `ValueError`: If a picture is not a file in `output_dir`.
    """
    output_dir = Path(output_dir).resolve()
    pictures = pictures or {}
    for picture in pictures:
        if Path(picture).name != picture or not (output_dir / picture).is_file():
            raise ValueError(f"`pictures` must be names of files in `output_dir`, got {picture!r}.")
    repo_id = repo_id or output_dir.name
    name = repo_id.split("/")[-1]
    metrics = {key: round(value, 4) for key, value in (metrics or {}).items()}
    config: VQVAEConfig = vqvae.config
    height, width = config.image_size
    num_tokens = sum(config.scale_lengths)
    bits = num_tokens * math.log2(config.codebook_size)
    card = ModelCard.from_template(
        _card_data(recipe, metrics, name, license),
        template_path=str(Path(__file__).with_name("vqvae_card.md")),
        name=name,
        repo_id=repo_id,
        system=_system(config),
        config=config,
        height=height,
        width=width,
        maps=[f"{rows}x{columns}" for rows, columns in config.scale_sizes],
        num_tokens=num_tokens,
        bits=bits,
        compression=8 * config.in_channels * height * width / bits if bits > 0 else math.inf,
        num_parameters=vqvae.num_parameters(),
        dataset=_dataset_name(recipe),
        figures=[(METRIC_LABELS.get(key, key), value) for key, value in metrics.items()],
        pictures=[(quote(picture), caption) for picture, caption in pictures.items()],
        recipe=public_recipe(recipe),
    )
    card.save(output_dir / "README.md")
    return card


def create_repository(output_dir: str | Path, repo_id: str | None = None) -> str:
    """
    Make sure that a repository exists and may be written to; at the start of a training, so that a missing token is not
    found out at its end.

    Args:
        output_dir (`str`): Folder of the result.
        repo_id (`str`, *optional*, defaults to the name of `output_dir`): Name, with or without a namespace.

    Returns:
        `str`: The name with the namespace.
    """
    return HfApi().create_repo(repo_id or Path(output_dir).resolve().name, exist_ok=True).repo_id


def push_result(output_dir: str | Path, repo_id: str | None = None) -> str:
    """
    Upload the model, its card, the pictures and `train_log.jsonl`. Everything in folders stays here: checkpoints with
    the optimizer's state and the trackers' logs.

    Args:
        output_dir (`str`): Folder of the result.
        repo_id (`str`, *optional*, defaults to the name of `output_dir`): Name, with or without a namespace.

    Returns:
        `str`: Address of the repository.
    """
    commit = HfApi().upload_folder(
        repo_id=create_repository(output_dir, repo_id),
        folder_path=output_dir,
        allow_patterns=RESULT_FILES,
        ignore_patterns=FOLDERS,
        commit_message="Upload the result of a training",
    )
    return str(commit.repo_url)


def _card_data(
    recipe: Mapping[str, Any], metrics: Mapping[str, float], name: str, license: str | None
) -> ModelCardData:
    dataset = _dataset_name(recipe)
    results = [
        EvalResult(
            task_type="image-reconstruction",
            dataset_type=_hub_name(recipe, "validation_data") or "images",
            dataset_name=dataset,
            dataset_split=recipe.get("validation_split"),
            metric_type=key,
            metric_name=METRIC_LABELS.get(key, key).split(",")[0],
            metric_value=value,
        )
        for key, value in metrics.items()
        # The Hub's metadata are read as JSON, too, which has no infinity.
        if math.isfinite(value)
    ]
    return ModelCardData(
        license=license,
        library_name="hf_var",
        # There is no category for tokenizers; this one is where people look for encoders.
        pipeline_tag="image-feature-extraction",
        tags=["image-tokenizer", "vq-vae", "var"],
        datasets=_hub_name(recipe, "train_data"),
        base_model=_hub_name(recipe, "pretrained_vqvae"),
        model_name=name,
        eval_results=results or None,
    )


def _system(config: VQVAEConfig) -> str:
    if len(config.patch_nums) == 1:
        return "VQ-VAE with one token map"
    if len(set(config.scale_sizes)) == 1:
        return "Residual-quantized VAE (RQ-VAE)"
    return (
        "Multi-scale residual VQ-VAE, the tokenizer of visual autoregressive modeling ([VAR]("
        "https://arxiv.org/abs/2404.02905), section 3.2)"
    )


def _dataset_name(recipe: Mapping[str, Any]) -> str:
    return str(_without_folders(recipe.get("validation_data") or recipe["train_data"]))


def _hub_name(recipe: Mapping[str, Any], name: str) -> str | None:
    value = recipe.get(name)
    return value if value is not None and is_hub_name(value) else None


def _without_folders(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_folders(entry) for entry in value]
    if isinstance(value, Path) or (isinstance(value, str) and _is_path(value)):
        return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]
    return value


def _is_path(value: str) -> bool:
    return re.search(r"[/\\]", value) is not None and not is_hub_name(value)


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except OSError:  # too long for a path
        return False
