# SPDX-License-Identifier: Apache-2.0
"""Training on captions: frozen and trained text encoders, what is resumed and saved, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import load_file
from transformers import CLIPTextModel

from examples.conftest import (
    REPOSITORY,
    SHORT_RUN,
    load_script,
    losses,
    random_images,
    read_log,
    run_script,
    start,
    wait_for,
)
from hf_var import VARTextToImagePipeline
from hf_var.metrics.agreement import TextAgreement
from pipelines.texts import make_clip, make_text_encoder, make_tokenizer


SCRIPT = "examples/train_var.py"
RECIPES = sorted(
    path for kind in ("text", "switti") for path in (REPOSITORY / "examples/recipes").glob(f"{kind}_*.yaml")
)
TINY_TEXT_VAR = ["--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
TEXTS = ["a red cat", "two birds on the mat", "dark"]
COMPONENTS = ("transformer", "text_encoder", "vqvae")

train_var = load_script(SCRIPT)
tokenize = load_script("examples/tokenize_dataset.py")
make_encoder = load_script("examples/make_text_encoder.py")


@pytest.fixture(scope="module")
def captions_parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 gray images with captions, labels, and texts that are missing or empty."""
    path = tmp_path_factory.mktemp("captions") / "train.parquet"
    kinds = {"caption": Value("string"), "some": Value("string"), "none": Value("string")}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"]), **kinds})
    labels = [index % 3 for index in range(24)]
    captions = {"caption": [TEXTS[label] for label in labels], "some": ["a cat", None] * 12, "none": [""] * 24}
    Dataset.from_dict({"image": random_images(24), "label": labels, **captions}, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two text encoders, each with its tokenizer."""
    folders = []
    for number in (1, 2):
        folder = tmp_path_factory.mktemp(f"text_encoder_{number}")
        make_text_encoder(number).save_pretrained(folder)
        make_tokenizer(number).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def arguments_of(captions_parquet: str, vqvae_folder: str, *encoders: str) -> list[str]:
    arguments = ["--train_data", captions_parquet, "--caption_column", "caption", "--vqvae", vqvae_folder]
    for name, folder in zip(("--text_encoder", "--text_encoder_2"), encoders, strict=False):
        arguments += [name, folder]
    return [*arguments, *TINY_TEXT_VAR, *SHORT_RUN]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_two_steps(
    recipe: Path,
    tmp_path: Path,
    captions_parquet: str,
    vqvae_folder: str,
    encoder_folders: list[str],
    text_var_folder: str,
) -> None:
    settings = train_var.read_arguments([str(recipe)])
    source = ["--train_data", captions_parquet, "--validation_data", captions_parquet, "--caption_column", "caption"]
    if settings.script.pretrained_var is None:
        source += ["--vqvae", vqvae_folder, "--text_encoder", encoder_folders[0], *TINY_TEXT_VAR]
        source += ["--intermediate_size", "32"]
    else:
        source += ["--pretrained_var", text_var_folder]
    copies = min(settings.script.augmented_copies, 2)
    source += [
        "--augmented_copies",
        str(copies),
        "--lr_stable_steps",
        "1",
        *SHORT_RUN,
        "--resume_from_checkpoint",
        "latest",
    ]
    # Half precision is a setting of a whole process.
    run_script(SCRIPT, str(recipe), *source, "--output_dir", str(tmp_path))
    assert len(losses(tmp_path)) == 2
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path)
    expected = settings.samples.defaults
    assert {name: pipe.config[name] for name in expected} == expected
    assert (tmp_path / "lora").is_dir() == (settings.lora.lora_rank > 0)


@pytest.fixture(scope="module")
def text_var_folder(
    tmp_path_factory: pytest.TempPathFactory, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> str:
    """A pipeline that the script made."""
    folder = str(tmp_path_factory.mktemp("text_var"))
    arguments = arguments_of(captions_parquet, vqvae_folder, *encoder_folders)
    train_var.main([*arguments, "--learning_rate", "1e-3", "--output_dir", folder])
    return folder


def same_files(first: Path, second: Path, components: tuple[str, ...] = COMPONENTS) -> bool:
    for component in components:
        expected, found = (load_file(folder / component / "model.safetensors") for folder in (first, second))
        if expected.keys() != found.keys() or not all(torch.equal(expected[name], found[name]) for name in expected):
            return False
    return True


def test_the_result_draws_prompts_and_describes_itself(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, *encoder_folders)
    arguments += ["--validation_data", captions_parquet, "--top_p", "0.8", "--sample_prompts", "a cat", "two birds"]
    arguments += ["--guidance_rule", "constant"]
    train_var.main([*arguments, "--max_caption_length", "9", "--output_dir", str(tmp_path)])
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.top_p == 0.8
    assert pipe.config.guidance_rule == "constant"
    assert pipe.tokenizer.model_max_length == pipe.tokenizer_2.model_max_length == 9
    assert pipe.encode_prompt("a red cat")[0].shape[:2] == (1, 9)
    # Frozen encoders are those that were given.
    for component, folder in (("text_encoder", encoder_folders[0]), ("text_encoder_2", encoder_folders[1])):
        expected = load_file(Path(folder) / "model.safetensors")
        found = getattr(pipe, component).state_dict()
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    images = pipe(["a red cat", "dark"], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert "VARTextToImagePipeline.from_pretrained" in card
    assert (tmp_path / "samples.png").exists()
    metrics = read_log(tmp_path)[-1]
    assert {f"validation_loss_{k}" for k in range(len(pipe.vqvae.config.patch_nums))} <= metrics.keys()


def test_samples_are_compared_with_their_prompts(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    model, processor = make_clip()
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    arguments = [
        *arguments_of(captions_parquet, vqvae_folder, *encoder_folders),
        "--clip_model",
        str(tmp_path / "clip"),
    ]
    train_var.main([*arguments, "--num_samples", "6", "--sample_steps", "1", "--output_dir", str(tmp_path / "run")])
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path / "run")
    prompts = [TEXTS[number % 3] for number in range(6)]
    generators = [torch.Generator().manual_seed(number) for number in range(6)]
    expected = TextAgreement(model, processor)(pipe(prompts, generator=generators).images, prompts)
    lines = [line for line in read_log(tmp_path / "run") if "sample_clip_score" in line]
    assert [line["step"] for line in lines] == [1, 2]
    found = {name: lines[-1][f"sample_{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="`clip_model` needs two different `sample_prompts` at least, got .'a cat'"):
        train_var.main([*arguments, "--sample_prompts", "a cat", "--output_dir", str(tmp_path / "no")])


def test_validation_is_the_likelihood_of_the_saved_model(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, encoder_folders[0])
    arguments += ["--validation_data", captions_parquet, "--resize_ratio", "1", "--train_text_encoder", "true"]
    train_var.main([*arguments, "--output_dir", str(tmp_path)])
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path)
    pixels = torch.from_numpy(np.stack(random_images(24))).unsqueeze(1).float()
    codes = pipe.vqvae.encode(pixels / 127.5 - 1).codes
    names = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
    with torch.no_grad():
        text = pipe.encode_prompt(TEXTS * 8, do_classifier_free_guidance=False)[::2]
        inputs = pipe.vqvae.teacher_forcing(codes)
        output = pipe.transformer(**dict(zip(names, text, strict=True)), scale_inputs=inputs, labels=codes)
    assert read_log(tmp_path)[-1]["validation_loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_text_encoders_are_trained_along(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, *encoder_folders)
    train_var.main([*arguments, "--train_text_encoder", "true", "--output_dir", str(tmp_path)])
    for number, folder in enumerate(encoder_folders, start=1):
        component = "text_encoder" if number == 1 else "text_encoder_2"
        before = load_file(Path(folder) / "model.safetensors")
        after = load_file(tmp_path / component / "model.safetensors")
        moved = [name for name, values in before.items() if not torch.equal(after[name], values)]
        assert {name.split(".")[-2] for name in moved} >= {"token_embedding", "q_proj", "fc1"}


@pytest.mark.parametrize("copies", ["0", "2"])
def test_killed_run_equals_the_uninterrupted_one(
    copies: str, tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, encoder_folders[0])
    arguments += ["--train_text_encoder", "true", "--dropout", "0.1", "--caption_dropout_prob", "0.5"]
    arguments += ["--augmented_copies", copies, "--augment_rotation", "10", "--ema_decay", "0.9"]
    arguments += ["--max_train_steps", "12", "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_var.main([*arguments, "--output_dir", str(whole)])
    process = start(SCRIPT, arguments, killed)
    wait_for(lambda: any((killed / "checkpoints").glob("step-*")), process)
    process.kill()
    process.wait()
    train_var.main([*arguments, "--output_dir", str(killed)])
    assert read_log(killed) == read_log(whole)
    assert same_files(whole, killed)


def test_two_processes_equal_one_that_accumulates(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, encoder_folders[0])
    arguments += ["--train_text_encoder", "true", "--caption_dropout_prob", "0", "--learning_rate", "1e-4"]
    train_var.main([*arguments, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for component in ("transformer", "text_encoder"):
        expected = load_file(tmp_path / "one" / component / "model.safetensors")
        found = load_file(tmp_path / "two" / component / "model.safetensors")
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5)


def test_caption_dropout_reads_the_empty_text(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, encoder_folders[0])
    arguments += ["--max_train_steps", "1", "--augmented_copies", "1"]
    found = {}
    for column, dropout in (("none", "0"), ("caption", "0.999999"), ("caption", "0")):
        folder = tmp_path / f"{column}-{dropout}"
        # The column is of empty texts, which the script refuses: they are those of another file.
        source = captions_parquet
        if column == "none":
            source = str(tmp_path / "empty.parquet")
            rows = Dataset.from_parquet(captions_parquet)
            texts = ["dark"] + [""] * (len(rows) - 1)
            rows.remove_columns("caption").add_column("caption", texts).to_parquet(source)
        run = [*arguments, "--train_data", source, "--caption_dropout_prob", dropout, "--output_dir", str(folder)]
        train_var.main([*run, "--train_batch_size", "24"])
        found[column, dropout] = losses(folder)[0]
    assert found["caption", "0.999999"] != found["caption", "0"]
    assert found["caption", "0.999999"] == pytest.approx(found["none", "0"], rel=2e-3)


def test_trained_pipelines_are_tuned_as_a_whole_and_by_adapters(
    tmp_path: Path, text_var_folder: str, captions_parquet: str
) -> None:
    arguments = ["--train_data", captions_parquet, "--caption_column", "caption", "--pretrained_var", text_var_folder]
    arguments += [*SHORT_RUN, "--learning_rate", "1e-3"]
    whole, adapted = tmp_path / "whole", tmp_path / "adapted"
    train_var.main([*arguments, "--output_dir", str(whole)])
    train_var.main([*arguments, "--lora_rank", "2", "--output_dir", str(adapted)])
    before = load_file(Path(text_var_folder) / "transformer/model.safetensors")
    for folder in (whole, adapted):
        after = load_file(folder / "transformer/model.safetensors")
        assert any(not torch.equal(after[name], values) for name, values in before.items())
        assert same_files(folder, Path(text_var_folder), ("text_encoder", "text_encoder_2", "vqvae"))
    assert (adapted / "lora").is_dir()
    # The adapter on the pipeline it was trained on is the merged pipeline.
    merged, loaded = (VARTextToImagePipeline.from_pretrained(folder) for folder in (adapted, text_var_folder))
    loaded.load_lora_weights(adapted / "lora")
    draws = []
    for pipe in (merged, loaded):
        pipe.set_progress_bar_config(disable=True)
        draws.append(pipe("a red cat", generator=torch.Generator().manual_seed(0), output_type="pt").images)
    torch.testing.assert_close(draws[0], draws[1])


def test_a_small_text_encoder_is_made(tmp_path: Path, captions_parquet: str, vqvae_folder: str) -> None:
    folder = tmp_path / "encoder"
    sizes = ["--vocab_size", "300", "--length", "8", "--hidden_size", "16", "--num_hidden_layers", "1"]
    make_encoder.main([captions_parquet, "--caption_column", "caption", "--output", str(folder), *sizes])
    arguments = arguments_of(captions_parquet, vqvae_folder, str(folder))
    train_var.main([*arguments, "--train_text_encoder", "true", "--output_dir", str(tmp_path / "run")])
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path / "run")
    assert isinstance(pipe.text_encoder, CLIPTextModel)
    assert pipe.text_encoder.config.hidden_size == 16
    for text in ("Two BIRDS, 3 cats!", "a ☃ 雪"):
        ids = pipe.tokenizer(text).input_ids
        assert pipe.tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
        assert (ids[0], ids[-1]) == (pipe.tokenizer.bos_token_id, pipe.text_encoder.config.eos_token_id)
    # The pooled vector is that of the last token, not of the padding.
    states, _, pooled, _, mask, _ = pipe.encode_prompt("two birds", do_classifier_free_guidance=False)
    torch.testing.assert_close(pooled[0], states[0, int(mask.sum()) - 1])


@pytest.mark.parametrize("train_text_encoder", ["false", "true"])
def test_caption_dropout_reads_learned_vectors(
    train_text_encoder: str, tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, encoder_folders[0])
    arguments += ["--learned_empty_text", "true", "--caption_dropout_prob", "0.5", "--learning_rate", "1e-3"]
    train_var.main([*arguments, "--train_text_encoder", train_text_encoder, "--output_dir", str(tmp_path)])
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    # The seed of the weights is the same in all runs.
    untrained = tmp_path / "untrained"
    train_var.main([*arguments, "--caption_dropout_prob", "0", "--output_dir", str(untrained)])
    before = VARTextToImagePipeline.from_pretrained(untrained).transformer.embeddings.empty_text.state_dict()
    for name, values in pipe.transformer.embeddings.empty_text.state_dict().items():
        assert (values - before[name]).abs().max() > 1e-4
    drawn = [
        pipe("a cat", generator=torch.Generator().manual_seed(0), **more).codes
        for more in ({}, {"negative_prompt": ""})
    ]
    assert not torch.equal(*drawn)


def test_names_of_classes_are_captions(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    rows = Dataset.from_parquet(captions_parquet).cast_column("label", ClassLabel(names=TEXTS))
    source = str(tmp_path / "named.parquet")
    rows.to_parquet(source)
    arguments = arguments_of(source, vqvae_folder, encoder_folders[0])
    found = []
    for name in ("label", "caption"):
        train_var.main([*arguments, "--caption_column", name, "--output_dir", str(tmp_path / name)])
        found.append(losses(tmp_path / name))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def embedded_folder(
    tmp_path_factory: pytest.TempPathFactory, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> str:
    """Codes with the embeddings of captions by the first encoder."""
    folder = str(tmp_path_factory.mktemp("embedded"))
    arguments = ["--data", captions_parquet, "--vqvae", vqvae_folder, "--output_dir", folder, "--resize_ratio", "1"]
    arguments += ["--caption_column", "caption", "--text_encoder", encoder_folders[0], "--horizontal_flip", "true"]
    tokenize.main([*arguments, "--batch_size", "6"])
    return folder


def test_embeddings_of_captions_are_stored_without_padding(embedded_folder: str, encoder_folders: list[str]) -> None:
    rows = Dataset.from_parquet(f"{embedded_folder}/*.parquet")
    encoder, tokenizer = CLIPTextModel.from_pretrained(encoder_folders[0]), make_tokenizer(1)
    assert len(rows) == 48
    for number in (0, 1, 2, 3, 47):
        tokens = tokenizer(TEXTS[number // 2 % 3], return_tensors="pt")
        output = encoder(**tokens)
        stored = rows[number]["caption_embeds"]
        found = torch.tensor(stored["prompt_embeds"])
        assert found.shape == output.last_hidden_state[0].shape
        torch.testing.assert_close(found, output.last_hidden_state[0], rtol=2e-3, atol=2e-3)
        pooled = torch.tensor(stored["pooled_prompt_embeds"])
        torch.testing.assert_close(pooled, output.pooler_output[0], rtol=2e-3, atol=2e-3)
    assert "`caption_embeds`" in (Path(embedded_folder) / "README.md").read_text()


@pytest.mark.parametrize("dropout", ["0", "0.5"])
@pytest.mark.parametrize(("streaming", "is_learned"), [("false", "false"), ("true", "false"), ("false", "true")])
def test_stored_embeddings_train_as_captions_do(
    dropout: str,
    streaming: str,
    is_learned: str,
    tmp_path: Path,
    embedded_folder: str,
    vqvae_folder: str,
    encoder_folders: list[str],
) -> None:
    # The same codes with the texts themselves.
    rows = Dataset.from_parquet(f"{embedded_folder}/*.parquet")
    texts = [TEXTS[number // 2 % 3] for number in range(len(rows))]
    plain = str(tmp_path / "plain.parquet")
    rows.remove_columns("caption_embeds").add_column("caption", texts).to_parquet(plain)
    found = []
    for source, column in ((f"{embedded_folder}/*.parquet", "caption_embeds"), (plain, "caption")):
        arguments = arguments_of(source, vqvae_folder, encoder_folders[0])
        arguments += ["--caption_column", column, "--caption_dropout_prob", dropout, "--streaming", streaming]
        arguments += ["--learned_empty_text", is_learned]
        arguments += ["--validation_data", source, "--max_train_steps", "4", "--learning_rate", "1e-3"]
        train_var.main([*arguments, "--output_dir", str(tmp_path / column)])
        found.append(losses(tmp_path / column))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert (tmp_path / "caption_embeds/samples.png").exists()


def test_embeddings_of_another_encoder_are_refused(
    tmp_path: Path, embedded_folder: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    source, output = f"{embedded_folder}/*.parquet", ["--output_dir", str(tmp_path / "run")]
    other = str(tmp_path / "other")
    make_text_encoder(1, seed=5).save_pretrained(other)
    make_tokenizer(1).save_pretrained(other)
    for more in (["--text_encoder", other], ["--max_caption_length", "9"], ["--text_encoder_2", encoder_folders[1]]):
        arguments = arguments_of(source, vqvae_folder, encoder_folders[0])
        with pytest.raises(ValueError, match="embeddings in `train_data` = .* were made by another text encoder"):
            train_var.main([*arguments, "--caption_column", "caption_embeds", *more, *output])
    arguments = arguments_of(source, vqvae_folder, encoder_folders[0])
    with pytest.raises(ValueError, match="`train_text_encoder` must be false for stored embeddings"):
        train_var.main([*arguments, "--caption_column", "caption_embeds", "--train_text_encoder", "true", *output])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "`text_encoder` must name a CLIPTextModel for `caption_column`, got None"),
        (["--label_column", "label"], "`label_column` and `caption_column` = 'caption' exclude each other"),
        (["--caption_column", "label"], "`text_encoder` must name a CLIPTextModel"),
    ],
)
def test_captions_that_cannot_be_stored_are_refused(
    more: list[str], message: str, tmp_path: Path, captions_parquet: str, vqvae_folder: str
) -> None:
    arguments = ["--data", captions_parquet, "--vqvae", vqvae_folder, "--output_dir", str(tmp_path / "codes")]
    with pytest.raises(ValueError, match=message):
        tokenize.main([*arguments, "--caption_column", "caption", *more])
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--caption_column", "text"], "`caption_column` = 'text' is not among the columns"),
        (["--caption_column", "image"], "`caption_column` = 'image' must hold texts or class labels"),
        (["--caption_column", "some"], "`caption_column` = 'some' must hold a text in every row, got 12 of 24 rows"),
        (["--caption_column", "none"], "`caption_column` = 'none' must hold texts, got empty ones in all 24 rows"),
        (["--label_column", "label"], "`label_column` = 'label' and `caption_column` exclude each other"),
        (["--condition_column", "some"], "`condition_column` = 'some' and `caption_column` exclude each other"),
        (["--max_caption_length", "99"], "`max_caption_length` must be at most 20"),
        (["--cross_attention_dim", "7"], "`cross_attention_dim` is 24 in `text_encoder`, got 7"),
        (["--class_dropout_prob", "0.1"], "class_dropout_prob"),
        (["--caption_dropout_prob", "1"], "`caption_dropout_prob` must be"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    more: list[str], message: str, tmp_path: Path, captions_parquet: str, vqvae_folder: str, encoder_folders: list[str]
) -> None:
    arguments = arguments_of(captions_parquet, vqvae_folder, encoder_folders[0])
    with pytest.raises(ValueError, match=message):
        train_var.main([*arguments, *more, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_what_needs_captions_or_an_encoder_is_refused(
    tmp_path: Path, captions_parquet: str, vqvae_folder: str, text_var_folder: str
) -> None:
    base = ["--train_data", captions_parquet, "--vqvae", vqvae_folder, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="`guidance_rule` = 'constant' needs a `caption_column`"):
        train_var.main([*base, "--guidance_rule", "constant"])
    with pytest.raises(ValueError, match="`train_text_encoder` = True needs a `caption_column`"):
        train_var.main([*base, "--train_text_encoder", "true"])
    with pytest.raises(ValueError, match="`text_encoder` must name a CLIPTextModel for `caption_column`, got None"):
        train_var.main([*base, "--caption_column", "caption"])
    tuned = [*base, "--pretrained_var", text_var_folder]
    with pytest.raises(
        ValueError, match="must be a pipeline of a VARTransformer without a `caption_column`, got a Text"
    ):
        train_var.main(tuned)
    options = ["--caption_column", "caption", "--train_text_encoder", "true", "--lora_rank", "2"]
    with pytest.raises(ValueError, match="`train_text_encoder` must be false with `lora_rank`"):
        train_var.main([*tuned, *options])
    assert not (tmp_path / "run").exists()
