# SPDX-License-Identifier: Apache-2.0
"""What an evaluation adds to a model card on the Hub: its metrics, once each, and nothing else."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_var import DIGITS_CHECKPOINT


CLIENTS = Path(__file__).parent / "clients"
EXTRACTORS = Path(__file__).parents[1] / "examples"
SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"
BODY = "\n# The model\n\nA text of the author's, with a | and\n\n---\n\na line.\n"


@pytest.fixture(scope="module")
def pushed(run_in_hub_process, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder that the evaluator worked in, and what was printed."""
    folder = tmp_path_factory.mktemp("somebodys_home")
    return folder, run_in_hub_process(CLIENTS / "push_evaluation.py", folder).splitlines()


def load_card(hub, repo_id: str) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


def results_of(card: ModelCard, metric_type: str) -> list[EvalResult]:
    return [result for result in card.data.eval_results if result.metric_type == metric_type]


def test_metrics_are_added_and_the_card_stays(hub, pushed):
    _, printed = pushed
    assert printed[0].startswith(f"{hub.url}/user/model/")
    card = load_card(hub, "user/model")
    assert card.text == BODY
    assert (card.data.license, card.data.model_name, card.data.further) == ("cc0-1.0", "My model", {"a": [1, 2]})
    (loss,) = results_of(card, "loss")
    assert (loss.dataset_type, loss.metric_value, loss.metric_args) == ("user/birds", 4.25, None)
    assert hub.files("user/model").keys() == {".gitattributes", "README.md"}


def test_a_second_evaluation_replaces_its_own_metrics_alone(hub, pushed):
    card = load_card(hub, "user/model")
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("loss", 4.25),
        ("fid", 3.3),
        ("inception_score", 270.0),
        ("fid", 12.1),
    ]
    guided, unguided = results_of(card, "fid")
    assert (guided.metric_name, guided.task_type) == ("FID", "unconditional-image-generation")
    assert (guided.dataset_name, guided.dataset_type, guided.dataset_split) == ("VIRTUAL.npz", "images", None)
    assert (guided.metric_config, unguided.metric_config) == ("imagenet256", "imagenet256 with departures")
    assert guided.metric_args == {
        "num_images": 50_000,
        "image_size": [256, 256],
        "seed": 0,
        "guidance_scale": 2.5,
        "top_k": 900,
        "top_p": 0.96,
        "smooth": False,
        "feature_extractor": "inception",
    }
    assert unguided.metric_args == guided.metric_args | {"guidance_scale": 1.0, "classifier": "classifier"}


def test_a_repository_without_a_card_gets_one(hub, pushed):
    _, printed = pushed
    card = load_card(hub, "user/bare")
    assert (card.data.library_name, card.data.model_name) == ("hf_var", "bare")
    assert "# bare" in card.text
    assert "More Information Needed" not in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "psnr": 25.0,
        "rfid": 0.9,
        "usage": 0.75,
    }
    kinds = {(result.task_type, result.dataset_type, result.dataset_split) for result in card.data.eval_results}
    assert kinds == {("image-reconstruction", "user/owls", "test")}
    assert printed[1].startswith("`metrics` must have finite numbers for some of ['fid', 'sfid'")


def test_no_folder_reaches_the_hub(hub, pushed):
    folder, _ = pushed
    for repo_id in ("user/model", "user/bare"):
        text = hub.files(repo_id)["README.md"].decode()
        assert str(folder) not in text
        assert "somebodys_home" not in text


def test_the_script_pushes_what_it_measured(hub, run_in_hub_process, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXTRACTORS), os.environ.get("PYTHONPATH", "")]))
    random = np.random.default_rng(0)
    np.savez(tmp_path / "reference.npz", arr_0=random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))
    arguments = ["--model", DIGITS_CHECKPOINT, "--num_images", 20, "--reference", tmp_path / "reference.npz"]
    arguments += ["--feature_extractor", "extractor:RandomFeatures", "--output_dir", tmp_path / "out"]
    # The namespace is that of the token.
    run_in_hub_process(SCRIPT, *arguments, "--push_to_hub", "--hub_model_id", "digits")
    metrics = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    pushed = {result.metric_type: result for result in load_card(hub, "user/digits").data.eval_results}
    assert pushed.keys() == {"fid", "sfid", "inception_score", "precision", "recall", "kid"}
    assert pushed["fid"].metric_value == pytest.approx(metrics["fid"], abs=1e-6)
    assert pushed["fid"].metric_args["guidance_scale"] == 2.0
    assert str(tmp_path) not in hub.files("user/digits")["README.md"].decode()
    with pytest.raises(RuntimeError, match="`push_to_hub` needs the repository's name in `hub_model_id`"):
        run_in_hub_process(SCRIPT, *arguments, "--push_to_hub")
