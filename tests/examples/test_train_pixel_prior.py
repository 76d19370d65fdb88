# SPDX-License-Identifier: Apache-2.0
"""The trainer of convolutional priors through its command line: one level, two levels, resumed."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from hf_var import ARPipeline, PixelSNAIL

from .conftest import NAMES, REPOSITORY, SHORT_RUN, TINY_VQVAE, load_script, losses, read_log, run_script


train_vqvae = load_script("examples/train_vqvae.py")
train_pixel_prior = load_script("examples/train_pixel_prior.py")

RECIPES = REPOSITORY / "examples/recipes"
TINY_PIXELCNN = ["--prior", "pixelcnn", "--hidden_size", "8", "--num_hidden_layers", "2", "--first_kernel_size", "3"]
TINY_SNAIL = ["--hidden_size", "16", "--residual_size", "8", "--num_blocks", "1", "--num_res_blocks", "1"]
TINY_SNAIL += ["--condition_hidden_size", "8", "--kernel_size", "3"]


@pytest.fixture(scope="module")
def one_level(tmp_path_factory: pytest.TempPathFactory, images_parquet: str) -> str:
    """A tokenizer with one map of codes."""
    folder = str(tmp_path_factory.mktemp("one_level"))
    sizes = [*TINY_VQVAE[: TINY_VQVAE.index("--patch_nums")], "--patch_nums", "4", "--refinement_ratio", "0"]
    train_vqvae.main(["--train_data", images_parquet, "--output_dir", folder, *sizes, *SHORT_RUN])
    return folder


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory: pytest.TempPathFactory, images_parquet: str) -> str:
    """A VQ-VAE-2 of 2x2 and 4x4 codes, by its recipe."""
    folder = str(tmp_path_factory.mktemp("two_levels"))
    sizes = ["--image_size", "16", "--base_channels", "8", "--residual_channels", "4", "--latent_channels", "4"]
    sizes += ["--codebook_size", "16", "--unquantized_steps", "1", "--kmeans_images", "24"]
    data = ["--train_data", images_parquet, "--validation_data", images_parquet]
    train_vqvae.main([str(RECIPES / "vqvae2_digits.yaml"), *data, "--output_dir", folder, *sizes, *SHORT_RUN])
    return folder


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_recipe_of_one_level_ends_in_a_pipeline(
    tmp_path: Path, one_level: str, images_parquet: str, name: str
) -> None:
    data = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", one_level]
    arguments = [*data, "--output_dir", str(tmp_path), *TINY_PIXELCNN, *SHORT_RUN, "--augmented_copies", "2"]
    run_script("examples/train_pixel_prior.py", str(RECIPES / f"pixelcnn_{name}.yaml"), *arguments)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is ARPipeline
    assert pipeline.id2label == dict(enumerate(NAMES))
    images = pipeline(["newt", "cat"], generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    last = read_log(tmp_path)[-1]
    assert {"validation_bits_per_token", "validation_accuracy"} <= last.keys()
    assert (tmp_path / "samples.png").is_file()
    card = (tmp_path / "README.md").read_text()
    assert "ARPipeline.from_pretrained" in card
    assert "PixelCNN" in card


@pytest.mark.parametrize("name", ["digits", "cifar10", "ffhq256"])
def test_the_recipes_of_two_levels_end_in_a_pipeline(
    tmp_path: Path, two_levels: str, images_parquet: str, name: str
) -> None:
    # In processes of their own: Accelerate keeps the precision that the first one chose.
    train = partial(run_script, "examples/train_pixel_prior.py")
    data = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", two_levels]
    shared = [*data, *TINY_SNAIL, *SHORT_RUN, "--augmented_copies", "2"]
    top, bottom = str(tmp_path / "top"), str(tmp_path / "bottom")
    train(str(RECIPES / f"pixelsnail_{name}_top.yaml"), *shared, "--output_dir", top)
    assert PixelSNAIL.from_pretrained(top).config.map_size == (2, 2)
    arguments = ["--coarser_priors", top, "--output_dir", bottom]
    train(str(RECIPES / f"pixelsnail_{name}_bottom.yaml"), *shared, *arguments)
    pipeline = ARPipeline.from_pretrained(bottom)
    assert pipeline.bottom_prior.config.condition_map_size == (2, 2)
    label = None if name == "ffhq256" else "dog"
    assert pipeline(label, output_type="np").images.shape == (1, 16, 16, 1)
    assert load_file(f"{bottom}/prior/model.safetensors").keys() == load_file(f"{top}/model.safetensors").keys()


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, one_level: str, images_parquet: str) -> None:
    data = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", one_level]
    arguments = [*data, *TINY_SNAIL, *SHORT_RUN, "--max_train_steps", "6", "--checkpointing_steps", "2"]
    arguments += ["--gradient_accumulation_steps", "2", "--ema_decay", "0.9", "--dropout", "0.1"]
    arguments += ["--class_dropout_prob", "0.2", "--checkpoints_total_limit", "9"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_pixel_prior.main([*arguments, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoints/step-00000004", resumed / "checkpoints/step-00000004")
    train_pixel_prior.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    found, expected = (load_file(folder / "prior/model.safetensors") for folder in (resumed, whole))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_two_processes_equal_one_that_accumulates(tmp_path: Path, one_level: str, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", one_level]
    arguments += [*TINY_PIXELCNN, *SHORT_RUN, "--max_train_steps", "4", "--ema_decay", "0", "--learning_rate", "3e-5"]
    one, two = tmp_path / "one", tmp_path / "two"
    train_pixel_prior.main([*arguments, "--output_dir", str(one), "--gradient_accumulation_steps", "2"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(REPOSITORY / "examples/train_pixel_prior.py"), *arguments, "--output_dir", str(two)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr
    first, second = read_log(one), read_log(two)
    assert len(first) == len(second)
    for expected, found in zip(first, second, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "1"], "`level` must be below the 1 levels of `vqvae`, got 1"),
        (["--coarser_priors", "somewhere"], "`coarser_priors` must be 0 folders for level 0 of 1"),
        (["--prior", "pixelcnn", "--attention", "false"], "`attention` is not a field of PixelCNNConfig"),
        (["--codebook_size", "8"], "`codebook_size` is 16 in the tokenizer: leave it out, got 8"),
        (["--hidden_sizes", "8"], "Unknown argument 'hidden_sizes' in the command line. Did you mean hidden_size"),
        (["--prior", "pixelcnn", "--level", "1"], "`level` must be 0 for `prior` pixelcnn"),
        (["--guidance_scale", "2"], "`guidance_scale` must be 1 for a prior that was trained without class dropout"),
        (["--prior", "gpt"], "`prior` must be one of pixelcnn, pixelsnail, got 'gpt'"),
        (["--condition_column", "label"], "`condition_column` is for train_var.py"),
        (["--push_to_hub", "--push_steps", "1"], "`push_steps` must be 0"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, one_level: str, images_parquet: str, arguments: list[str], message: str
) -> None:
    shared = ["--train_data", images_parquet, "--vqvae", one_level, "--output_dir", str(tmp_path / "out"), *SHORT_RUN]
    with pytest.raises(ValueError, match=message):
        train_pixel_prior.main([*shared, *arguments])
    assert not (tmp_path / "out").exists()


def test_a_prior_of_another_tokenizer(tmp_path: Path, one_level: str, two_levels: str, images_parquet: str) -> None:
    data = ["--train_data", images_parquet]
    train_pixel_prior.main(
        [*data, "--vqvae", one_level, "--output_dir", str(tmp_path / "a"), *TINY_PIXELCNN, *SHORT_RUN]
    )
    arguments = [*data, "--vqvae", two_levels, "--level", "1", *TINY_SNAIL, *SHORT_RUN]
    arguments += ["--coarser_priors", str(tmp_path / "a/prior"), "--output_dir", str(tmp_path / "b")]
    with pytest.raises(
        ValueError, match=r"map_size is \(4, 4\) in the prior, and the tokenizer's level needs \(2, 2\)"
    ):
        train_pixel_prior.main(arguments)
