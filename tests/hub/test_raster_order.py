# SPDX-License-Identifier: Apache-2.0
"""A tokenizer, its prior and their pipeline, trained by the scripts and pushed, and loaded as the card says."""

import re
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUN = ["--max_train_steps", "2", "--train_batch_size", "4", "--lr_warmup_steps", "0", "--report_to", "none"]

CHECK = """
from diffusers import DiffusionPipeline
from hf_var import ARPipeline
assert type(DiffusionPipeline.from_pretrained("user/prior")) is ARPipeline
assert images[0].size == (8, 8)
pipe.push_to_hub("user/copy")
copy = ARPipeline.from_pretrained("user/copy")
codes = [one(1, generator=torch.Generator().manual_seed(0)).codes for one in (pipe, copy)]
assert codes[0].equal(codes[1])
"""


def test_what_is_trained_is_pushed_and_loaded(hub, run_in_hub_process, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": [index % 2 for index in range(12)]}
    features = Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    data = ["--train_data", tmp_path / "images.parquet", "--push_to_hub", "true"]
    sizes = ["--in_channels", "1", "--image_size", "8", "--strides", "2", "--base_channels", "8"]
    sizes += ["--residual_channels", "4", "--latent_channels", "4", "--codebook_size", "16"]
    vqvae = ["--model_type", "hierarchical_vqvae", "--output_dir", tmp_path / "vqvae"]
    run_in_hub_process(EXAMPLES / "train_vqvae.py", *data, *vqvae, *sizes, *RUN)
    prior = ["--vqvae", "user/vqvae", "--output_dir", tmp_path / "prior", "--license", "cc0-1.0"]
    prior += ["--prior", "pixelcnn", "--hidden_size", "8", "--num_hidden_layers", "2", "--num_samples", "2"]
    run_in_hub_process(EXAMPLES / "train_pixel_prior.py", *data, *prior, *RUN)

    files = hub.files("user/prior")
    weights = {"prior/model.safetensors", "vqvae/model.safetensors"}
    assert weights | {"README.md", "model_index.json", "samples.png", "train_log.jsonl"} <= files.keys()
    card = files["README.md"].decode()
    assert str(tmp_path) not in card
    assert "license: cc0-1.0" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'ARPipeline.from_pretrained("user/prior")' in snippet
    run_in_hub_process(snippet + CHECK)


CHECK_PAIRS = """
from diffusers import DiffusionPipeline
loaded = DiffusionPipeline.from_pretrained("user/gpt")
arguments = {"condition_image": PIL.Image.open("condition.png"), "generator": torch.Generator().manual_seed(0)}
assert loaded(**arguments).codes.equal(pipe(**arguments | {"generator": torch.Generator().manual_seed(0)}).codes)
assert images[0].size == (8, 8)
"""


def test_a_model_of_pairs_is_pushed_and_loaded(hub, run_in_hub_process, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    pictures = [PILImage.fromarray(image) for image in pixels]
    features = Features({"image": Image(), "sketch": Image()})
    Dataset.from_dict({"image": pictures, "sketch": pictures[::-1]}, features=features).to_parquet(
        tmp_path / "images.parquet"
    )
    data = ["--train_data", tmp_path / "images.parquet", "--image_column", "image"]
    sizes = ["--in_channels", "1", "--base_channels", "8", "--channel_multipliers", "1", "2", "--num_res_blocks", "1"]
    sizes += ["--norm_num_groups", "4", "--latent_channels", "4", "--codebook_size", "16", "--patch_nums", "4"]
    sizes += ["--refinement_ratio", "0", "--output_dir", tmp_path / "vqvae"]
    run_in_hub_process(EXAMPLES / "train_vqvae.py", *data, *sizes, *RUN)
    prior = ["--vqvae", tmp_path / "vqvae", "--condition_vqvae", tmp_path / "vqvae", "--condition_column", "sketch"]
    prior += ["--output_dir", tmp_path / "gpt", "--code_inputs", "tokens", "--hidden_size", "8", "--num_samples", "2"]
    prior += ["--num_hidden_layers", "2", "--num_depth_layers", "0", "--num_attention_heads", "2"]
    run_in_hub_process(EXAMPLES / "train_rq.py", *data, *prior, *RUN, "--push_to_hub", "true")

    files = hub.files("user/gpt")
    weights = {f"{part}/model.safetensors" for part in ("prior", "vqvae", "condition_vqvae")}
    assert weights | {"README.md", "model_index.json", "samples.png"} <= files.keys()
    card = files["README.md"].decode()
    assert str(tmp_path) not in card
    assert "pipeline_tag: image-to-image" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pictures[0].save(tmp_path / "condition.png")
    run_in_hub_process(snippet + CHECK_PAIRS)
