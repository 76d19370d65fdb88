# SPDX-License-Identifier: Apache-2.0
"""The training of `AutoencoderKL` through its command line."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from .conftest import (
    REPOSITORY,
    SHORT_RUN,
    last_step,
    load_script,
    losses,
    random_images,
    read_log,
    run_script,
    script_environment,
    start,
    wait_for,
)


SCRIPT = "examples/train_autoencoder_kl.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECIPES = sorted((REPOSITORY / "examples/recipes").glob("kl_*.yaml"))
TINY = ["--in_channels", "1", "--sample_size", "8", "--block_out_channels", "8", "8", "--norm_num_groups", "4"]
TINY += ["--latent_channels", "2", "--resize_ratio", "1"]
# Everything that has a state.
EVERYTHING = ["--adversarial_weight", "0.5", "--discriminator_start", "2", "--discriminator_channels", "8"]
EVERYTHING += ["--discriminator_layers", "1", "--lecam_weight", "0.1", "--r1_weight", "0.1", "--diffaugment", "color"]
EVERYTHING += ["--ema_decay", "0.9", "--augment_rotation", "10", "--kl_weight", "0.1"]

train_autoencoder_kl = load_script(SCRIPT)


def data(images_parquet: str, output_dir: Path) -> list[str]:
    return [
        *("--train_data", images_parquet, "--validation_data", images_parquet),
        *("--output_dir", str(output_dir)),
    ]


def images() -> torch.Tensor:
    """The images of `images_parquet` as the model sees them."""
    pixels = np.stack([np.asarray(image) for image in random_images(24)])
    return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1  # (24, 1, 8, 8)


def same_weights(first: Path, second: Path) -> bool:
    expected, found = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_two_steps(recipe: Path, tmp_path: Path, images_parquet: str) -> None:
    # Narrow, and of the smallest images that discriminator and LPIPS take; objective and number of levels stay.
    settings = train_autoencoder_kl.read_arguments([str(recipe)])
    model = train_autoencoder_kl.given_fields(settings.model)
    num_levels, side = len(model["block_out_channels"]), 32 if settings.adversary.adversarial_weight else 16
    small = ["--block_out_channels", *(["16"] * num_levels), "--norm_num_groups", "4", "--sample_size", str(side)]
    small += ["--streaming", "false", "--dataloader_num_workers", "0", "--discriminator_start", "1"]
    small += ["--discriminator_channels", "8", "--rfid_extractor", "extractor:CoarsePixels"]
    small += ["--lpips_weights", "random"] if settings.objective.lpips_weight > 0 else []
    run_script(SCRIPT, str(recipe), *data(images_parquet, tmp_path), *small, *SHORT_RUN)
    assert len(losses(tmp_path)) == 2
    log = read_log(tmp_path)
    assert np.isfinite(log[-1]["validation_rfid"])
    assert ("generator_loss" in log[1]) == (settings.adversary.adversarial_weight > 0)
    autoencoder = AutoencoderKL.from_pretrained(tmp_path)
    assert autoencoder.config.latent_channels == model["latent_channels"]
    assert len(autoencoder.config.block_out_channels) == num_levels


def test_latent_diffusion_recipe_has_the_sizes_of_stable_diffusion() -> None:
    settings = train_autoencoder_kl.read_arguments([str(REPOSITORY / "examples/recipes/kl_f8_256.yaml")])
    config = train_autoencoder_kl.autoencoder_kl_config(train_autoencoder_kl.given_fields(settings.model))
    with torch.device("meta"):
        assert AutoencoderKL(**config).num_parameters() == 83_653_863
    assert settings.adversary.adaptive_weight_max == pytest.approx(1e4 / (3 * 256 * 256), rel=1e-5)


def test_result_describes_itself_and_loads_with_diffusers_alone(tmp_path: Path, images_parquet: str) -> None:
    arguments = [*data(images_parquet, tmp_path), *TINY, *SHORT_RUN, "--validation_steps", "1"]
    train_autoencoder_kl.main([*arguments, "--report_to", "tensorboard"])
    for name in ("reconstructions", "samples", "interpolations", "curves"):
        assert (tmp_path / f"{name}.png").is_file(), name
    # Images of 8 pixels, enlarged eight times, with two pixels between them: 4 of the first batch, 8x8 samples, 2 pairs.
    assert Image.open(tmp_path / "reconstructions.png").size == (2 * 66 + 2, 4 * 66 + 2)
    assert Image.open(tmp_path / "samples.png").size == (8 * 66 + 2, 8 * 66 + 2)
    assert Image.open(tmp_path / "interpolations.png").size == (8 * 66 + 2, 2 * 66 + 2)
    log, card = read_log(tmp_path), ModelCard.load(tmp_path / "README.md")
    assert [line["step"] for line in log if "validation_psnr" in line] == [1, 2]
    assert card.data.library_name == "diffusers"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["kl"] == pytest.approx(log[-1]["validation_kl"], abs=1e-4)
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()
    # The card's example, in a process that does not import this package.
    example = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL).group(1)
    check = "import sys\nassert 'hf_var' not in sys.modules\nassert latents.shape == (1, 2, 4, 4)\n"
    check += "assert sample.shape == (1, 1, 8, 8)\nprint(vae.config.scaling_factor)"
    command = [sys.executable, "-c", f"{example}\n{check}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path.parent, env=script_environment())
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(1 / log[-1]["validation_latent_std"])


def test_validation_measures_the_model_that_is_saved(tmp_path: Path, images_parquet: str) -> None:
    train_autoencoder_kl.main([*data(images_parquet, tmp_path), *TINY, *SHORT_RUN])
    autoencoder = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        posterior = autoencoder.encode(images()).latent_dist
        errors = (autoencoder.decode(posterior.mode()).sample - images()).square().mean(dim=(1, 2, 3))
        samples = torch.cat([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(50)])
    metrics = read_log(tmp_path)[-1]
    assert metrics["validation_psnr"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-4)
    assert metrics["validation_kl"] == pytest.approx(posterior.kl().mean().item(), rel=1e-4)
    dimensions = [metrics[f"validation_kl_{channel}"] for channel in range(2)]
    assert 4 * 4 * sum(dimensions) == pytest.approx(metrics["validation_kl"], rel=1e-4)
    active = posterior.mean.var(dim=0, correction=0) > 0.01
    assert metrics["validation_active_dimensions"] == active.sum()
    assert autoencoder.config.scaling_factor == pytest.approx(1 / samples.std().item(), rel=0.01)


def test_scaling_factor_without_validation_is_that_of_training_images(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY, *SHORT_RUN]
    train_autoencoder_kl.main([*arguments, "--output_dir", str(tmp_path / "measured")])
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "measured").eval()
    with torch.no_grad():
        posterior = autoencoder.encode(images()).latent_dist
        deviation = torch.cat([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(50)]).std()
    assert autoencoder.config.scaling_factor == pytest.approx(1 / deviation.item(), rel=0.03)
    train_autoencoder_kl.main([*arguments, "--output_dir", str(tmp_path / "given"), "--scaling_factor", "0.5"])
    assert AutoencoderKL.from_pretrained(tmp_path / "given").config.scaling_factor == 0.5


def test_vector_of_latents_is_a_configuration(tmp_path: Path, images_parquet: str) -> None:
    levels = ["--block_out_channels", "8", "8", "8", "8", "--mid_block_add_attention", "false"]
    train_autoencoder_kl.main([*data(images_parquet, tmp_path), *TINY, *levels, *SHORT_RUN])
    autoencoder = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert autoencoder.encode(images()).latent_dist.mean.shape == (24, 2, 1, 1)


@pytest.mark.parametrize("source", ["map", "stream"])
def test_resumed_run_with_everything_equals_the_uninterrupted_one(
    source: str, tmp_path: Path, images_parquet: str
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = [*TINY, *SHORT_RUN, *EVERYTHING, "--max_train_steps", "8", "--gradient_accumulation_steps", "2"]
    arguments += ["--checkpointing_steps", "3", "--validation_steps", "3", "--checkpoints_total_limit", "9"]
    arguments += ["--streaming", str(source == "stream"), "--shuffle_buffer_size", "10"]
    train_autoencoder_kl.main([*data(images_parquet, whole), *arguments])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    (resumed / WEIGHTS).unlink()
    train_autoencoder_kl.main([*data(images_parquet, resumed), *arguments, "--resume_from_checkpoint", "latest"])
    assert len(losses(whole)) == 8
    assert read_log(resumed) == read_log(whole)
    assert same_weights(resumed, whole)
    with pytest.raises(ValueError, match=r"latent_channels.*must be 2.*got 3"):
        train_autoencoder_kl.main(
            [*data(images_parquet, whole), *arguments, "--resume_from_checkpoint", "latest", "--latent_channels", "3"]
        )


def test_killed_run_equals_the_uninterrupted_one(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY, *SHORT_RUN, *EVERYTHING, "--max_train_steps", "60"]
    arguments += ["--checkpointing_steps", "4", "--resume_from_checkpoint", "latest"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_autoencoder_kl.main([*arguments, "--output_dir", str(whole)])
    process = start(SCRIPT, arguments, killed)
    wait_for(lambda: last_step(killed) >= 14, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train_autoencoder_kl.main([*arguments, "--output_dir", str(killed)])
    assert read_log(killed) == read_log(whole)
    assert same_weights(killed, whole)


def test_two_processes_equal_one_that_accumulates(tmp_path: Path, images_parquet: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # Adam turns the rounding of tiny gradients into whole steps: let these be small.
    arguments = [*TINY, *SHORT_RUN, *EVERYTHING, "--max_train_steps", "5", "--learning_rate", "3e-5"]
    arguments += ["--ema_decay", "0", "--weight_decay", "0"]
    train_autoencoder_kl.main([*data(images_parquet, one), *arguments, "--gradient_accumulation_steps", "2"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(REPOSITORY / SCRIPT), *data(images_parquet, two), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr
    first, second = read_log(one), read_log(two)
    assert len(first) == len(second)
    for expected, found in zip(first, second, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # What was learned, not what was there before. Each step of Adam moves a weight by the learning rate at most.
    set_seed(0)
    initial = AutoencoderKL(**AutoencoderKL.load_config(one)).state_dict()
    states = [load_file(folder / WEIGHTS) for folder in (one, two)]
    moves = [torch.cat([(state[name] - initial[name]).flatten() for name in initial]) for state in states]
    assert moves[0].abs().mean() > 3e-5
    assert ((moves[0] - moves[1]).abs() > 1e-5).float().mean() < 0.02


def test_options_for_memory_and_precision_leave_the_losses_alone(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY, *SHORT_RUN, "--max_train_steps", "3"]
    train_autoencoder_kl.main([*arguments, "--output_dir", str(tmp_path / "plain")])
    expected = losses(tmp_path / "plain")
    option = ["--gradient_checkpointing", "true"]
    train_autoencoder_kl.main([*arguments, "--output_dir", str(tmp_path / "checkpointing"), *option])
    assert losses(tmp_path / "checkpointing") == pytest.approx(expected, rel=1e-4)
    # In a process of its own: Accelerate keeps what the first one chose.
    run_script(SCRIPT, *arguments, "--output_dir", str(tmp_path / "bf16"), "--mixed_precision", "bf16")
    found = losses(tmp_path / "bf16")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.03)


def test_fine_tuning_goes_on_from_the_pretrained_weights(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *SHORT_RUN, "--weight_decay", "0", "--resize_ratio", "1"]
    first, still = tmp_path / "first", tmp_path / "still"
    train_autoencoder_kl.main([*arguments, *TINY, "--output_dir", str(first)])
    arguments += ["--pretrained_autoencoder", str(first), "--learning_rate", "1e-12", "--ema_decay", "0"]
    train_autoencoder_kl.main([*arguments, "--sample_size", "16", "--output_dir", str(still)])
    expected, found = load_file(first / WEIGHTS), load_file(still / WEIGHTS)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)
    config = AutoencoderKL.load_config(still)
    assert config["sample_size"] == 16
    # What models of its latents were trained with; images of another size would give another one.
    assert config["scaling_factor"] == AutoencoderKL.load_config(first)["scaling_factor"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kl_weight", "-1"], "kl_weight.*at least 0, got -1"),
        (["--l2_weight", "0"], "l1_weight.*l2_weight"),
        (["--sample_size", "9"], "sample_size.*multiple of 2.*got 9"),
        (["--latent_channels", "0"], "latent_channels.*got 0"),
        (["--in_channels", "5"], "in_channels.*got 5"),
        (["--up_block_types", "UpDecoderBlock2D"], "up_block_types.*each of 2"),
        (["--quantizer_weight", "1"], "'quantizer_weight'"),
        (["--adversarial_weight", "1", "--discriminator_start", "2"], "discriminator_start.*max_train_steps"),
        (["--adversarial_weight", "1", "--mixed_precision", "fp16"], "fp16.*bf16"),
        (["--adversarial_weight", "1"], "image_size.*at least 24.*8x8"),
        (["--lpips_weight", "1", "--lpips_weights", "random"], "image_size.*at least 16"),
        (["--rfid_extractor", "inception"], "rfid_extractor.*validation_data"),
        (["--rfid_weights", "file"], "rfid_weights.*rfid_extractor"),
        (["--validation_steps", "1"], "validation_steps.*validation_data"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path, images_parquet: str
) -> None:
    arguments = ["--train_data", images_parquet, "--output_dir", str(tmp_path / "out"), *TINY, *SHORT_RUN]
    with pytest.raises(ValueError, match=message):
        train_autoencoder_kl.main([*arguments, *options])
    assert not (tmp_path / "out").exists()
