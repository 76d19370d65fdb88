# SPDX-License-Identifier: Apache-2.0
"""RQ-VAE's codebook update through the command line of the tokenizer's training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_var import VQVAEModel
from hf_var.conversion import export_rqvae, load_rqvae

from .conftest import REPOSITORY, SHORT_RUN, TINY_VQVAE, load_script, losses, read_log, run_script


SCRIPT = "examples/train_vqvae.py"
SEQUENTIAL = [
    *("--patch_nums", "4", "4", "4", "--refinement_ratio", "0", "--codebook_update", "sequential_ema"),
    *("--codebook_loss_weight", "0", "--codebook_averages", "true", "--codebook_window", "2"),
]
EVERYTHING = [
    *("--restart_until", "0.6", "--ema_decay", "0.9", "--kmeans_images", "24", "--unquantized_steps", "1"),
    *("--adversarial_weight", "0.75", "--discriminator_channels", "8", "--discriminator_layers", "1"),
    *("--horizontal_flip", "true", "--gradient_accumulation_steps", "2", "--dropout", "0.1"),
]

train_vqvae = load_script(SCRIPT)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    expected, found = weights_in(first), weights_in(second)
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("source", ["map", "stream"])
def test_a_resumed_run_equals_the_uninterrupted_one(source: str, tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, *TINY_VQVAE, *SEQUENTIAL]
    arguments += [*SHORT_RUN, *EVERYTHING, "--max_train_steps", "8", "--checkpointing_steps", "3"]
    arguments += ["--validation_steps", "3", "--checkpoints_total_limit", "9", "--shuffle_buffer_size", "10"]
    arguments += ["--streaming", str(source == "stream")]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_vqvae.main([*arguments, "--output_dir", str(whole)])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    (resumed / "model.safetensors").unlink()
    train_vqvae.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
    assert len(losses(whole)) == 8
    assert read_log(resumed) == read_log(whole)
    assert same_weights(resumed, whole)
    model = VQVAEModel.from_pretrained(whole)
    assert model.codebook.has_averages
    assert {"usage_2", "residual_energy_2"} <= {name for line in read_log(whole) for name in line}


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, images_parquet: str) -> None:
    """Without restarts, whose vectors are those of the first process alone."""
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, *TINY_VQVAE, *SEQUENTIAL]
    # Adam turns the rounding of tiny gradients into whole steps: let these be small.
    arguments += [*SHORT_RUN, "--kmeans_images", "24", "--max_train_steps", "5", "--learning_rate", "3e-5"]
    arguments += ["--weight_decay", "0", "--ema_decay", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_script(SCRIPT, *arguments, "--train_batch_size", "8", "--output_dir", str(one))

    def run_two(folder: Path, *more: str) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launch, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(folder), *more]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr

    run_two(two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    expected, found = weights_in(one), weights_in(two)
    for name in ("weight", "average_hits", "average_sums"):
        key = f"quantizer.codebook.{name}"
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)
    assert expected["quantizer.codebook.average_hits"].std() > 0.1

    # With restarts both have the codes of the first, in every step.
    run_two(tmp_path / "restarts", "--restart_until", "1", "--checkpointing_steps", "3")
    uninterrupted = weights_in(tmp_path / "restarts")
    shutil.rmtree(tmp_path / "restarts/checkpoints/step-00000006", ignore_errors=True)
    (tmp_path / "restarts/model.safetensors").unlink()
    run_two(tmp_path / "restarts", "--restart_until", "1", "--resume_from_checkpoint", "latest")
    again = weights_in(tmp_path / "restarts")
    assert all(torch.equal(again[name], uninterrupted[name]) for name in again)
    assert not torch.equal(again["quantizer.codebook.weight"], found["quantizer.codebook.weight"])


def test_activation_checkpointing_leaves_the_losses_alone(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SEQUENTIAL, *SHORT_RUN, "--max_train_steps", "4"]
    for name in ("false", "true"):
        options = ["--gradient_checkpointing", name, "--restart_until", "1", "--output_dir", str(tmp_path / name)]
        train_vqvae.main([*arguments, *options])
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-5)
    expected, found = (weights_in(tmp_path / name)["quantizer.codebook.weight"] for name in ("false", "true"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_converted_model_is_trained_on_from_its_averages(tmp_path: Path, images_parquet: str) -> None:
    sizes = ["--base_channels", "32", "--norm_num_groups", "32", "--quant_conv_kernel_size", "1"]
    data = ["--train_data", images_parquet, *SHORT_RUN, "--restart_until", "1", "--codebook_update", "sequential_ema"]
    train_vqvae.main([*data, *TINY_VQVAE, *SEQUENTIAL, *sizes, "--output_dir", str(tmp_path / "a")])
    official = export_rqvae(VQVAEModel.from_pretrained(tmp_path / "a"))
    load_rqvae(official, patch_nums=[4] * 3).save_pretrained(tmp_path / "converted")
    start = [*data, "--pretrained_vqvae", str(tmp_path / "converted"), "--learning_rate", "1e-9"]
    train_vqvae.main([*start, "--max_train_steps", "1", "--restart_until", "0", "--output_dir", str(tmp_path / "b")])
    tuned = export_rqvae(VQVAEModel.from_pretrained(tmp_path / "b"))
    sizes_before, sizes_after = (state["quantizer.codebooks.0.cluster_size_ema"] for state in (official, tuned))
    # 3 depths of 64 vectors, each 0.01 of the averages' sum.
    expected = (sizes_before.sum() - 64) * 0.99**3 + 64
    assert sizes_after.sum().item() == pytest.approx(expected.item(), rel=1e-4)
    assert not torch.equal(sizes_before, sizes_after)
    # A training by gradients does not keep them.
    by_gradients = ["--train_data", images_parquet, *SHORT_RUN, "--pretrained_vqvae", str(tmp_path / "converted")]
    train_vqvae.main([*by_gradients, "--output_dir", str(tmp_path / "c")])
    assert not VQVAEModel.from_pretrained(tmp_path / "c").codebook.has_averages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--torch_compile", "true"], "`torch_compile` cannot go with `codebook_update` sequential_ema"),
        (["--restart_threshold", "0.5"], "`restart_threshold` must be left out"),
        (["--quantizer", "fsq", "--fsq_levels", "2", "2", "2", "2"], "`codebook_averages` goes with quantizer='vq'"),
    ],
)
def test_what_does_not_go_with_it(options: list[str], message: str, tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SEQUENTIAL, *SHORT_RUN, *options]
    with pytest.raises(ValueError, match=message):
        train_vqvae.main([*arguments, "--output_dir", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
