# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's training through its command line."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import set_seed
from datasets import Array3D, Dataset, Features
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEModel
from hf_var.autoencoders import load_tokenizer
from hf_var.training.accelerator import make_accelerator
from hf_var.training.identity import RunIdentity
from hf_var.training.run import RunConfig, TrainingRun

from .conftest import (
    REPOSITORY,
    SHORT_RUN,
    TINY_VQVAE,
    last_step,
    load_script,
    losses,
    random_images,
    read_log,
    run_script,
    start,
    wait_for,
)


SCRIPT = "examples/train_vqvae.py"
RECIPES = sorted(
    path
    for system in ("vqvae", "vqgan", "rqvae")
    for path in (REPOSITORY / "examples/recipes").glob(f"{system}*.yaml")
)
RFID_EXTRACTOR = "extractor:CoarsePixels"
# Everything that has a state: the adversary, both averages, restarts, the augmentation's random numbers.
EVERYTHING = [
    *("--adversarial_weight", "0.5", "--discriminator_start", "2", "--discriminator_ramp_steps", "3"),
    *("--discriminator_channels", "8", "--discriminator_layers", "1", "--lecam_weight", "0.1", "--r1_weight", "0.1"),
    *("--diffaugment", "color", "translation", "--codebook_update", "ema", "--codebook_window", "2"),
    *("--restart_until", "0.9", "--kmeans_images", "24", "--unquantized_steps", "1", "--ema_decay", "0.9"),
    *("--horizontal_flip", "true", "--augment_rotation", "10"),
]

# Fits the sizes of TINY_VQVAE.
FSQ = ["--quantizer", "fsq", "--fsq_levels", "2", "2", "2", "2"]

train_vqvae = load_script(SCRIPT)


def same_weights(first: Path, second: Path) -> bool:
    expected, found = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_two_steps(recipe: Path, tmp_path: Path, images_parquet: str, maps_parquet: str) -> None:
    # The sizes of the test's images; what the recipe is about, objective and codebook, stays.
    small = ["--base_channels", "8"]
    settings = train_vqvae.read_arguments([str(recipe)])
    config = train_vqvae.make_config(settings)
    if config.has_trainable_codes:
        small += ["--latent_channels", "4", "--codebook_size", "16", "--kmeans_images", "24"]
    # Four by four latents, of images of at least 16 pixels, which LPIPS needs.
    patch_nums = [max(1, height * 4 // config.scale_sizes[-1][0]) for height, _ in config.scale_sizes]
    if settings.script.model_type == "vqvae":
        small += ["--norm_num_groups", "2", "--patch_nums", *map(str, patch_nums)]
    else:
        small += ["--residual_channels", "4", "--image_size", str(4 * config.downsampling_factor)]
    has_images = config.num_pixel_classes is None
    source = images_parquet if has_images else maps_parquet
    data = ["--train_data", source, "--validation_data", source, "--output_dir", str(tmp_path)]
    data += ["--streaming", "false", "--dataloader_num_workers", "0", "--image_column", "image"]
    data += ["--rfid_extractor", RFID_EXTRACTOR] if has_images else []
    steps = ["--unquantized_steps", "1", "--discriminator_start", "1"]
    lpips = ["--lpips_weights", "random"] if settings.reconstruction.lpips_weight > 0 else []
    narrow = ["--discriminator_channels", "8"]
    run_script(SCRIPT, str(recipe), *data, *small, *SHORT_RUN, *steps, *lpips, *narrow)
    assert len(losses(tmp_path)) == 2
    metrics = read_log(tmp_path)[-1]
    assert np.isfinite(
        [metrics[f"validation_{name}"] for name in (["psnr", "rfid"] if has_images else ["mean_iou"])]
    ).all()
    model = load_tokenizer(tmp_path)
    assert type(model.config) is type(config)
    assert model.config.image_size == tuple(4 * config.downsampling_factor for _ in range(2))
    assert model.config.patch_nums == patch_nums
    assert model.config.in_channels == config.in_channels
    assert (model.config.num_pixel_classes is None) is has_images
    if settings.codebook.codebook_update == "sequential_ema":
        assert model.codebook.has_averages


HIERARCHICAL = [
    *("--model_type", "hierarchical_vqvae", "--in_channels", "1", "--image_size", "8", "--base_channels", "8"),
    *("--num_res_blocks", "1", "--residual_channels", "4", "--latent_channels", "4", "--codebook_size", "16"),
]


def test_a_hierarchy_resumes_tunes_and_is_tokenized_with(tmp_path: Path, images_parquet: str) -> None:
    data = ["--train_data", images_parquet, "--validation_data", images_parquet, *SHORT_RUN]
    run = [*data, *HIERARCHICAL, *EVERYTHING, "--max_train_steps", "6", "--checkpointing_steps", "3"]
    train_vqvae.main([*run, "--output_dir", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-00000006")
    train_vqvae.main([*run, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "latest"])
    assert same_weights(tmp_path / "whole", tmp_path / "resumed")
    log = read_log(tmp_path / "whole")
    assert {"usage_0", "usage_1", "residual_energy_1"} <= {name for line in log for name in line}
    card = (tmp_path / "whole/README.md").read_text()
    assert "HierarchicalVQVAEModel.from_pretrained" in card
    assert "Hierarchical VQ-VAE of 2 levels" in card
    assert "model_type: hierarchical_vqvae" in card

    start = ["--pretrained_vqvae", str(tmp_path / "whole"), *data, "--output_dir", str(tmp_path / "tuned")]
    with pytest.raises(ValueError, match="holds a model of type 'hf_var_hierarchical_vqvae'"):
        train_vqvae.main(start)
    start += ["--model_type", "hierarchical_vqvae"]
    train_vqvae.main([*start, "--learning_rate", "1e-12", "--commitment_loss_weight", "0.5"])
    tuned, whole = load_tokenizer(tmp_path / "tuned"), load_tokenizer(tmp_path / "whole")
    assert tuned.config.commitment_loss_weight == 0.5
    torch.testing.assert_close(tuned.decoder.conv_out.weight, whole.decoder.conv_out.weight, rtol=0, atol=1e-6)
    # The averages belong to a training that updates them; this one followed gradients.
    assert whole.codebooks[0].average_hits.any()
    assert not tuned.codebooks[0].average_hits.any()

    codes = tmp_path / "codes"
    folder = ["--vqvae", str(tmp_path / "whole")]
    run_script("examples/tokenize_dataset.py", "--data", images_parquet, *folder, "--output_dir", str(codes))
    rows = Dataset.from_parquet(str(codes / "*.parquet"))
    assert len(rows) == 24
    assert {len(row) for row in rows["codes"]} == {5}
    assert "HierarchicalVQVAEModel" in (codes / "README.md").read_text()
    train_var = load_script("examples/train_var.py")
    with pytest.raises(ValueError, match="`vqvae` must be a VQVAEModel, got a HierarchicalVQVAEModel"):
        train_var.main(["--train_data", images_parquet, *folder, "--output_dir", str(tmp_path / "var")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strides", "4"], "`strides` is not a field of VQVAEConfig"),
        ([*HIERARCHICAL, "--patch_nums", "1"], "`patch_nums` is not a field of HierarchicalVQVAEConfig"),
        (["--model_type", "vqvae2"], "`model_type` must be one of vqvae, hierarchical_vqvae, got 'vqvae2'"),
        ([*HIERARCHICAL, "--image_size", "12"], "`image_size` must be one or two positive multiples of 8.*got 12"),
        ([*HIERARCHICAL, "--kmeans_images", "3"], "`kmeans_images` = 3 gives 3 vectors, too few for `codebook_size`"),
    ],
)
def test_fields_are_those_of_the_chosen_class(
    arguments: list[str], message: str, tmp_path: Path, images_parquet: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_vqvae.main(["--train_data", images_parquet, *arguments, "--output_dir", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_result_describes_itself(tmp_path: Path, images_parquet: str) -> None:
    data = ["--train_data", images_parquet, "--validation_data", images_parquet, "--output_dir", str(tmp_path)]
    train_vqvae.main([*data, *TINY_VQVAE, *SHORT_RUN, "--validation_steps", "1", "--report_to", "tensorboard"])
    for name in ("reconstructions.png", "codes.png", "curves.png", "README.md", "config.json"):
        assert (tmp_path / name).is_file(), name
    pictures = sorted(path.name for path in (tmp_path / "pictures").glob("reconstructions-*"))
    assert pictures == ["reconstructions-00000001.png", "reconstructions-00000002.png"]
    # Three scales and the original of four images, of 8 pixels enlarged eight times, with two pixels between them.
    assert Image.open(tmp_path / "reconstructions.png").size == (4 * 66 + 2, 4 * 66 + 2)
    log = read_log(tmp_path)
    assert [line["step"] for line in log if "validation_psnr" in line] == [1, 2]
    results = {
        result.metric_type: result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    assert results["psnr"] == pytest.approx(log[-1]["validation_psnr"], abs=1e-4)
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()
    assert list(tmp_path.glob("train_vqvae/**/events.out.tfevents*"))


def test_validation_measures_the_model_that_is_saved(tmp_path: Path, images_parquet: str) -> None:
    data = ["--train_data", images_parquet, "--validation_data", images_parquet, "--output_dir", str(tmp_path)]
    train_vqvae.main([*data, *TINY_VQVAE, *SHORT_RUN, "--kmeans_images", "24", "--resize_ratio", "1"])
    vqvae = VQVAEModel.from_pretrained(tmp_path).eval()
    pixels = np.stack([np.asarray(image) for image in random_images(24)])
    images = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1  # (24, 1, 8, 8)
    with torch.no_grad():
        encoded = vqvae.encode(images)
        errors = (vqvae.decode(encoded.codes).sample - images).square().mean(dim=(1, 2, 3))
    figures = read_log(tmp_path)[-1]
    assert figures["validation_psnr"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-4)
    left = (encoded.features - encoded.latents).square().sum() / encoded.features.square().sum()
    assert figures["validation_residual_energy_2"] == pytest.approx(left.item(), rel=1e-3)
    for scale, codes in enumerate(encoded.codes.split((1, 4, 16), dim=1)):
        assert figures[f"validation_usage_{scale}"] == pytest.approx(len(codes.unique()) / 16)


@pytest.mark.parametrize("schedule", [["4"], ["1", "2", "4"], ["4", "4"]], ids="-".join)
def test_finite_scalar_quantization_is_trained_and_drawn_from(
    schedule: list[str], tmp_path: Path, images_parquet: str
) -> None:
    data = ["--train_data", images_parquet, "--validation_data", images_parquet, "--output_dir", str(tmp_path)]
    sizes = ["--in_channels", "1", "--base_channels", "8", "--channel_multipliers", "1", "2", "--num_res_blocks", "1"]
    sizes += ["--norm_num_groups", "4", "--patch_nums", *schedule, "--refinement_ratio", "0"]
    fsq = ["--quantizer", "fsq", "--fsq_levels", "4", "3", "2", "--unquantized_steps", "1", "--codebook_window", "1"]
    train_vqvae.main([*data, *sizes, *fsq, *SHORT_RUN, "--max_train_steps", "3"])
    vqvae = VQVAEModel.from_pretrained(tmp_path)
    assert vqvae.config.codebook_size == 24
    assert vqvae.config.latent_channels == 3
    assert vqvae.codebook.running_hits.sum() > 0
    log = read_log(tmp_path)
    assert [line["quantizer_loss"] for line in log if "quantizer_loss" in line] == [0, 0, 0]
    assert 0 < log[-1]["validation_usage"] <= 1
    assert "finite scalar quantization" in (tmp_path / "README.md").read_text()

    shared = {name: getattr(vqvae.config, name) for name in ("codebook_size", "latent_channels", "patch_nums")}
    transformer = VARTransformer(
        VARConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3, **shared)
    )
    pipe = VARPipeline(transformer=transformer.eval(), vqvae=vqvae)
    output = pipe([0, 2], generator=torch.Generator().manual_seed(0), output_type="pt")
    assert output.images.shape == (2, 1, 8, 8)
    assert 0 <= output.codes.min() <= output.codes.max() < 24


@pytest.mark.parametrize("source", ["map", "stream"])
def test_resumed_run_with_everything_equals_the_uninterrupted_one(
    source: str, tmp_path: Path, images_parquet: str
) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, *TINY_VQVAE, *SHORT_RUN]
    arguments += [*EVERYTHING, "--max_train_steps", "8", "--gradient_accumulation_steps", "2", "--dropout", "0.1"]
    arguments += ["--checkpointing_steps", "3", "--validation_steps", "3", "--checkpoints_total_limit", "9"]
    arguments += ["--streaming", str(source == "stream"), "--shuffle_buffer_size", "10"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_vqvae.main([*arguments, "--output_dir", str(whole)])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    (resumed / "model.safetensors").unlink()
    train_vqvae.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
    assert len(losses(whole)) == 8
    assert read_log(resumed) == read_log(whole)
    assert same_weights(resumed, whole)


def test_run_killed_three_times_equals_the_uninterrupted_one(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SHORT_RUN, *EVERYTHING]
    arguments += ["--max_train_steps", "90", "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(SCRIPT, arguments, whole).wait() == 0

    steps = sorted(random.Random(0).sample(range(5, 55), 2))
    for step in steps:
        process = start(SCRIPT, arguments, killed)
        wait_for(lambda step=step: last_step(killed) >= step, process)
        time.sleep(random.Random(step).uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    # While a checkpoint is being written: its folder has its first files, but not yet its name.
    process = start(SCRIPT, arguments, killed)
    wait_for(lambda: last_step(killed) >= 60, process)
    wait_for(lambda: any(path.iterdir() for path in (killed / "checkpoints").glob(".unfinished-step-*")), process)
    process.send_signal(signal.SIGSTOP)
    unfinished = [path.name for path in (killed / "checkpoints").iterdir() if path.name.startswith(".unfinished")]
    process.kill()
    process.wait()
    assert len(unfinished) == 1
    assert not (killed / "model.safetensors").exists()

    assert start(SCRIPT, arguments, killed).wait() == 0
    assert len(losses(whole)) == 90
    assert read_log(killed) == read_log(whole)
    assert same_weights(killed, whole)
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert names == ["step-00000084", "step-00000088"]


def test_two_processes_equal_one_that_accumulates(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, *TINY_VQVAE, *SHORT_RUN]
    # Adam turns the rounding of tiny gradients into whole steps: let these be small.
    arguments += [*EVERYTHING, "--max_train_steps", "6", "--checkpointing_steps", "4", "--learning_rate", "3e-5"]
    arguments += ["--ema_decay", "0", "--weight_decay", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    # In a process of its own, like the two: what other tests leave behind may move a rounding, and with it a code.
    run_script(SCRIPT, *arguments, "--gradient_accumulation_steps", "2", "--output_dir", str(one))

    def run_two(*more: str) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launch, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(two), *more]
        result = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
        )
        assert result.returncode == 0, result.stderr

    run_two()
    first, second = read_log(one), read_log(two)
    assert len(first) == len(second)
    for expected, found in zip(first, second, strict=True):
        assert found.keys() == expected.keys()
        # Of a window's last batch alone, of which two processes have two.
        names = [name for name in expected if not name.startswith("residual_energy")]
        assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-3, abs=1e-4)
    # What was learned, not what was there before. Each step of Adam moves a weight by the learning rate at most.
    set_seed(0)
    initial = VQVAEModel(VQVAEModel.from_pretrained(one).config).state_dict()
    expected, found = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    learned = [name for name in initial if name.startswith(("encoder", "decoder", "quant_conv", "post_quant_conv"))]
    moves = [torch.cat([(state[name] - initial[name]).flatten() for name in learned]) for state in (expected, found)]
    assert moves[0].abs().mean() > 3e-5
    assert ((moves[0] - moves[1]).abs() > 1e-5).float().mean() < 0.02
    torch.testing.assert_close(
        found["quantizer.codebook.weight"], expected["quantizer.codebook.weight"], rtol=0, atol=1e-3
    )

    # The two go on from their checkpoint as if they had not stopped.
    shutil.copytree(two, tmp_path / "uninterrupted")
    (two / "model.safetensors").unlink()
    run_two("--resume_from_checkpoint", "latest")
    assert read_log(two) == second
    assert same_weights(two, tmp_path / "uninterrupted")


def test_accumulation_equals_a_larger_batch(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SHORT_RUN, "--codebook_update", "ema"]
    arguments += ["--max_train_steps", "4", "--kmeans_images", "24", "--unquantized_steps", "1"]
    for name, batch_size, accumulation in (("large", "8", "1"), ("small", "2", "4")):
        sizes = ["--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
        train_vqvae.main([*arguments, *sizes, "--output_dir", str(tmp_path / name)])
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=1e-4)
    assert len(set(losses(tmp_path / "large"))) == 4


@pytest.mark.parametrize(
    "options",
    [
        ["--gradient_checkpointing", "true"],
        ["--channels_last", "true"],
        # Takes a compiler a minute.
        pytest.param(["--torch_compile", "true"], marks=pytest.mark.slow),
    ],
    ids=lambda options: options[0],
)
def test_options_for_speed_and_memory_leave_the_losses_alone(
    options: list[str], tmp_path: Path, images_parquet: str
) -> None:
    # In a process of its own: Accelerate keeps what the first one chose.
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SHORT_RUN, "--kmeans_images", "24"]
    arguments += ["--unquantized_steps", "1", "--max_train_steps", "3"]
    train_vqvae.main([*arguments, "--output_dir", str(tmp_path / "plain")])
    run_script(SCRIPT, *arguments, "--output_dir", str(tmp_path / "option"), *options)
    assert losses(tmp_path / "option") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert VQVAEModel.from_pretrained(tmp_path / "option").config.codebook_size == 16


def test_bf16_trains_close_to_fp32(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, *TINY_VQVAE, *SHORT_RUN, *EVERYTHING, "--max_train_steps", "4"]
    train_vqvae.main([*arguments, "--output_dir", str(tmp_path / "fp32")])
    run_script(SCRIPT, *arguments, "--output_dir", str(tmp_path / "bf16"), "--mixed_precision", "bf16")
    expected, found = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert found != expected
    assert found[:2] == pytest.approx(expected[:2], rel=0.03)


def test_fine_tuning_goes_on_from_the_pretrained_weights(
    tmp_path: Path, vqvae_folder: str, images_parquet: str
) -> None:
    arguments = ["--train_data", images_parquet, "--pretrained_vqvae", vqvae_folder, *SHORT_RUN]
    still = ["--learning_rate", "1e-12", "--ema_decay", "0", "--weight_decay", "0", "--dropout", "0.1"]
    train_vqvae.main([*arguments, *still, "--output_dir", str(tmp_path / "still")])
    expected, found = (
        load_file(Path(vqvae_folder) / "model.safetensors"),
        load_file(tmp_path / "still/model.safetensors"),
    )
    for name, tensor in expected.items():
        if "running_hits" not in name:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)
    assert VQVAEModel.from_pretrained(tmp_path / "still").config.dropout == 0.1
    train_vqvae.main([*arguments, "--output_dir", str(tmp_path / "moved"), "--max_train_steps", "3"])
    moved = load_file(tmp_path / "moved/model.safetensors")
    assert not torch.equal(moved["decoder.conv_out.weight"], expected["decoder.conv_out.weight"])
    with pytest.raises(ValueError, match=r"codebook_size.*16.*got 32"):
        train_vqvae.main([*arguments, "--codebook_size", "32", "--output_dir", str(tmp_path / "other")])


def test_non_square_images_of_any_number_of_channels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 5, 10, 14), dtype=np.uint8)
    features = Features({"bands": Array3D((5, 10, 14), "uint8")})
    Dataset.from_dict({"bands": pixels}, features=features).to_parquet(tmp_path / "bands.parquet")
    arguments = ["--train_data", str(tmp_path / "bands.parquet"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--validation_data", str(tmp_path / "bands.parquet"), "--image_column", "bands"]
    train_vqvae.main([*arguments, *TINY_VQVAE, *SHORT_RUN, "--in_channels", "5", "--patch_nums", "1", "2x3", "4x6"])
    model = VQVAEModel.from_pretrained(tmp_path / "out")
    assert model.config.image_size == (8, 12)
    assert model.config.in_channels == 5
    assert model.decode(torch.zeros(1, 31, dtype=torch.long)).sample.shape == (1, 5, 8, 12)


def test_broken_images_are_skipped_and_too_many_stop_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "images/cat"
    folder.mkdir(parents=True)
    for index, image in enumerate(random_images(24, "RGB")):
        image.save(folder / f"{index:02}.png")
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "11.png").write_text("not an image")
    arguments = ["--train_data", str(tmp_path / "images"), *TINY_VQVAE, *SHORT_RUN, "--in_channels", "3"]
    arguments += ["--max_train_steps", "40"]
    tolerant = ["--max_broken_share", "0.2", "--output_dir", str(tmp_path / "out")]
    train_vqvae.main([*arguments, *tolerant])
    # 160 images are nearly seven walks past two broken ones.
    assert 10 <= read_log(tmp_path / "out")[-1]["broken_images"] <= 16
    with pytest.raises(ValueError, match=r"max_broken_share"):
        train_vqvae.main([*arguments, "--max_broken_share", "0.01", "--output_dir", str(tmp_path / "strict")])


def test_lost_run_keeps_its_last_good_checkpoint(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--output_dir", str(tmp_path), *TINY_VQVAE, *SHORT_RUN]
    arguments += ["--max_train_steps", "20", "--checkpointing_steps", "1", "--logging_steps", "20"]
    # The learning rate rises until the loss is lost.
    rising = ["--learning_rate", "1e12", "--lr_warmup_steps", "1000000000"]
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) at step \d+.*learning_rate"):
        train_vqvae.main([*arguments, *rising, "--max_grad_norm", "1e9"])
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    assert checkpoints
    (file,) = checkpoints[-1].glob("tensors/*.safetensors")
    weights = load_file(file)
    assert any(name.startswith("model/") for name in weights)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--output_dir", str(tmp_path), *TINY_VQVAE, *SHORT_RUN]
    arguments += ["--max_train_steps", "4", "--checkpointing_steps", "1", "--checkpoints_total_limit", "3"]
    train_vqvae.main(arguments)
    with pytest.raises(ValueError, match="output_dir.*step-00000004.*resume_from_checkpoint"):
        train_vqvae.main(arguments)
    # From an earlier checkpoint: the later ones go, so that `latest` means this course and not the one before.
    earlier = ["--resume_from_checkpoint", str(tmp_path / "checkpoints/step-00000002"), "--max_train_steps", "3"]
    train_vqvae.main([*arguments, *earlier])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unquantized_steps", "2"], "unquantized_steps.*max_train_steps"),
        (["--adversarial_weight", "1", "--discriminator_start", "2"], "discriminator_start.*max_train_steps"),
        (["--adversarial_weight", "1", "--torch_compile", "true"], "torch_compile.*adversarial_weight"),
        (["--adversarial_weight", "1", "--mixed_precision", "fp16"], "fp16.*bf16"),
        (["--adversarial_weight", "1", "--discriminator", "resnet"], "discriminator.*stylegan.*'resnet'"),
        (["--adversarial_weight", "1"], "image_size.*at least 24.*8x8"),
        (["--adversarial_loss", "wasserstein"], "adversarial_loss.*hinge"),
        (["--kmeans_images", "1", "--codebook_size", "64"], "kmeans_images.*1 gives 21 vectors.*codebook_size"),
        (["--codebook_update", "sgd"], "codebook_update.*'sgd'"),
        ([*FSQ, "--kmeans_images", "24"], "kmeans_images.*must be 0 with quantizer='fsq'.*got 24"),
        ([*FSQ, "--restart_until", "0.5"], "restart_until.*must be 0.0 with quantizer='fsq'.*got 0.5"),
        ([*FSQ, "--codebook_update", "ema"], "codebook_update.*must be gradient with quantizer='fsq'.*got 'ema'"),
        (["--quantizer", "fsq"], "fsq_levels.*got None"),
        (["--quantizer", "fsq", "--fsq_levels", "4", "5"], "latent_channels.*2, got 4"),
        (["--restart_until", "700"], "restart_until.*700"),
        (["--rfid_extractor", "inception"], "rfid_extractor.*validation_data"),
        (["--lpips_weight", "1", "--lpips_weights", "random"], "image_size.*at least 16"),
        (["--out_channels", "3"], "out_channels.*in_channels.*got 3"),
        (["--lr_scheduler", "piecewise_constant"], "lr_scheduler.*cosine"),
        (["--pretrained_vqvae", "somewhere", "--kmeans_images", "5"], "kmeans_images.*pretrained_vqvae"),
        (["--diffaugment", "colour"], "colour"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path, images_parquet: str
) -> None:
    arguments = ["--train_data", images_parquet, "--output_dir", str(tmp_path / "out"), *TINY_VQVAE, *SHORT_RUN]
    if "colour" in options:
        options = [*options, "--adversarial_weight", "1", "--discriminator_layers", "1"]
    with pytest.raises(ValueError, match=message):
        train_vqvae.main([*arguments, *options])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, images_parquet: str) -> None:
    model = torch.nn.Linear(2, 2)
    config = RunConfig(output_dir=str(tmp_path), report_to="none")
    run = TrainingRun(config, make_accelerator(config, 1, 1.0), "test", 1, RunIdentity({}, {}))
    with run.started({"model": model}):
        run.check_weights()
        with torch.no_grad():
            model.bias[1] = float("inf")
        with pytest.raises(ValueError, match="weights are not finite"):
            run.check_weights()


def test_recipes_say_what_they_build_on() -> None:
    recipes = REPOSITORY / "examples/recipes"
    shared = yaml.safe_load((recipes / "vqvae_cifar10.yaml").read_text())
    for name, patch_nums in (("plain", [8]), ("rq", [8, 8])):
        settings = train_vqvae.read_arguments([str(recipes / f"vqvae_cifar10_{name}.yaml")])
        assert settings.model.codebook_size == shared["codebook_size"]
        assert settings.run.max_train_steps == shared["max_train_steps"]
        assert train_vqvae.given_fields(settings.model)["patch_nums"] == patch_nums
