# SPDX-License-Identifier: Apache-2.0
"""A data set of codes on the Hub: what was pushed is what a training reads, by its name alone."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.data import tokenizer_fingerprint


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tokenize_dataset.py"

PUBLISH = """
import sys
from datasets import load_dataset
from hf_var import VQVAEModel

folder = sys.argv[1]
load_dataset("parquet", data_files=f"{folder}/images.parquet", split="train").push_to_hub("user/images")
VQVAEModel.from_pretrained(f"{folder}/vqvae").push_to_hub("user/vqvae")
"""

READ = """
import sys
from hf_var import data

folder, fingerprint = sys.argv[1:]
for streaming in (False, True):
    pushed = data.load_source("train_data", "user/codes", None, ["train"], streaming)
    local = data.load_source("train_data", folder, None, ["train"], streaming)
    assert data.is_codes_dataset(pushed)
    assert pushed.features == local.features
    assert data.label_names(pushed, "label") == {0: "cat", 1: "dog"}
    rows = list(pushed)
    assert rows == list(local) and len(rows) == 12, len(rows)
    assert len({tuple(row["codes"]) for row in rows}) > 2
assert data.codes_fingerprint("user/codes") == fingerprint
assert data.codes_fingerprint("user/images") is None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("somebodys_home")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": [0, 1] * 3}
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "images.parquet")
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    vqvae = VQVAEModel(VQVAEConfig(in_channels=1, **sizes, latent_channels=4, codebook_size=32, patch_nums=(1, 2, 4)))
    with torch.no_grad():
        vqvae.quantizer.codebook.weight.normal_()
        vqvae.encoder.conv_out.weight.mul_(8)
    vqvae.save_pretrained(folder / "vqvae")
    return folder


@pytest.fixture(scope="module")
def push(run_in_hub_process, folder: Path):
    def run(**arguments: object) -> None:
        values = {"data": folder / "images.parquet", "vqvae": folder / "vqvae", "output_dir": folder / "codes"}
        words = [word for name, value in (values | arguments).items() for word in (f"--{name}", value)]
        run_in_hub_process(SCRIPT, *words, "--push_to_hub", "--horizontal_flip")

    return run


@pytest.fixture(scope="module")
def published(run_in_hub_process, folder: Path) -> None:
    """The images and the tokenizer on the Hub."""
    run_in_hub_process(PUBLISH, folder)


@pytest.mark.usefixtures("published")
def test_pushed_codes_are_read_by_name(hub, push, run_in_hub_process, folder: Path) -> None:
    push(rows_per_shard=2, license="cc0-1.0")
    files = hub.files("user/codes", kind="datasets")
    shards = {f"codes-0000{unit}-of-00003.parquet" for unit in range(3)}
    assert files.keys() == {".gitattributes", "README.md", *shards}
    card = files["README.md"].decode()
    assert "license: cc0-1.0" in card
    assert "somebodys_home" not in card
    fingerprint = tokenizer_fingerprint(VQVAEModel.from_pretrained(folder / "vqvae"))
    run_in_hub_process(READ, folder / "codes", fingerprint, token=None)

    # Other files take the place of those that were there.
    push(rows_per_shard=3, output_dir=folder / "other", hub_dataset_id="user/codes")
    shards = {f"codes-0000{unit}-of-00002.parquet" for unit in range(2)}
    assert hub.files("user/codes", kind="datasets").keys() == {".gitattributes", "README.md", *shards}


@pytest.mark.usefixtures("published")
def test_example_of_the_card_runs_as_it_stands(hub, push, run_in_hub_process, folder: Path) -> None:
    push(vqvae="user/vqvae", data="user/images", output_dir=folder / "example")
    card = hub.files("user/example", kind="datasets")["README.md"].decode()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'load_dataset("user/example"' in snippet
    assert "source_datasets:\n- user/images" in card
    assert "- split: train\n    path: codes-*.parquet" in card
    run_in_hub_process(snippet + "\nassert sample.shape == (4, 1, 8, 8) and sample.std() > 0.01", token=None)


def test_a_missing_token_is_found_before_any_work(run_in_hub_process, folder: Path) -> None:
    words = ["--data", folder / "images.parquet", "--vqvae", folder / "vqvae", "--output_dir", folder / "never"]
    with pytest.raises(RuntimeError, match="401"):
        run_in_hub_process(SCRIPT, *words, "--push_to_hub", token=None)
    assert not (folder / "never").exists()
