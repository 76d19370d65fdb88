# SPDX-License-Identifier: Apache-2.0
"""The training scripts through their command lines."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from safetensors.torch import load_file, save_file

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEModel
from hf_var.conversion import export_official_vqvae, load_official_vqvae
from hf_var.data import tokenizer_fingerprint
from parity import load_case

from .conftest import (
    NAMES,
    REPOSITORY,
    SHORT_RUN,
    TINY_VAR,
    TINY_VQVAE,
    load_script,
    losses,
    random_images,
    read_log,
    run_script,
)


train_vqvae = load_script("examples/train_vqvae.py")
train_var = load_script("examples/train_var.py")


def test_both_recipes_by_command_line_end_in_a_pipeline(tmp_path: Path, images_parquet: str) -> None:
    data = ["--train_data", images_parquet, "--validation_data", images_parquet]
    vqvae, var = str(tmp_path / "vqvae"), str(tmp_path / "var")
    run_script(
        "examples/train_vqvae.py",
        str(REPOSITORY / "examples/recipes/vqvae_digits.yaml"),
        *(*data, "--output_dir", vqvae, *TINY_VQVAE, *SHORT_RUN, "--unquantized_steps", "1", "--kmeans_images", "24"),
    )
    run_script(
        "examples/train_var.py",
        str(REPOSITORY / "examples/recipes/var_digits.yaml"),
        *(*data, "--vqvae", vqvae, "--output_dir", var, *TINY_VAR, *SHORT_RUN, "--augmented_copies", "2"),
    )

    pipeline = VARPipeline.from_pretrained(var)
    assert pipeline.transformer.config.id2label == dict(enumerate(NAMES))
    assert pipeline.transformer.config.hidden_size == 16
    images = pipeline(["newt", "cat"], generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert "validation_psnr" in read_log(vqvae)[-1]
    assert "validation_loss_2" in read_log(var)[-1]


def test_class_folders_give_colour_images_and_names(tmp_path: Path, images_folder: str) -> None:
    data = ["--train_data", images_folder]
    vqvae, var = str(tmp_path / "vqvae"), str(tmp_path / "var")
    train_vqvae.main([*data, "--output_dir", vqvae, *TINY_VQVAE, *SHORT_RUN, "--in_channels", "3"])
    train_var.main([*data, "--vqvae", vqvae, "--output_dir", var, *TINY_VAR, *SHORT_RUN])
    pipeline = VARPipeline.from_pretrained(var)
    assert pipeline.get_label_ids(["cat", "newt"]) == [0, 2]
    assert pipeline("dog", output_type="np").images.shape == (1, 8, 8, 3)


def test_tar_files_are_read(tmp_path: Path, vqvae_folder: str) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for index, image in enumerate(random_images(4)):
                picture = io.BytesIO()
                image.save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("cls", str(index % 3).encode())):
                    member = tarfile.TarInfo(f"{shard}{index}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    data = ["--train_data", str(tmp_path / "*.tar"), "--vqvae", vqvae_folder]
    train_var.main([*data, "--output_dir", str(tmp_path / "var"), *TINY_VAR, *SHORT_RUN])
    assert VARPipeline.from_pretrained(tmp_path / "var").transformer.config.num_labels == 3


def test_converted_official_tokenizer_is_fine_tuned(tmp_path: Path, images_folder: str) -> None:
    case = load_case("A")
    load_official_vqvae(case.vqvae_weights, patch_nums=case.patch_nums).save_pretrained(tmp_path / "official")
    arguments = ["--train_data", images_folder, "--validation_data", images_folder, *SHORT_RUN]
    arguments += ["--pretrained_vqvae", str(tmp_path / "official"), "--learning_rate", "1e-9"]
    train_vqvae.main([*arguments, "--output_dir", str(tmp_path / "tuned")])
    tuned = export_official_vqvae(VQVAEModel.from_pretrained(tmp_path / "tuned"))
    assert tuned.keys() == case.vqvae_weights.keys()
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight"):
        torch.testing.assert_close(tuned[name], case.vqvae_weights[name], rtol=0, atol=1e-6)


def test_unconditional_training_needs_no_labels(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    data = ["--train_data", images_parquet, "--vqvae", vqvae_folder, "--num_labels", "0"]
    train_var.main([*data, "--output_dir", str(tmp_path), *TINY_VAR, *SHORT_RUN])
    pipeline = VARPipeline.from_pretrained(tmp_path)
    assert pipeline.transformer.config.num_labels == 0
    assert pipeline(None, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize("script", ["vqvae", "var"])
def test_resumed_run_equals_the_uninterrupted_one(
    script: str, tmp_path: Path, vqvae_folder: str, images_parquet: str
) -> None:
    arguments = ["--train_data", images_parquet, "--validation_data", images_parquet, *SHORT_RUN]
    arguments += ["--max_train_steps", "6", "--checkpointing_steps", "2", "--checkpoints_total_limit", "9"]
    arguments += [
        "--augment_rotation",
        "10",
        "--gradient_accumulation_steps",
        "2",
        "--ema_decay",
        "0.9",
        "--dropout",
        "0.1",
    ]
    if script == "vqvae":
        main, weights = train_vqvae.main, "model.safetensors"
        arguments += [*TINY_VQVAE, *["--unquantized_steps", "1", "--kmeans_images", "24", "--codebook_window", "1"]]
        arguments += ["--restart_until", "0.7"]
    else:
        main, weights = train_var.main, "transformer/model.safetensors"
        arguments += [*TINY_VAR, "--vqvae", vqvae_folder, *["--drop_path_rate", "0.2", "--augmented_copies", "3"]]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main([*arguments, "--output_dir", str(whole)])

    # As if killed while the checkpoint of step 4 was being written, with step 5 in the log.
    shutil.copytree(whole, resumed)
    (resumed / "checkpoints/step-00000004").rename(resumed / "checkpoints/.unfinished-step-00000004")
    (resumed / "checkpoints/.unfinished-step-00000004/states.json").unlink()
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    (resumed / weights).unlink()
    main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])

    assert len(losses(whole)) == 6
    assert read_log(resumed) == read_log(whole)
    expected, found = load_file(whole / weights), load_file(resumed / weights)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_latest_starts_afresh_and_old_checkpoints_go(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--output_dir", str(tmp_path), *TINY_VQVAE, *SHORT_RUN]
    arguments += ["--max_train_steps", "4", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    train_vqvae.main([*arguments, "--resume_from_checkpoint", "latest"])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]


def test_accumulation_equals_a_larger_batch(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN]
    arguments += [
        "--augment_rotation",
        "10",
        "--class_dropout_prob",
        "0",
        "--drop_path_rate",
        "0",
        "--max_train_steps",
        "3",
    ]
    runs = {"large": ["8", "1"], "small": ["2", "4"]}
    for name, (batch_size, accumulation) in runs.items():
        sizes = ["--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
        train_var.main([*arguments, *sizes, "--output_dir", str(tmp_path / name)])
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), abs=1e-5)
    assert len(set(losses(tmp_path / "large"))) == 3


def write_codes(path: Path, vqvae: VQVAEModel, images_parquet: str, fingerprint: str) -> None:
    """The images of `images_parquet` as codes, with the tokenizer's fingerprint in the file's metadata."""
    import pyarrow.parquet

    images = Dataset.from_parquet(images_parquet)
    transform = train_var.data.ImageTransform(train_var.DataConfig(train_data="", resize_ratio=1.0), None, (8, 8), 1)
    with torch.no_grad():
        # In batches of the training's size: rounding, which decides between codes as good as equal, depends on it.
        batches = torch.stack([transform(image) for image in images["image"]]).split(4)
        codes = torch.cat([vqvae.encode(batch).codes for batch in batches])
    features = Features({"codes": List(Value("uint16"), length=21), "label": ClassLabel(names=NAMES)})
    rows = {"codes": codes.tolist(), "label": images["label"]}
    table = Dataset.from_dict(rows, features=features).data.table
    metadata = table.schema.metadata | {"hf_var.tokenizer": json.dumps(fingerprint)}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)


def test_codes_train_like_the_images_they_come_from(tmp_path: Path, vqvae_folder: str, images_parquet: str) -> None:
    vqvae = VQVAEModel.from_pretrained(vqvae_folder).eval()
    write_codes(tmp_path / "codes.parquet", vqvae, images_parquet, tokenizer_fingerprint(vqvae))
    arguments = ["--vqvae", vqvae_folder, *TINY_VAR, *SHORT_RUN, "--resize_ratio", "1"]
    for name, source in (("codes", str(tmp_path / "*.parquet")), ("images", images_parquet)):
        train_var.main([*arguments, "--train_data", source, "--output_dir", str(tmp_path / name)])
    assert losses(tmp_path / "codes") == losses(tmp_path / "images")
    assert VARPipeline.from_pretrained(tmp_path / "codes").transformer.config.id2label[2] == "newt"

    write_codes(tmp_path / "codes.parquet", vqvae, images_parquet, "another")
    with pytest.raises(ValueError, match="made by another tokenizer"):
        train_var.main([*arguments, "--train_data", str(tmp_path / "*.parquet"), "--output_dir", str(tmp_path / "no")])


def test_bad_data_is_refused_before_any_work(
    tmp_path: Path, vqvae_folder: str, images_parquet: str, images_folder: str
) -> None:
    (tmp_path / "hollow").mkdir()
    empty = Dataset.from_dict(
        {"image": [], "label": []}, features=Features({"image": Image(), "label": Value("int64")})
    )
    empty.to_parquet(tmp_path / "empty.parquet")
    unnamed = Dataset.from_dict(
        {"image": random_images(3), "label": [0, 1, -1]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )
    unnamed.to_parquet(tmp_path / "negative.parquet")
    good = ["--train_data", images_parquet]
    cases = [
        (train_vqvae, [*good, "--image_column", "picture"], r"image_column.*'picture'.*\['image', 'label'\]"),
        (train_vqvae, ["--train_data", str(tmp_path / "empty.parquet")], "is empty"),
        (train_vqvae, ["--train_data", str(tmp_path / "none*.parquet")], "matches no file"),
        (train_vqvae, ["--train_data", str(tmp_path / "nowhere")], "is not a folder"),
        (train_vqvae, ["--train_data", str(tmp_path / "hollow")], "cannot be loaded"),
        (train_vqvae, ["--train_data", images_folder, "--train_split", "rain"], r"splits \['train'\], not 'rain'"),
        (train_vqvae, [*good, "--in_channels", "5"], "in_channels.*got 5"),
        (train_vqvae, [*good, "--interpolation", "cubist"], "interpolation.*lanczos"),
        (train_vqvae, [*good, "--resume_from_checkpoint", "step-7"], "resume_from_checkpoint.*latest"),
        (train_vqvae, [*good, "--l2_weight", "0"], "l1_weight"),
        (train_var, good, "vqvae.*must name"),
        (train_var, [*good, "--vqvae", vqvae_folder, "--patch_nums", "1", "4"], r"patch_nums.*\[1, 2, 4\]"),
        (train_var, [*good, "--vqvae", vqvae_folder, "--label_column", "breed"], "label_column.*'breed'"),
        (train_var, [*good, "--vqvae", vqvae_folder, "--num_labels", "2"], "num_labels.*2"),
        (
            train_var,
            ["--train_data", str(tmp_path / "negative.parquet"), "--vqvae", vqvae_folder, "--num_labels", "2"],
            "labels from 0 to 1, got values from -1",
        ),
    ]
    for script, arguments, message in cases:
        tiny = TINY_VQVAE if script is train_vqvae and "--in_channels" not in arguments else []
        with pytest.raises(ValueError, match=message):
            script.main([*tiny, *arguments, "--output_dir", str(tmp_path / "output")])
    assert not (tmp_path / "output").exists()


def test_non_finite_loss_stops_the_run(tmp_path: Path, images_parquet: str) -> None:
    arguments = ["--train_data", images_parquet, "--output_dir", str(tmp_path), *TINY_VQVAE, *SHORT_RUN]
    with pytest.raises(ValueError, match="The loss is (nan|inf) at step"):
        train_vqvae.main([*arguments, "--learning_rate", "1e30", "--max_train_steps", "5"])
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("lacks", [None, "head.weight"])
def test_pretrained_models_are_whole_and_of_the_right_kind(images_parquet, vqvae_folder, tmp_path, lacks):
    train_var, train_vqvae = (load_script(f"examples/{name}.py").main for name in ("train_var", "train_vqvae"))
    shared = ["--train_data", images_parquet, "--output_dir", str(tmp_path / "run"), *SHORT_RUN]
    vqvae = VQVAEModel.from_pretrained(vqvae_folder)
    names = ("latent_channels", "codebook_size", "patch_nums")
    sizes = {name: getattr(vqvae.config, name) for name in names} | {"num_hidden_layers": 1, "num_attention_heads": 2}
    VARPipeline(VARTransformer(VARConfig(hidden_size=16, **sizes)), vqvae).save_pretrained(tmp_path / "pipeline")
    part = tmp_path / "pipeline" / "transformer"
    if lacks is None:
        with pytest.raises(ValueError, match=f"'{part}' holds a model of type 'hf_var'"):
            train_vqvae([*shared, "--pretrained_vqvae", str(part)])
        with pytest.raises(ValueError, match=f"'{part}' holds a model of type 'hf_var', which is no tokenizer"):
            train_var([*shared, *TINY_VAR, "--vqvae", str(part)])
    else:
        weights = load_file(part / "model.safetensors")
        del weights[lacks]
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"missing .'{lacks}'"):
            train_var([*shared, "--pretrained_var", str(tmp_path / "pipeline")])
    assert not (tmp_path / "run" / "train_log.jsonl").exists()
