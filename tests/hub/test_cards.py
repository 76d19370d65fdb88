# SPDX-License-Identifier: Apache-2.0
"""What the card of a tokenizer says, and what it keeps to itself. `test_training_result.py` publishes one and runs its example."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VQVAEConfig, VQVAEModel
from hf_var.cli.arguments import config_fields_class, parse_arguments
from hf_var.data import AugmentConfig, DataConfig
from hf_var.hub.cards import write_model_card
from hf_var.training.optimization import OptimizerConfig
from hf_var.training.run import RunConfig


CONFIGURATIONS = [DataConfig, AugmentConfig, RunConfig, OptimizerConfig, config_fields_class(VQVAEConfig)]


@pytest.fixture(scope="module")
def vqvae() -> VQVAEModel:
    return make_vqvae((1, (2, 1), (4, 2)))


def make_vqvae(patch_nums: tuple) -> VQVAEModel:
    sizes = {"base_channels": 4, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]):
        return VQVAEModel(VQVAEConfig(**sizes, latent_channels=4, codebook_size=32, patch_nums=patch_nums))


def make_recipe(folder: Path, **values) -> dict:
    (folder / "data" / "birds").mkdir(parents=True, exist_ok=True)
    paths = {"train_data": str(folder / "data" / "birds"), "output_dir": str(folder / "result")}
    return recipe_of({**paths, **values})


def recipe_of(values: dict) -> dict:
    """All arguments with `values` among them."""
    recipe = {}
    for configuration in CONFIGURATIONS:
        names = {field.name for field in fields(configuration)}
        recipe |= asdict(configuration(**{name: value for name, value in values.items() if name in names}))
    return recipe


def written(folder: Path, vqvae: VQVAEModel, recipe: dict, **values) -> tuple[ModelCard, str]:
    (folder / "result").mkdir(exist_ok=True)
    write_model_card(folder / "result", vqvae, recipe, **values)
    text = (folder / "result" / "README.md").read_text(encoding="utf-8")
    assert "None" not in text
    assert not re.search(r"\n\n\n|[{}]|\s\n\n", text), "a template is not filled in or has gaps"
    return ModelCard.load(folder / "result" / "README.md"), text


def test_metadata_of_a_training_on_the_hub(vqvae, tmp_path) -> None:
    recipe = make_recipe(tmp_path, train_data="user/birds", validation_data="user/owls", validation_split="test")
    recipe["pretrained_vqvae"] = "user/older"
    metrics = {"psnr": 27.123456, "ssim": 0.9, "rfid": float("nan"), "usage": 0.5}
    card, text = written(tmp_path, vqvae, recipe, metrics=metrics, repo_id="user/name", license="apache-2.0")
    assert card.data.library_name == "hf_var"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert {"image-tokenizer", "vq-vae", "var"} <= set(card.data.tags)
    assert card.data.datasets == "user/birds"
    assert card.data.base_model == "user/older"
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == "name"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {key: result.metric_value for key, result in results.items()} == {
        "psnr": 27.1235,
        "ssim": 0.9,
        "usage": 0.5,
    }
    assert {(result.dataset_type, result.dataset_split) for result in results.values()} == {("user/owls", "test")}
    assert "| PSNR in dB, higher is better | 27.1235 |" in text
    assert "| rFID, lower is better | nan |" in text
    assert "On the validation images of user/owls" in text


def test_card_of_local_data_names_no_folder(vqvae, tmp_path) -> None:
    recipe = make_recipe(tmp_path, validation_data=f"{tmp_path}/data/birds-*.parquet")
    recipe["lpips_weights"] = Path("~/weights/vgg16.pth")
    card, text = written(tmp_path, vqvae, recipe, metrics={"psnr": 20.0})
    assert str(tmp_path) not in text
    for part in (*tmp_path.parts[1:], "~", "weights/"):
        assert part not in text.replace("lpips_weights", ""), part
    assert card.data.datasets is None
    assert card.data.base_model is None
    assert card.data.license is None
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("images", "birds-*.parquet")
    assert 'from_pretrained("result")' in text
    for line in ("train_data: birds", "output_dir: result", "lpips_weights: vgg16.pth"):
        assert line in text.splitlines()


def test_card_tells_what_the_model_is(vqvae, tmp_path) -> None:
    _, text = written(tmp_path, vqvae, make_recipe(tmp_path))
    # 11 tokens of 5 bits, for 8 x 4 pixels of three bytes
    for row in (
        "| image | 8 x 4 pixels, 3 channel(s) |",
        "| token maps (`patch_nums`) | 1x1, 2x1, 4x2 |",
        "| tokens per image | 11 |",
        "| codebook | 32 codes of 4 channels |",
        "| latents | 4x2, 2 times smaller than the image |",
        "| bits per image | 55, 14.0 times fewer than 8 per value |",
        f"| parameters | {sum(parameter.numel() for parameter in vqvae.parameters()):,} |",
    ):
        assert row in text.splitlines()
    assert "Multi-scale residual VQ-VAE" in text
    assert "## Results" not in text
    assert "![" not in text
    assert "Residual-quantized VAE" in written(tmp_path, make_vqvae((2, 2)), make_recipe(tmp_path))[1]
    assert "VQ-VAE with one token map" in written(tmp_path, make_vqvae((2,)), make_recipe(tmp_path))[1]


def test_card_of_a_hierarchy(tmp_path) -> None:
    fields = {
        "image_size": (16, 8),
        "base_channels": 4,
        "residual_channels": 4,
        "latent_channels": 4,
        "codebook_size": 32,
    }
    vqvae = HierarchicalVQVAEModel(HierarchicalVQVAEConfig(**fields))
    _, text = written(tmp_path, vqvae, make_recipe(tmp_path))
    for row in (
        "from hf_var import HierarchicalVQVAEModel",
        "| token maps (`patch_nums`) | 2x1, 4x2 |",
        "| codebooks, one for each map | 32 codes of 4 channels |",
        "| latents | 4x2, 4 times smaller than the image |",
        "| bits per image | 50, 61.4 times fewer than 8 per value |",
    ):
        assert row in text.splitlines()
    assert "Hierarchical VQ-VAE of 2 levels" in text
    one_level = HierarchicalVQVAEModel(HierarchicalVQVAEConfig(**fields, strides=(4,)))
    assert "\nVQ-VAE ([van den Oord et al. 2017]" in written(tmp_path, one_level, make_recipe(tmp_path))[1]


def test_recipe_of_the_card_is_a_recipe(vqvae, tmp_path, monkeypatch) -> None:
    values = {"patch_nums": ["1", "2x1"], "learning_rate": 1e-5, "horizontal_flip": True, "dropout": 0.1}
    recipe = make_recipe(tmp_path, **values)
    _, text = written(tmp_path, vqvae, recipe)
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block)
    read = {}
    for configuration in parse_arguments(CONFIGURATIONS, [str(tmp_path / "recipe.yaml")]):
        read |= asdict(configuration)
    assert read == recipe_of(recipe | {"train_data": "birds", "output_dir": "result"})
    assert {name for name, value in read.items() if value is not None} > set(values)


def test_pictures_are_shown_by_name(vqvae, tmp_path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "a picture.png").touch()
    (tmp_path / "other.png").touch()
    _, text = written(tmp_path, vqvae, make_recipe(tmp_path), pictures={"a picture.png": "What it shows."})
    assert "](a%20picture.png)\n\nWhat it shows.\n" in text
    for picture in ("missing.png", "../other.png", str(tmp_path / "other.png")):
        with pytest.raises(ValueError, match=r"`pictures` must be names of files"):
            write_model_card(tmp_path / "result", vqvae, make_recipe(tmp_path), pictures={picture: ""})
