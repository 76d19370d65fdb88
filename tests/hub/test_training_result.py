# SPDX-License-Identifier: Apache-2.0
"""What a training leaves on the Hub: all that its readers need, loadable, and nothing of the machine it ran on."""

import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as PILImage


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = EXAMPLES / "train_vqvae.py"
CLIENTS = Path(__file__).parent / "clients"

CHECK = """
import sys
from huggingface_hub import ModelCard
from safetensors.torch import load_file
values = load_file(sys.argv[1])
with torch.no_grad():
    assert torch.equal(vqvae.encode(values["images"]).codes, values["codes"])
assert codes.shape == (1, 21) and sample.shape == coarse.shape == (1, 3, 8, 8), (codes.shape, sample.shape)
assert sample.std() > 0.02 and not torch.equal(sample, coarse)
card = ModelCard.load("user/tokenizer").data
assert card.library_name == "hf_var" and card.datasets is None
assert {result.metric_type: result.metric_value for result in card.eval_results} == {"psnr": 27.1, "rfid": 3.5}
assert {result.dataset_type for result in card.eval_results} == {"user/birds"}
"""

DRAW = """
from hf_var import VARPipeline
assert VARPipeline.from_pretrained("user/pipeline")(output_type="np").images.shape == (1, 8, 8, 1)
"""


@pytest.fixture(scope="module")
def pushed(run_in_hub_process, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of the result, and what the client printed."""
    folder = tmp_path_factory.mktemp("somebodys_home") / "tokenizer"
    return folder, run_in_hub_process(CLIENTS / "push_result.py", folder).splitlines()


def test_result_without_checkpoints_is_uploaded(hub, pushed):
    folder, addresses = pushed
    assert addresses == [f"{hub.url}/user/tokenizer"] * 2
    files = hub.files("user/tokenizer")
    pictures = {"reconstruction.png", "usage.png"}
    texts = {"README.md", "config.json", "train_log.jsonl"}
    assert files.keys() == {".gitattributes", "model.safetensors", *texts, *pictures}
    assert (folder / "checkpoints" / "step-00000001" / "model.safetensors").exists()
    for path in texts:
        assert "somebodys_home" not in files[path].decode(), path
        assert str(folder) not in files[path].decode(), path
    for path in pictures:
        assert f"]({path})" in files["README.md"].decode()


def test_example_of_the_card_runs_as_it_stands(hub, pushed, run_in_hub_process):
    folder, _ = pushed
    (snippet,) = re.findall(r"```python\n(.*?)```", hub.files("user/tokenizer")["README.md"].decode(), re.DOTALL)
    assert 'from_pretrained("user/tokenizer")' in snippet
    run_in_hub_process(snippet + CHECK, folder.with_name("expected.safetensors"), token=None)


def test_training_script_uploads_what_it_made(hub, run_in_hub_process, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    rows = {"image": [PILImage.fromarray(image) for image in pixels]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "images.parquet")
    arguments = ["--train_data", tmp_path / "images.parquet", "--validation_data", tmp_path / "images.parquet"]
    arguments += ["--output_dir", tmp_path / "trained", "--push_to_hub", "true", "--license", "cc0-1.0"]
    arguments += ["--in_channels", "1", "--base_channels", "8", "--channel_multipliers", "1", "2"]
    arguments += [
        "--norm_num_groups",
        "4",
        "--latent_channels",
        "4",
        "--codebook_size",
        "16",
        "--patch_nums",
        "1",
        "4",
    ]
    arguments += ["--max_train_steps", "2", "--train_batch_size", "4", "--checkpointing_steps", "1"]
    run_in_hub_process(SCRIPT, *arguments)
    files = hub.files("user/trained")
    assert {"README.md", "config.json", "model.safetensors", "train_log.jsonl", "reconstructions.png"} <= files.keys()
    assert not any("checkpoint" in name or "events" in name for name in files)
    card = files["README.md"].decode()
    assert 'from_pretrained("user/trained")' in card
    assert "license: cc0-1.0" in card
    assert str(tmp_path) not in card

    # The transformer is trained on the tokenizer that lies on the Hub, and goes there twice.
    arguments = ["--train_data", tmp_path / "images.parquet", "--vqvae", "user/trained", "--num_labels", "0"]
    arguments += ["--output_dir", tmp_path / "pipeline", "--push_to_hub", "true", "--push_steps", "2"]
    arguments += [
        "--hidden_size",
        "16",
        "--num_hidden_layers",
        "1",
        "--num_attention_heads",
        "2",
        "--num_samples",
        "2",
    ]
    arguments += ["--max_train_steps", "3", "--train_batch_size", "4", "--checkpointing_steps", "1"]
    run_in_hub_process(EXAMPLES / "train_var.py", *arguments, "--data_license", "cc0-1.0")
    files = hub.files("user/pipeline")
    assert {
        "model_index.json",
        "transformer/model.safetensors",
        "vqvae/model.safetensors",
        "samples.png",
    } <= files.keys()
    assert not any("checkpoint" in name or "events" in name for name in files)
    card = files["README.md"].decode()
    assert 'from_pretrained("user/pipeline")' in card
    assert str(tmp_path) not in card
    run_in_hub_process(DRAW, token=None)
