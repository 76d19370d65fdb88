# SPDX-License-Identifier: Apache-2.0
"""The transformer's training through its command line."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as DatasetImage
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from hf_var import ARPipeline, VARPipeline, data
from hf_var.training.prior_data import PriorData
from hf_var.training.prior_inputs import prior_inputs

from .conftest import (
    REPOSITORY,
    SHORT_RUN,
    TINY_VAR,
    last_step,
    load_script,
    losses,
    random_images,
    read_log,
    run_script,
    start,
    wait_for,
)


SCRIPT = "examples/train_var.py"
RECIPES = sorted(
    path for kind in ("var", "raster") for path in (REPOSITORY / "examples/recipes").glob(f"{kind}_*.yaml")
)
WEIGHTS = "transformer/model.safetensors"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Everything that draws random numbers or has a state.
EVERYTHING = ["--dropout", "0.1", "--drop_path_rate", "0.2", "--class_dropout_prob", "0.3"]
EVERYTHING += ["--ema_decay", "0.9", "--augment_rotation", "10", "--weight_decay_end", "0.2", "--lr_stable_steps", "3"]

train_var = load_script(SCRIPT)


def same_weights(first: Path, second: Path) -> bool:
    expected, found = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def var_folder(tmp_path_factory: pytest.TempPathFactory, vqvae_folder: str, images_parquet: str) -> str:
    """A pipeline that the script made, trained enough for its classes to differ."""
    folder = str(tmp_path_factory.mktemp("var"))
    arguments = ["--train_data", images_parquet, "--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN, "--top_p", "0.9"]
    arguments += ["--max_train_steps", "20", "--learning_rate", "1e-2", "--initializer_adaln_gamma_factor", "1"]
    train_var.main([*arguments, "--output_dir", folder])
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_two_steps(
    recipe: Path, tmp_path: Path, vqvae_folder: str, var_folder: str, images_parquet: str
) -> None:
    source = ["--train_data", images_parquet, "--validation_data", images_parquet, "--output_dir", str(tmp_path)]
    source += ["--torch_compile", "false", "--dataloader_num_workers", "0", "--lr_stable_steps", "1", *SHORT_RUN]
    settings = train_var.read_arguments([str(recipe)])
    source += ["--augmented_copies", "2"] if settings.script.augmented_copies > 0 else []
    if settings.script.pretrained_var is not None:
        source += ["--pretrained_var", var_folder, "--lr_stable_steps", "0"]
    else:
        source += ["--vqvae", vqvae_folder, *TINY_VAR, "--patch_nums", "1", "2", "4"]
    is_raster = recipe.stem.startswith("raster")
    source += ["--block_sizes", *["1"] * 21] if is_raster else []
    # One in a process of its own is enough: starting Python takes longer than the steps. All others have the precision of
    # the other tests in this one.
    if recipe.stem == "var_d16_256":
        run_script(SCRIPT, str(recipe), *source)
    else:
        train_var.main([str(recipe), *source, "--mixed_precision", "no"])
    assert len(losses(tmp_path)) == 2
    final = read_log(tmp_path)[-1]
    assert final["validation_bits_per_token"] == pytest.approx(final["validation_loss"] / math.log(2))
    pipeline = (ARPipeline if is_raster else VARPipeline).from_pretrained(tmp_path)
    assert pipeline("newt", output_type="np").images.shape == (1, 8, 8, 1)
    config = pipeline.priors[0].config
    for name in ("initializer_adaln_gamma_factor", "shared_adaln", "label_smoothing"):
        assert getattr(config, name) == train_var.given_fields(settings.model).get(name, getattr(config, name))


def test_result_describes_itself(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    source = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", vqvae_folder]
    steps = [*TINY_VAR, *SHORT_RUN, "--sample_steps", "1", "--num_samples", "12"]
    train_var.main([*source, "--output_dir", str(tmp_path), *steps, "--data_license", "cc0-1.0"])
    log = read_log(tmp_path)
    head = log[0]
    assert head["step"] == 0
    assert head["length"] == 21
    assert head["tokenizer"] == data.tokenizer_fingerprint(VARPipeline.from_pretrained(tmp_path).vqvae)
    assert head["num_parameters"] == VARPipeline.from_pretrained(tmp_path).transformer.num_parameters()
    assert head["flops_per_step"] > 6 * 4 * 21 * 2 * 12 * 16**2
    (first,) = [line for line in log if line["step"] == 1 and "loss" in line]
    assert first["gradient_norm"] > 0
    (first,) = [line for line in log if line["step"] == 1 and "train_loss_2" in line]
    # An untrained model draws among 16 codes.
    assert first["train_bits_per_token"] == pytest.approx(4, abs=0.1)
    assert 0 <= first["train_accuracy_1"] <= 1
    # Eight in a row.
    assert Image.open(tmp_path / "samples.png").size == (64, 16)
    assert len(list((tmp_path / "pictures").glob("samples-*.png"))) == 2
    card = (tmp_path / "README.md").read_text()
    for part in ("samples.png", "curves.png", "cc0-1.0", "validation_data: train.parquet"):
        assert part in card
    assert str(tmp_path) not in card


def test_validation_is_the_likelihood_of_the_saved_model(
    tmp_path: Path, vqvae_folder: str, images_parquet: str
) -> None:
    source = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", vqvae_folder]
    steps = [*TINY_VAR, *SHORT_RUN, "--max_train_steps", "8", "--learning_rate", "1e-2", "--ema_decay", "0.5"]
    # None of these belongs into a likelihood.
    steps += ["--class_dropout_prob", "0.9", "--label_smoothing", "0.3", "--drop_path_rate", "0.5", "--dropout", "0.5"]
    steps += ["--initializer_adaln_gamma_factor", "1", "--initializer_head_factor", "1"]
    train_var.main([*source, "--output_dir", str(tmp_path), *steps, "--resize_ratio", "1"])
    pipeline = VARPipeline.from_pretrained(tmp_path)
    images = data.load_source("train_data", images_parquet, None, ["train"])
    config = data.DataConfig(train_data="", train_batch_size=4, resize_ratio=1.0)
    rows = data.image_rows(config, None, images, (8, 8), 1, condition=data.LabelCondition("label", 3))
    with torch.no_grad():
        # In the script's batches: rounding, which decides between codes as good as equal, depends on their size.
        batches = [
            (pipeline.vqvae.encode(batch["pixel_values"]).codes, batch["class_labels"])
            for batch in data.ValidationBatches(images, rows, config)
        ]
        codes, class_labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        logits = pipeline.transformer(class_labels, pipeline.vqvae.teacher_forcing(codes)).logits
    expected = functional.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(dim=0)
    final = read_log(tmp_path)[-1]
    found = [final[f"validation_loss_{scale}"] for scale in range(3)]
    assert found == pytest.approx([part.mean().item() for part in expected.split([1, 4, 16])], rel=1e-4)
    assert final["validation_loss"] == pytest.approx(expected.mean().item(), rel=1e-4)
    accuracy = (logits.argmax(dim=-1) == codes).float().mean().item()
    assert final["validation_accuracy"] == pytest.approx(accuracy, rel=1e-4)
    assert expected.std() > 0.01


def test_two_processes_equal_one_that_accumulates(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    source = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", vqvae_folder]
    # What draws from a process's own random numbers differs.
    still = ["--class_dropout_prob", "0", "--drop_path_rate", "0", "--augment_rotation", "10"]
    # Seven validation batches for two processes.
    arguments = [*source, *TINY_VAR, *SHORT_RUN, *still, "--max_train_steps", "6", "--checkpointing_steps", "4"]
    arguments += [
        "--base_learning_rate",
        "0.01",
        "--ema_decay",
        "0.5",
        "--train_batch_size",
        "3",
        "--num_samples",
        "3",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    train_var.main([*arguments, "--gradient_accumulation_steps", "2", "--output_dir", str(one)])

    def run_two(*more: str) -> None:
        command = [*TORCHRUN, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(two), *more]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr

    run_two()
    first, second = read_log(one), read_log(two)
    assert len(first) == len(second)
    for expected, found in zip(first, second, strict=True):
        assert found.pop("tokenizer", None) == expected.pop("tokenizer", None)
        assert found.pop("validation_data", None) == expected.pop("validation_data", None)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # Six images a step, in both.
    assert {round(line["learning_rate"], 9) for line in first if "learning_rate" in line} == {
        round(line["learning_rate"], 9) for line in second if "learning_rate" in line
    }
    assert (one / "samples.png").read_bytes() == (two / "samples.png").read_bytes()

    shutil.copytree(two, tmp_path / "uninterrupted")
    (two / WEIGHTS).unlink()
    run_two("--resume_from_checkpoint", "latest")
    assert read_log(two) == read_log(tmp_path / "uninterrupted")
    assert same_weights(two, tmp_path / "uninterrupted")


def test_learning_rate_and_weight_decay_follow_the_paper(
    tmp_path: Path, vqvae_folder: str, images_parquet: str
) -> None:
    # Sixteen images a step; two steps up, two flat, four down to a tenth.
    arguments = ["--train_data", images_parquet, "--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN]
    arguments += ["--base_learning_rate", "0.16", "--train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    arguments += ["--max_train_steps", "8", "--lr_warmup_steps", "2", "--lr_stable_steps", "2"]
    train_var.main([*arguments, "--output_dir", str(tmp_path)])
    # The rate of the step that comes next.
    rates = [line["learning_rate"] for line in read_log(tmp_path) if "learning_rate" in line]
    assert rates == pytest.approx([0.0055, 0.01, 0.01, 0.01, 0.00775, 0.0055, 0.00325, 0.001])


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", vqvae_folder]
    arguments += [*TINY_VAR, *SHORT_RUN, "--class_dropout_prob", "0", "--drop_path_rate", "0", "--sample_steps", "1"]
    arguments += ["--validation_steps", "1", "--checkpointing_steps", "1", "--learning_rate", "1e-2"]
    for compiled in ("false", "true"):
        run_script(SCRIPT, *arguments, "--torch_compile", compiled, "--output_dir", str(tmp_path / compiled))
    plain, compiled = (read_log(tmp_path / name) for name in ("false", "true"))
    for name in ("loss", "validation_loss"):
        found, expected = ([line[name] for line in log if name in line] for log in (compiled, plain))
        assert found == pytest.approx(expected, rel=1e-4)
    assert (tmp_path / "true/samples.png").read_bytes() == (tmp_path / "false/samples.png").read_bytes()


def test_killed_run_equals_the_uninterrupted_one(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN, *EVERYTHING]
    arguments += ["--max_train_steps", "60", "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_var.main([*arguments, "--output_dir", str(whole)])

    step = random.Random(1).randrange(5, 30)
    process = start(SCRIPT, arguments, killed)
    wait_for(lambda: last_step(killed) >= step, process)
    time.sleep(random.Random(step).uniform(0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    # While a checkpoint is being written: its folder has its first files, but not yet its name.
    process = start(SCRIPT, arguments, killed)
    wait_for(lambda: last_step(killed) >= 40, process)
    wait_for(lambda: any(path.iterdir() for path in (killed / "checkpoints").glob(".unfinished-step-*")), process)
    process.kill()
    process.wait()
    # A machine that is taken away asks first: the run stops with a checkpoint of the very step.
    process = start(SCRIPT, arguments, killed)
    wait_for(lambda: last_step(killed) >= 46, process)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    newest = max(path.name for path in (killed / "checkpoints").glob("step-*"))
    assert newest == f"step-{last_step(killed):08d}"
    assert last_step(killed) < 60
    assert not (killed / WEIGHTS).exists()

    train_var.main([*arguments, "--output_dir", str(killed)])
    assert len(losses(whole)) == 60
    assert read_log(killed) == read_log(whole)
    assert same_weights(killed, whole)


def test_two_processes_stop_together(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN]
    arguments += ["--max_train_steps", "3000", "--checkpointing_steps", "0", "--dataloader_num_workers", "1"]
    command = [*TORCHRUN, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: last_step(tmp_path) >= 10, process)
    process.terminate()
    assert process.wait() != 0
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{last_step(tmp_path):08d}"


@pytest.mark.parametrize("lora_rank", ["0", "2"])
def test_sharded_training_equals_that_of_whole_models(
    lora_rank: str, tmp_path: Path, vqvae_folder: str, var_folder: str, images_parquet: str
) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, *SHORT_RUN]
    arguments += ["--class_dropout_prob", "0", "--drop_path_rate", "0", "--max_train_steps", "4", "--num_samples", "3"]
    arguments += ["--checkpointing_steps", "2", "--ema_decay", "0.5", "--train_batch_size", "3"]
    # A validation, with averages, must leave the weights of the next step as they were.
    arguments += ["--validation_steps", "1", "--learning_rate", "1e-2"]
    if lora_rank == "0":
        arguments += ["--vqvae", vqvae_folder, *TINY_VAR, "--gradient_accumulation_steps", "2"]
    else:
        arguments += ["--pretrained_var", var_folder, "--lora_rank", lora_rank]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}

    def run_two(name: str, script: list[str], *more: str) -> None:
        command = [*TORCHRUN, *script, *arguments, "--output_dir", str(tmp_path / name), *more]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr

    sharding = [str(Path(__file__).with_name("sharded_training.py")), str(REPOSITORY / "examples")]
    run_two("whole", [str(REPOSITORY / SCRIPT)])
    run_two("sharded", sharding)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-3)
    final = [read_log(folder)[-1] for folder in (sharded, whole)]
    assert final[0] == pytest.approx(final[1], rel=1e-2, abs=1e-3)
    expected, found = load_file(whole / WEIGHTS), load_file(sharded / WEIGHTS)
    assert expected.keys() == found.keys()
    moved = [name for name in expected if (expected[name] - found[name]).abs().max() > 1e-3]
    assert moved == []
    parts = [len(list(folder.glob("checkpoints/step-00000004/tensors/*"))) for folder in (whole, sharded)]
    assert parts == [1, 2]
    if lora_rank == "0":
        shutil.copytree(sharded, tmp_path / "uninterrupted")
        shutil.rmtree(sharded / "checkpoints/step-00000004")
        run_two("sharded", sharding, "--resume_from_checkpoint", "latest")
        assert read_log(sharded) == read_log(tmp_path / "uninterrupted")
        assert same_weights(sharded, tmp_path / "uninterrupted")
        check_other_numbers_of_processes(tmp_path, arguments, run_two, sharding)


def check_other_numbers_of_processes(
    folder: Path, arguments: list[str], run_two: Callable[..., None], sharding: list[str]
) -> None:
    """From the middle of a run of two processes in one, and from there in two again; a step has the same images."""
    expected = losses(folder / "uninterrupted")
    alone = folder / "alone"
    shutil.copytree(folder / "uninterrupted", alone)
    shutil.rmtree(alone / "checkpoints/step-00000004")
    more = ["--resume_from_checkpoint", "latest", "--gradient_accumulation_steps"]
    train_var.main([*arguments, *more, "4", "--output_dir", str(alone), "--checkpointing_steps", "1"])
    assert losses(alone)[:2] == expected[:2]
    assert losses(alone) == pytest.approx(expected, abs=1e-6)

    shutil.copytree(alone, folder / "again")
    shutil.rmtree(folder / "again/checkpoints/step-00000004")
    run_two("again", sharding, *more, "2")
    assert losses(folder / "again")[:3] == losses(alone)[:3]
    assert losses(folder / "again") == pytest.approx(expected, abs=1e-6)


def test_new_labels_keep_what_the_model_knows(tmp_path: Path, var_folder: str, images_folder: str) -> None:
    # The folder's classes in another order than those of the pretrained model, with a new one in place of "dog".
    images = tmp_path / "images"
    shutil.copytree(images_folder, images)
    (images / "dog").rename(images / "yak")
    arguments = ["--pretrained_var", var_folder, "--train_data", str(images), *SHORT_RUN]
    train_var.main([*arguments, "--learning_rate", "1e-9", "--output_dir", str(tmp_path / "tuned")])
    before, after = VARPipeline.from_pretrained(var_folder), VARPipeline.from_pretrained(tmp_path / "tuned")
    assert after.transformer.config.id2label == {0: "cat", 1: "newt", 2: "yak"}
    assert after.config["top_p"] == 0.9
    old = before.transformer.embeddings.class_embedding.weight
    new = after.transformer.embeddings.class_embedding.weight
    cat, _, newt, unconditional = old
    for row, expected in zip(new, (cat, newt, unconditional, unconditional), strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)
    # Dropout may change, and is built into the layers.
    args = train_var.read_arguments([*arguments, "--drop_path_rate", "0.5", "--output_dir", ""])
    labels = PriorData(None, None, id2label={0: "cat"}, condition_size=None)
    models = train_var.Models(before.vqvae, before.transformer, None, {})
    config = train_var.make_config(args, models, labels)
    transformer = train_var.make_transformer(args, config, before.transformer)
    assert [layer.drop_path.rate for layer in transformer.layers] == [0.0, 0.5]
    assert torch.equal(transformer.head.weight, before.transformer.head.weight)
    with pytest.raises(ValueError, match="`hidden_size` is 16 in `pretrained_var`, got 32"):
        train_var.main([*arguments, "--hidden_size", "32", "--output_dir", str(tmp_path / "no")])


def test_numbers_without_names_are_the_trained_labels(tmp_path: Path, var_folder: str) -> None:
    rows = {"image": random_images(6), "label": [0, 1, 0, 1, 0, 1]}
    features = Features({"image": DatasetImage(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "unnamed.parquet")
    arguments = ["--pretrained_var", var_folder, "--train_data", str(tmp_path / "unnamed.parquet"), *SHORT_RUN]
    train_var.main([*arguments, "--learning_rate", "1e-9", "--output_dir", str(tmp_path / "tuned")])
    before, after = VARPipeline.from_pretrained(var_folder), VARPipeline.from_pretrained(tmp_path / "tuned")
    assert after.transformer.config.id2label == before.transformer.config.id2label
    old, new = (pipeline.transformer.embeddings.class_embedding.weight for pipeline in (before, after))
    torch.testing.assert_close(new, old, rtol=0, atol=1e-6)


def test_labels_of_the_validation_must_mean_the_same(
    tmp_path: Path, vqvae_folder: str, images_parquet: str, images_folder: str
) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(images_folder, fewer)
    shutil.rmtree(fewer / "dog")
    arguments = ["--train_data", images_parquet, "--validation_data", str(fewer), "--vqvae", vqvae_folder]
    with pytest.raises(ValueError, match=r"`validation_data` has the labels \['cat', 'newt'\]"):
        train_var.main([*arguments, *TINY_VAR, *SHORT_RUN, "--output_dir", str(tmp_path / "output")])


def test_streamed_codes_are_trained_on(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    codes = str(tmp_path / "codes")
    tokenize = load_script("examples/tokenize_dataset.py")
    tokenize.main(["--data", images_parquet, "--vqvae", vqvae_folder, "--output_dir", codes, "--rows_per_shard", "6"])
    arguments = ["--train_data", f"{codes}/*.parquet", "--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN]
    arguments += ["--streaming", "true", "--max_train_steps", "14", "--checkpointing_steps", "9"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_var.main([*arguments, "--output_dir", str(whole)])
    assert VARPipeline.from_pretrained(whole).transformer.config.id2label[2] == "newt"
    shutil.copytree(whole / "checkpoints", resumed / "checkpoints")
    shutil.copy(whole / "train_log.jsonl", resumed)
    train_var.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
    assert read_log(resumed) == read_log(whole)
    assert same_weights(resumed, whole)


@pytest.mark.parametrize("width", [5, 16], ids=["another_width", "that_of_the_transformer"])
def test_embeddings_condition_a_transformer(width: int, tmp_path: Path, vqvae_folder: str) -> None:
    embeddings = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    features = Features({"image": DatasetImage(), "meaning": List(Value("float32"), length=width)})
    rows = {"image": random_images(6), "meaning": embeddings.tolist()}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "embedded.parquet")
    images = str(tmp_path / "embedded.parquet")
    arguments = ["--train_data", images, "--validation_data", images, "--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN]
    arguments += ["--condition_column", "meaning", "--initializer_adaln_gamma_factor", "1", "--num_samples", "3"]
    arguments += ["--initializer_head_factor", "1", "--learning_rate", "1e-2", "--class_dropout_prob", "0.3"]
    train_var.main([*arguments, "--output_dir", str(tmp_path / "var")])
    assert read_log(tmp_path / "var")[-1]["validation_loss"] > 0
    assert Image.open(tmp_path / "var/samples.png").size == (24, 8)
    # The same from codes that were made before.
    train_var.main([*arguments, "--augmented_copies", "2", "--output_dir", str(tmp_path / "copies")])

    pipeline = VARPipeline.from_pretrained(tmp_path / "var")
    assert pipeline.transformer.config.num_labels == 0
    assert pipeline.transformer.config.condition_channels == width
    arguments = {"generator": torch.Generator().manual_seed(1), "guidance_scale": 3.0, "output_type": "np"}
    sampled = pipeline(class_embeds=embeddings[:2], **arguments).images
    assert sampled.shape == (2, 8, 8, 1)
    codes = torch.randint(16, (1, 21), generator=torch.Generator().manual_seed(0))
    inputs = pipeline.vqvae.teacher_forcing(codes)
    with torch.no_grad():
        first, second, nothing = (
            pipeline.transformer(class_embeds=embeds, scale_inputs=inputs).logits
            for embeds in (embeddings[:1], embeddings[1:2], pipeline.transformer.get_class_embeds(torch.tensor([-1])))
        )
        unconditional = pipeline.transformer(scale_inputs=inputs).logits
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(nothing, unconditional)


def test_raster_order_is_trained(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, "--vqvae", vqvae_folder]
    arguments += [*TINY_VAR, *SHORT_RUN, "--block_sizes", *["1"] * 21, "--num_samples", "2"]
    train_var.main([*arguments, "--output_dir", str(tmp_path), "--learning_rate", "1e-2", "--max_train_steps", "6"])
    pipeline = ARPipeline.from_pretrained(tmp_path)
    transformer, vqvae = pipeline.prior, pipeline.vqvae
    assert transformer.config.block_lengths == [1] * 21
    assert pipeline(0, output_type="np", generator=torch.Generator().manual_seed(0)).images.shape == (1, 8, 8, 1)
    assert (tmp_path / "samples.png").is_file()
    codes = torch.randint(16, (2, 21), generator=torch.Generator().manual_seed(0))
    inputs = prior_inputs(vqvae, {"codes": codes}, is_raster=True)
    assert inputs["scale_inputs"].shape == (2, 20, 4)
    # A token is read by those after it alone.
    changed = codes.clone()
    changed[:, 7] = (codes[:, 7] + 1) % 16
    others = prior_inputs(vqvae, {"codes": changed}, is_raster=True)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        logits, other_logits = (transformer(labels, both["scale_inputs"]).logits for both in (inputs, others))
    torch.testing.assert_close(logits[:, :8], other_logits[:, :8], rtol=0, atol=1e-6)
    assert (logits[:, 8] - other_logits[:, 8]).abs().max() > 1e-6
    assert read_log(tmp_path)[-1]["validation_loss"] < 5


def test_adapter_and_merged_pipeline_are_the_same_model(tmp_path: Path, var_folder: str, images_parquet: str) -> None:
    arguments = ["--pretrained_var", var_folder, "--train_data", images_parquet, *SHORT_RUN, "--lora_rank", "4"]
    arguments += ["--validation_data", images_parquet, "--max_train_steps", "6", "--learning_rate", "1e-2"]
    arguments += ["--checkpointing_steps", "3", "--ema_decay", "0.5", "--gradient_checkpointing", "true"]
    train_var.main([*arguments, "--output_dir", str(tmp_path)])
    base, merged = VARPipeline.from_pretrained(var_folder), VARPipeline.from_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(Path(var_folder) / WEIGHTS).keys()
    adapted = VARPipeline.from_pretrained(var_folder)
    adapted.load_lora_weights(str(tmp_path / "lora"))
    labels, codes = torch.tensor([0, 2]), torch.randint(16, (2, 21), generator=torch.Generator().manual_seed(0))
    inputs = base.vqvae.teacher_forcing(codes)
    with torch.no_grad():
        logits = [pipeline.transformer.eval()(labels, inputs).logits for pipeline in (base, adapted, merged)]
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-4, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-2
    # What was frozen stayed.
    frozen = "head.weight"
    assert torch.equal(load_file(tmp_path / WEIGHTS)[frozen], load_file(Path(var_folder) / WEIGHTS)[frozen])
    # It goes on from its checkpoint.
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "checkpoints", resumed / "checkpoints")
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    train_var.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
    assert same_weights(resumed, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base_learning_rate", "0"], "`base_learning_rate` must be positive"),
        (["--lora_rank", "4"], "`lora_rank` = 4 adapts a trained transformer"),
        (["--lora_rank", "-1"], "`lora_rank` must be at least 0, got -1"),
        (["--push_steps", "5"], "`push_steps` = 5 needs `push_to_hub`"),
        (["--lr_final_ratio", "2"], "`lr_final_ratio` must be a share from 0 to 1, got 2.0"),
        (["--lr_scheduler", "constant"], "`lr_final_ratio` goes with `lr_scheduler` linear or cosine, got 'constant'"),
        (["--block_sizes", "5", "16"], "`block_sizes` must be one block per scale, .*, or all ones for raster order"),
        (["--condition_column", "label"], "`condition_column` = 'label' must hold lists of floating point numbers"),
        (
            ["--condition_column", "x", "--num_labels", "3"],
            "`num_labels` must be 0 with `condition_column` = 'x', got 3",
        ),
        (
            ["--condition_column", "x", "--label_column", "y"],
            "`label_column` = 'y' and `condition_column` = 'x' exclude",
        ),
        (["--weight_decay_end", "-1"], "`weight_decay_end` must be at least 0, got -1.0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, vqvae_folder: str, images_parquet: str
) -> None:
    source = ["--train_data", images_parquet, "--vqvae", vqvae_folder, "--output_dir", str(tmp_path / "output")]
    with pytest.raises(ValueError, match=message):
        train_var.main([*source, *TINY_VAR, *SHORT_RUN, *arguments])
    assert not (tmp_path / "output").exists()
