# SPDX-License-Identifier: Apache-2.0
"""What the card of a pipeline says, and what it keeps to itself. `test_pipeline_result.py` publishes one and runs its example."""

import re
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_var import VARPipeline
from hf_var.hub.cards import write_converted_card, write_pipeline_card, write_prior_card
from pipelines.stacked import image_pipeline, make_raster, make_stacked, text_pipeline
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline
from pipelines.tiny_ar import make_pixelsnail


METRICS = {"loss": 4.123456, "bits_per_token": 5.9489, "accuracy": 0.0625, "perplexity": float("inf")}


def make_recipe(folder: Path, **values) -> dict:
    (folder / "data" / "birds").mkdir(parents=True, exist_ok=True)
    paths = {"train_data": str(folder / "data" / "birds"), "vqvae": str(folder / "made" / "tokenizer")}
    return {
        **paths,
        "output_dir": str(folder / "result"),
        "learning_rate": 1e-4,
        "resume_from_checkpoint": None,
        **values,
    }


def written(folder: Path, pipe: VARPipeline, recipe: dict, **values) -> tuple[ModelCard, str]:
    pipe.save_pretrained(folder / "result")
    write_pipeline_card(folder / "result", pipe, recipe, **values)
    text = (folder / "result" / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\n\n\n|[{}]|\s\n\n", text), "a template is not filled in or has gaps"
    return ModelCard.load(folder / "result" / "README.md"), text


def run_example(text: str, folder: Path, monkeypatch) -> dict:
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    namespace: dict = {}
    exec(compile(snippet, "card", "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    ("config", "example", "number"),
    [
        ({}, "class_labels=['tench, Tinca tinca', 'goldfish', 2]", 3),
        ({"transformer": {"id2label": {0: "it's", 1: 'a "b"'}}}, 'class_labels=["it\'s", \'a "b"\']', 2),
        ({"transformer": {"num_labels": 0}}, "num_images_per_label=2", 2),
        ({"vqvae": {"in_channels": 1}, "patch_nums": (4,)}, "class_labels=['tench, Tinca tinca', 'goldfish', 2]", 3),
        ({"transformer": {"num_labels": 0, "condition_channels": 8}}, "class_embeds=torch.zeros(2, 8)", 2),
    ],
    ids=["names", "quotes", "unconditional", "gray", "embeddings"],
)
def test_example_runs_as_it_stands(tmp_path, monkeypatch, config, example, number) -> None:
    _, text = written(tmp_path, make_pipeline(**config), make_recipe(tmp_path))
    assert f'from_pretrained("result")\nimages = pipe({example}, generator=' in text
    namespace = run_example(text, tmp_path, monkeypatch)
    assert len(namespace["images"]) == number
    assert Image.open(tmp_path / "sample.png").tobytes() == namespace["images"][0].tobytes()
    assert ("Labels are the names" in text) == ("class_labels" in example)


def test_example_of_images_that_are_no_pictures(tmp_path, monkeypatch) -> None:
    _, text = written(tmp_path, make_pipeline(vqvae={"in_channels": 5}), make_recipe(tmp_path))
    assert run_example(text, tmp_path, monkeypatch)["images"].shape == (3, 8, 8, 5)


def test_metadata_of_a_training_on_the_hub(tmp_path) -> None:
    recipe = make_recipe(tmp_path, train_data="user/birds", validation_data="user/owls", validation_split="test")
    recipe |= {"pretrained_var": "user/older", "vqvae": "user/tokenizer"}
    card, text = written(
        tmp_path, make_pipeline(), recipe, metrics=METRICS, repo_id="user/name", license="mit", data_license="cc0-1.0"
    )
    assert card.data.library_name == "hf_var"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.tags == ["var", "autoregressive", "class-conditional"]
    assert card.data.datasets == "user/birds"
    assert card.data.base_model == "user/older"
    assert card.data.license == "mit"
    assert card.data.model_name == "name"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {key: result.metric_value for key, result in results.items()} == {
        "loss": 4.1235,
        "bits_per_token": 5.9489,
        "accuracy": 0.0625,
    }
    assert results["bits_per_token"].metric_name == "cross-entropy in bits per token"
    assert {(result.task_type, result.dataset_type, result.dataset_split) for result in results.values()} == {
        ("unconditional-image-generation", "user/owls", "test")
    }
    for row in (
        "| cross-entropy in nats per token, lower is better | 4.1235 |",
        "| perplexity | inf |",
        "| code | `hf_var`, Apache-2.0 |",
        "| weights | mit |",
        "| data, user/birds | cc0-1.0 |",
    ):
        assert row in text.splitlines()
    assert "| tokenizer | user/tokenizer: " in text
    assert 'from_pretrained("user/name")' in text


def test_card_of_local_data_names_no_folder(tmp_path) -> None:
    card, text = written(tmp_path, make_pipeline(), make_recipe(tmp_path), metrics={"loss": 4.0})
    assert str(tmp_path) not in text
    for part in tmp_path.parts[1:]:
        assert part not in text, part
    assert (card.data.datasets, card.data.base_model, card.data.license) == (None, None, None)
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("images", "birds")
    for line in ("train_data: birds", "output_dir: result", "vqvae: tokenizer", "| weights | not stated |"):
        assert line in text.splitlines()
    assert "| data, birds | not stated |" in text
    assert "resume_from_checkpoint" not in text
    assert "| tokenizer | tokenizer: " in text


def test_card_tells_what_the_model_is(tmp_path) -> None:
    pipe = make_pipeline()
    pipe = VARPipeline(**pipe.components, guidance_scale=4.0)
    _, text = written(tmp_path, pipe, make_recipe(tmp_path))
    parameters = {
        name: sum(parameter.numel() for parameter in model.parameters()) for name, model in pipe.components.items()
    }
    for row in (
        "| image | 8 x 8 pixels, 3 channel(s) |",
        "| classes | 5 |",
        "| token maps (`patch_nums`) | 1x1, 2x2, 4x4 |",
        "| tokens per image | 21, in 3 step(s) |",
        f"| transformer | {parameters['transformer']:,} parameters in 2 layer(s) of width 32 with 2 head(s) |",
        f"| tokenizer | tokenizer: {parameters['vqvae']:,} parameters, 32 codes of 4 channels |",
        "| sampling by default | `guidance_scale` 4.0, `top_p` 0.96, `temperature` 1.0 |",
    ):
        assert row in text.splitlines()
    assert "Class-conditional visual autoregressive model" in text
    assert "## Results" not in text
    assert "![" not in text


def test_card_of_an_unconditional_model(tmp_path) -> None:
    card, text = written(tmp_path, make_pipeline(transformer={"num_labels": 0}), make_recipe(tmp_path))
    assert "Unconditional visual autoregressive model" in text
    assert "| classes | none |" in text
    assert card.data.tags == ["var", "autoregressive"]


def test_pictures_are_shown_by_name(tmp_path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "the samples.png").touch()
    (tmp_path / "other.png").touch()
    _, text = written(tmp_path, make_pipeline(), make_recipe(tmp_path), pictures={"the samples.png": "Not chosen."})
    assert "](the%20samples.png)\n\nNot chosen.\n" in text
    for picture in ("missing.png", "../other.png"):
        with pytest.raises(ValueError, match=r"`pictures` must be names of files"):
            write_pipeline_card(tmp_path / "result", make_pipeline(), make_recipe(tmp_path), pictures={picture: ""})


def test_the_card_of_a_model_of_embeddings(tmp_path) -> None:
    pipe = make_pipeline(transformer={"num_labels": 0, "condition_channels": 8})
    card, text = written(tmp_path, pipe, make_recipe(tmp_path))
    assert "embedding-conditional" in card.data.tags
    assert "\nEmbedding-conditional visual" in text
    assert "| condition (`class_embeds`) | embeddings of 8 numbers |\n" in text


def test_the_card_of_raster_order(tmp_path) -> None:
    _, text = written(tmp_path, make_raster((1, 2, 4)), make_recipe(tmp_path))
    assert "| tokens per image | 21, in 21 step(s) |" in text
    assert "tokens one after the other. Made" in text


@pytest.mark.parametrize(
    ("pipe", "task", "tags", "example", "system"),
    [
        (
            partial(make_stacked, "classes"),
            "unconditional-image-generation",
            ["rq-transformer", "autoregressive", "class-conditional"],
            "class_labels=['LABEL_0', 'LABEL_1', 'LABEL_2']",
            "an RQ-Transformer",
        ),
        (
            partial(make_stacked, "unconditional_gpt"),
            "unconditional-image-generation",
            ["vqgan", "autoregressive"],
            "num_images_per_label=2",
            "the GPT of VQGAN",
        ),
        (
            text_pipeline,
            "text-to-image",
            ["rq-transformer", "autoregressive", "text-conditional"],
            'prompt="a photo"',
            "3 of\neach position",
        ),
        (
            image_pipeline,
            "image-to-image",
            ["vqgan", "autoregressive", "image-conditional"],
            'condition_image=PIL.Image.open("condition.png")',
            "| condition | 6 tokens |",
        ),
        (
            partial(make_stacked, "bidirectional"),
            "unconditional-image-generation",
            ["rq-transformer", "autoregressive", "token-conditional"],
            "condition_codes=torch.zeros(1, 4, dtype=torch.long)",
            "| condition | 4 tokens |",
        ),
    ],
    ids=["classes", "unconditional", "text", "image", "tokens"],
)
def test_the_cards_of_stacks(tmp_path, monkeypatch, pipe, task, tags, example, system) -> None:
    made = pipe()
    card, text = written(tmp_path, made, make_recipe(tmp_path))
    assert card.data.pipeline_tag == task
    assert card.data.tags == tags
    assert f"pipe({example}, generator=" in text
    assert system in text
    Image.new("RGB", (6, 4)).save(tmp_path / "condition.png")
    namespace = run_example(text, tmp_path, monkeypatch)
    assert namespace["images"][0].size == (6, 4)


@pytest.mark.parametrize(
    ("make", "texts", "task"),
    [
        (make_pipeline, ["tench, Tinca tinca", "goldfish", "crane"], "unconditional-image-generation"),
        (lambda: make_pipeline(transformer={"num_labels": 0}), ["-", "-"], "unconditional-image-generation"),
        (make_text_pipeline, ["a red heart", 'a "cat"'], "text-to-image"),
        (text_pipeline, ["a red heart", 'a "cat"'], "text-to-image"),
        (make_raster, ["tench, Tinca tinca", "goldfish", "crane"], "unconditional-image-generation"),
    ],
    ids=["classes", "unconditional", "texts", "stacks of texts", "raster"],
)
def test_the_gallery_shows_what_the_example_draws(tmp_path, monkeypatch, make, texts, task) -> None:
    card, text = written(tmp_path, make(), make_recipe(tmp_path), prompts=["a red heart", 'a "cat"'])
    assert card.data.pipeline_tag == task
    assert [entry["text"] for entry in card.data.widget] == texts
    images = run_example(text, tmp_path, monkeypatch)["images"]
    for entry, image in zip(card.data.widget, images, strict=True):
        shown = Image.open(tmp_path / "result" / entry["output"]["url"])
        assert shown.tobytes() == image.tobytes()
    assert "\n<Gallery />\n" in text


def test_the_gallery_falls_back_to_samples(tmp_path) -> None:
    (tmp_path / "result").mkdir()
    for name in ("samples.png", "curves.png"):
        (tmp_path / "result" / name).touch()
    pictures = {"samples.png": "Samples.", "curves.png": "The training."}
    # An example of zeros is nothing to show.
    embedded = make_pipeline(transformer={"num_labels": 0, "condition_channels": 8})
    card, text = written(tmp_path, embedded, make_recipe(tmp_path), pictures=pictures)
    assert card.data.widget == [{"text": "Samples.", "output": {"url": "samples.png"}}]
    assert "<Gallery />" not in text


def test_a_model_of_texts_without_text_encoders_has_an_example_of_embeddings(tmp_path, monkeypatch) -> None:
    pipe = make_text_pipeline()
    pipe.register_modules(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    _, text = written(tmp_path, pipe, make_recipe(tmp_path))
    assert "prompt_embeds=torch.zeros(1, 77, " in text
    assert len(run_example(text, tmp_path, monkeypatch)["images"]) == 1


@pytest.mark.parametrize(
    ("model_class", "license", "task"),
    [
        ("VARPipeline", "mit", "unconditional-image-generation"),
        ("ARPipeline", "cc-by-nc-sa-4.0", "unconditional-image-generation"),
        ("PixelSNAIL", None, "unconditional-image-generation"),
        ("VARTextToImagePipeline", None, "text-to-image"),
        ("VQVAEModel", "mit", "image-feature-extraction"),
        ("HierarchicalVQVAEModel", None, "image-feature-extraction"),
    ],
)
def test_converted_checkpoints_say_what_they_are_and_may_be_used_for(tmp_path, model_class, license, task) -> None:
    origin = {"name": "code", "url": "https://example.org", "code_license": "mit", "weights_license": license}
    write_converted_card(tmp_path, model_class, [origin])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("hf_var", task, license)
    assert ("must not be used commercially" in card.text) == ("nc" in str(license))
    assert not re.search(r"\n\n\n|[{}]", card.text)


@pytest.mark.parametrize("num_labels", [0, 3])
def test_the_card_of_a_prior_alone(tmp_path, monkeypatch, num_labels) -> None:
    prior = make_pixelsnail(map_size=2, num_labels=num_labels)
    prior.save_pretrained(tmp_path / "result")
    card = write_prior_card(tmp_path / "result", prior, make_recipe(tmp_path), metrics={"loss": 4.0}, license="mit")
    assert (card.data.pipeline_tag, card.data.license) == ("unconditional-image-generation", "mit")
    assert card.data.eval_results[0].metric_value == 4.0
    text = (tmp_path / "result" / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\n\n\n|[{}]|\s\n\n", text)
    assert run_example(text, tmp_path, monkeypatch)["logits"].shape == (1, 4, 12)
