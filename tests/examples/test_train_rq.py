# SPDX-License-Identifier: Apache-2.0
"""The trainer of RQ-Transformers and VQGAN's GPT through its command line: classes, texts, other images, resumed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, load_dataset
from diffusers import DiffusionPipeline
from PIL import Image as PILImage
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_var import ARPipeline, RQTransformerConfig, VQVAEModel, data, stack_codes
from hf_var.training.optimization import OptimizerConfig, make_optimizer
from hf_var.training.prior_inputs import CodeNoiseConfig, StackInputs, replaced_codes
from parity import load_lineage_case
from priors.rq import SIZES, rq_model

from .conftest import (
    NAMES,
    REPOSITORY,
    SHORT_RUN,
    TINY_VQVAE,
    load_script,
    losses,
    random_images,
    read_log,
    run_script,
)


SCRIPT = "examples/train_rq.py"
RECIPES = REPOSITORY / "examples/recipes"
PAIRS = sorted([*RECIPES.glob("gpt_*.yaml"), *RECIPES.glob("rq_*.yaml")])
TINY = ["--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
TINY_GPT = [*TINY, "--code_inputs", "tokens", "--num_depth_layers", "0"]
TINY_RQ = [*TINY, "--num_depth_layers", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

train_vqvae = load_script("examples/train_vqvae.py")
train_rq = load_script(SCRIPT)


def make_tokenizer(folder: Path, images_parquet: str, *arguments: str) -> str:
    sizes = [*TINY_VQVAE[: TINY_VQVAE.index("--patch_nums")], "--refinement_ratio", "0", *arguments]
    train_vqvae.main(["--train_data", images_parquet, "--output_dir", str(folder), *sizes, *SHORT_RUN])
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, images_parquet: str) -> str:
    """A tokenizer with one map of codes."""
    return make_tokenizer(tmp_path_factory.mktemp("plain"), images_parquet, "--patch_nums", "4")


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory, images_parquet: str) -> str:
    """A tokenizer of two maps of one size."""
    return make_tokenizer(tmp_path_factory.mktemp("residual"), images_parquet, "--patch_nums", "4", "4")


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 images and the same upside down, joined by a file of metadata."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for index, image in enumerate(random_images(24)):
        names = [f"photos/{index}.png", f"maps/{index}.png"]
        for name, picture in zip(names, (image, image.transpose(PILImage.Transpose.FLIP_TOP_BOTTOM)), strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            picture.save(folder / name)
        lines.append(json.dumps({"image_file_name": names[0], "condition_file_name": names[1]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def sources(images: str, vqvae: str, output_dir: Path) -> list[str]:
    return ["--train_data", images, "--validation_data", images, "--vqvae", vqvae, "--output_dir", str(output_dir)]


# --- recipes and conditions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", PAIRS, ids=lambda path: path.stem)
def test_recipe_takes_two_steps(
    recipe: Path, tmp_path: Path, plain: str, residual: str, images_parquet: str, pairs_folder: str
) -> None:
    settings = train_rq.read_arguments([str(recipe)])
    is_pair = settings.conditions.condition_column is not None
    arguments = sources(pairs_folder if is_pair else images_parquet, plain, tmp_path)
    arguments += [*TINY, *SHORT_RUN, "--dataloader_num_workers", "0", "--num_samples", "2", "--image_column", "image"]
    arguments += ["--gradient_accumulation_steps", "1", "--resize_ratio", "1.0"]
    if settings.script.augmented_copies > 0:
        arguments += ["--augmented_copies", "2"]
    if is_pair:
        arguments += ["--condition_vqvae", plain, "--condition_column", "condition"]
    if recipe.stem.startswith("rq_"):
        arguments += ["--vqvae", residual]
    # One in a process of its own is enough: starting Python takes longer than the steps.
    if recipe.stem == "rq_digits":
        run_script(SCRIPT, str(recipe), *arguments)
    else:
        train_rq.main([str(recipe), *arguments, "--mixed_precision", "no"])
    assert len(losses(tmp_path)) == 2
    assert read_log(tmp_path)[-1]["validation_bits_per_token"] > 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is ARPipeline
    condition = {"condition_image": PILImage.new("L", (8, 8))} if is_pair else {"class_labels": "newt"}
    assert pipeline(**condition, output_type="np").images.shape == (1, 8, 8, 1)
    assert (tmp_path / "samples.png").is_file()
    card = (tmp_path / "README.md").read_text()
    assert ("the GPT of VQGAN" if recipe.stem.startswith("gpt_") else "an RQ-Transformer") in card
    config = pipeline.prior.config
    for name in ("shared_embedding", "head_bias", "code_inputs", "dropout"):
        assert getattr(config, name) == train_rq.given_fields(settings.model).get(name, getattr(config, name))


@pytest.mark.parametrize("copies", ["0", "2"])
def test_a_condition_of_another_image_is_learned(tmp_path: Path, plain: str, pairs_folder: str, copies: str) -> None:
    """The map, turned back, is the image: a model that reads it predicts better than one that cannot."""
    arguments = [*sources(pairs_folder, plain, tmp_path), *TINY_GPT, *SHORT_RUN, "--image_column", "image"]
    arguments += ["--condition_column", "condition", "--condition_vqvae", plain, "--resize_ratio", "1.0"]
    arguments += ["--max_train_steps", "60", "--learning_rate", "1e-2", "--augmented_copies", copies]
    train_rq.main([*arguments, "--train_batch_size", "24", "--dropout", "0", "--logging_steps", "60"])
    pipeline = ARPipeline.from_pretrained(tmp_path)
    assert pipeline.prior.config.condition_length == 16
    assert pipeline.prior.config.condition_vocab_size == 16
    rows = load_dataset("imagefolder", data_dir=pairs_folder, split="train")
    photos, maps = ([row[name].convert("L") for row in rows] for name in ("image", "condition"))
    stacks = stack_codes(pipeline.encode_images(photos), 1)
    ids = pipeline.encode_images(maps)
    with torch.no_grad():
        right = pipeline.prior(condition_ids=ids, codes=stacks, labels=stacks).loss
        wrong = pipeline.prior(condition_ids=ids.roll(1, dims=0), codes=stacks, labels=stacks).loss
    assert right < wrong - 0.05
    log = read_log(tmp_path)[-1]
    assert log["validation_loss"] == pytest.approx(right.item(), rel=1e-3)
    # Conditions above their samples.
    assert PILImage.open(tmp_path / "samples.png").size == (8 * 16, 16)


def test_segmentation_maps_end_to_end(tmp_path: Path) -> None:
    """A tokenizer of maps, a GPT from maps to images in colour, and the pipeline of both."""
    ids = [np.repeat(np.arange(8) % 3, 8).reshape(8, 8) + index % 3 for index in range(24)]
    maps = [PILImage.fromarray(one.astype(np.uint8)) for one in ids]
    features = Features({"image": Image(), "map": Image()})
    images = str(tmp_path / "pairs.parquet")
    Dataset.from_dict({"image": random_images(24, "RGB"), "map": maps}, features=features).to_parquet(images)
    colour = ["--in_channels", "3", "--image_column", "image"]
    plain = make_tokenizer(tmp_path / "plain", images, "--patch_nums", "4", *colour)
    sizes = ["--in_channels", "5", "--sample_type", "class_map", "--bce_weight", "1", "--l2_weight", "0"]
    vqgan = make_tokenizer(tmp_path / "maps", images, "--patch_nums", "4", *sizes, "--image_column", "map")
    arguments = [*sources(images, plain, tmp_path / "gpt"), *TINY_GPT, *SHORT_RUN, "--image_column", "image"]
    arguments += ["--condition_column", "map", "--condition_vqvae", vqgan, "--resize_ratio", "1.0"]
    train_rq.main([*arguments, "--num_samples", "4", "--augmented_copies", "2", "--horizontal_flip", "true"])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "gpt")
    assert pipeline.condition_vqvae.config.sample_type == "class_map"
    output = pipeline(condition_image=maps[:2], generator=torch.Generator().manual_seed(0))
    one_hot = torch.stack([torch.from_numpy(one) for one in ids[:2]])
    expected = pipeline.condition_vqvae.encode(torch.nn.functional.one_hot(one_hot, 5).movedim(-1, 1).float()).codes
    assert torch.equal(pipeline.encode_conditions(maps[:2]), expected)
    again = pipeline(condition_codes=expected, generator=torch.Generator().manual_seed(0)).codes
    assert torch.equal(again, output.codes)
    with pytest.raises(ValueError, match="`condition_image`.* 5"):
        pipeline(condition_image=PILImage.new("L", (8, 8), 5))
    samples = PILImage.open(tmp_path / "gpt/samples.png")
    assert samples.size == (8 * 4, 16)
    # The maps above have the colours of their classes.
    assert samples.mode == "RGB"
    assert {colour for _, colour in samples.crop((0, 0, 32, 8)).getcolors()} <= {
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
    }


def test_pairs_are_augmented_alike(pairs_folder: str) -> None:
    settings = data.DataConfig(train_data=pairs_folder, image_column="image", train_batch_size=24)
    augment = data.AugmentConfig(
        horizontal_flip=True, augment_rotation=20, augment_translation=0.2, augment_zoom=0.2, augment_shear=10
    )
    dataset = data.load_source("train_data", pairs_folder, None, ["train"])
    # The same images twice: whatever happens to one must happen to the other.
    dataset = dataset.select_columns(["image"]).add_column("same", dataset["image"][:], feature=Image())
    reading = data.image_rows(settings, augment, dataset, (8, 8), 1)
    copy = replace(settings, image_column="same")
    condition = data.ImageCondition(data.image_rows(copy, augment, dataset, (8, 8), 1), 16)
    both = data.image_rows(settings, augment, dataset, (8, 8), 1, condition)
    batch = next(iter(data.TrainingBatches(dataset, both, settings)))
    alone = next(iter(data.TrainingBatches(dataset, reading, settings)))
    assert torch.equal(batch["condition_pixel_values"], batch["pixel_values"])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    again = next(iter(data.TrainingBatches(dataset, both, settings, seed=1)))
    assert not torch.equal(batch["pixel_values"], again["pixel_values"])


@pytest.fixture(scope="module")
def captions_parquet(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Images with captions and token ids, and a tokenizer of their words."""
    folder = tmp_path_factory.mktemp("captions")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "a", "big", *NAMES])}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "text"
    )
    captions = [f"a {'big ' * (index % 2)}{NAMES[index % 3]}" for index in range(24)]
    ids = [[index % 3, index % 5] for index in range(24)]
    features = Features({"image": Image(), "caption": Value("string"), "ids": List(Value("int32"))})
    rows = {"image": random_images(24), "caption": captions, "ids": ids}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet"), str(folder / "text")


def test_captions(tmp_path: Path, residual: str, captions_parquet: tuple[str, str]) -> None:
    images, text = captions_parquet
    arguments = [*sources(images, residual, tmp_path), *TINY_RQ, *SHORT_RUN, "--condition_column", "caption"]
    arguments += ["--text_tokenizer", text, "--condition_length", "4", "--class_dropout_prob", "0.1"]
    arguments += ["--condition_loss_weight", "0.1", "--num_samples", "2"]
    train_rq.main(arguments)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.prior.config.condition_vocab_size == 7
    codes = pipeline(prompt="a big newt", guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).codes
    ids = torch.tensor([[2, 3, 6, 0]])
    same = pipeline(condition_codes=ids, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).codes
    assert torch.equal(codes, same)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert 'prompt="a photo"' in card


def test_token_ids(tmp_path: Path, plain: str, captions_parquet: tuple[str, str]) -> None:
    images, _ = captions_parquet
    arguments = [*sources(images, plain, tmp_path), *TINY_GPT, *SHORT_RUN, "--condition_column", "ids"]
    train_rq.main([*arguments, "--condition_vocab_size", "5", "--num_samples", "2"])
    pipeline = ARPipeline.from_pretrained(tmp_path)
    assert pipeline.prior.config.condition_length == 2
    assert pipeline(condition_codes=torch.tensor([[2, 4]]), output_type="np").images.shape == (1, 8, 8, 1)
    with pytest.raises(ValueError, match=r"must hold 2 integers from 0 to 3 in every row, got \[1, 4\]"):
        train_rq.main([*arguments, "--condition_vocab_size", "4"])


# --- resumed and distributed -----------------------------------------------------------------------------------------


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, residual: str, images_parquet: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = [*sources(images_parquet, residual, whole), *TINY_RQ, *SHORT_RUN, "--max_train_steps", "6"]
    arguments += ["--gradient_accumulation_steps", "2", "--ema_decay", "0.9", "--class_dropout_prob", "0.2"]
    arguments += ["--checkpointing_steps", "2", "--checkpoints_total_limit", "9", "--code_replacement_prob", "0.3"]
    arguments += ["--stochastic_codes", "true", "--soft_code_temperature", "0.5"]
    train_rq.main(arguments)
    shutil.copytree(whole / "checkpoints/step-00000004", resumed / "checkpoints/step-00000004")
    train_rq.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    found, expected = (load_file(folder / "prior/model.safetensors") for folder in (resumed, whole))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    changed = ["--soft_code_temperature", "1.0", "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="soft_code_temperature"):
        train_rq.main([*arguments, "--output_dir", str(resumed), *changed])


def test_two_processes_equal_one_that_accumulates(tmp_path: Path, residual: str, images_parquet: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*sources(images_parquet, residual, one), *TINY_RQ, *SHORT_RUN, "--max_train_steps", "4"]
    arguments += ["--ema_decay", "0", "--learning_rate", "3e-5", "--dropout", "0", "--num_samples", "0"]
    # One batch, which the second process has no share of.
    arguments += ["--validation_images", "4"]
    train_rq.main([*arguments, "--gradient_accumulation_steps", "2"])
    command = [*TORCHRUN, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(two)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr
    first, second = read_log(one), read_log(two)
    assert len(first) == len(second)
    for expected, found in zip(first, second, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


# --- inputs and groups -----------------------------------------------------------------------------------------------


def test_inputs_of_a_training(residual: str) -> None:
    vqvae = VQVAEModel.from_pretrained(residual)
    config = RQTransformerConfig(
        **{**SIZES, "codebook_size": 16, "patch_nums": [4, 4], "latent_channels": 4}, num_labels=3
    )
    batch = {"pixel_values": torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}
    codes = vqvae.encode(batch["pixel_values"]).codes
    plain = StackInputs(vqvae, config)(batch)
    assert torch.equal(plain["labels"], stack_codes(codes, 2))
    assert torch.equal(plain["code_vectors"], vqvae.code_vectors(plain["labels"]))
    from_codes = StackInputs(vqvae, config)({"codes": codes})
    assert all(torch.equal(from_codes[name], values) for name, values in plain.items())
    soft = StackInputs(vqvae, config, noise=CodeNoiseConfig(soft_code_temperature=0.5))(batch)
    assert soft.keys() == {"code_vectors", "soft_labels"}
    assert torch.equal(soft["code_vectors"], plain["code_vectors"])
    assert torch.equal(soft["soft_labels"].argmax(dim=-1), plain["labels"])
    torch.testing.assert_close(soft["soft_labels"].sum(dim=-1), torch.ones(3, 16, 2))
    torch.manual_seed(0)
    noise = CodeNoiseConfig(soft_code_temperature=50.0, stochastic_codes=True)
    sampled = StackInputs(vqvae, config, noise=noise)(batch)
    assert not torch.equal(sampled["code_vectors"], plain["code_vectors"])


def test_replaced_codes() -> None:
    torch.manual_seed(0)
    codes = torch.full((64, 100, 2), 7)
    found = replaced_codes(codes, CodeNoiseConfig(code_replacement_prob=0.25), 50)
    # One in fifty of the others is the same by chance.
    assert (found != codes).float().mean() == pytest.approx(0.25 * 49 / 50, abs=0.01)
    assert found.unique().tolist() == list(range(50))
    assert replaced_codes(codes, CodeNoiseConfig(), 50) is codes


def test_groups_of_the_decay_are_those_of_the_public_code() -> None:
    groups = load_lineage_case("gpt", "class").manifest["weight_decay"]
    decayed = {name for name in next(iter(groups.values())) if name.endswith("weight")}
    model = rq_model("gpt")
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.01))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]}
    assert found
    assert all(name.startswith(("layers.", "head.projections.")) and name.endswith("weight") for name in found)
    assert not any("norm" in name or "embedding" in name for name in found)
    layers = {name.split(".", 2)[2] for name in found if name.startswith("layers.0")}
    official = {name.split(".", 2)[2] for name in decayed if name.startswith("blocks.0")}
    assert len(layers) == len(official) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--condition_vqvae", "somewhere"], "`condition_vqvae` needs a `condition_column`"),
        (["--stochastic_codes", "true"], "`stochastic_codes` needs a `soft_code_temperature` above 0"),
        (["--soft_code_temperature", "0.5", "--augmented_copies", "2"], "`augmented_copies` must be 0"),
        (["--code_replacement_prob", "1.5"], "`code_replacement_prob` must be"),
        (["--codebook_size", "8"], "`codebook_size` is 16 in the tokenizer or the data, got 8"),
        (["--hidden_sizes", "8"], "Unknown argument 'hidden_sizes' in the command line. Did you mean hidden_size"),
        (["--num_depth_layers", "0"], "`num_depth_layers` must be at least 1 for 2 depths"),
        (["--guidance_scale", "2"], "`guidance_scale` must be 1 for a prior that was trained without class dropout"),
        (["--condition_column", "image"], "`condition_vocab_size` must say how many ids"),
        (["--condition_column", "image", "--condition_vocab_size", "4"], "must hold lists of integers"),
        (["--push_to_hub", "--push_steps", "1"], "`push_steps` must be 0"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, residual: str, images_parquet: str, arguments: list[str], message: str
) -> None:
    shared = ["--train_data", images_parquet, "--vqvae", residual, "--output_dir", str(tmp_path / "out"), *SHORT_RUN]
    with pytest.raises(ValueError, match=message):
        train_rq.main([*shared, *TINY_RQ, *arguments])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_growing_maps_is_refused(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    with pytest.raises(ValueError, match="`patch_nums` must be maps of one size"):
        train_rq.main([*sources(images_parquet, vqvae_folder, tmp_path / "out"), *TINY_RQ, *SHORT_RUN])
