# SPDX-License-Identifier: Apache-2.0
"""A pipeline of texts, trained by the scripts and pushed with its text encoder, and loaded as the card says."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from examples.conftest import TINY_VQVAE


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUN = ["--max_train_steps", "2", "--train_batch_size", "4", "--lr_warmup_steps", "0", "--report_to", "none"]

CHECK = """
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
assert images[0].size == (8, 8)
for load in (DiffusionPipeline, AutoPipelineForText2Image):
    other = load.from_pretrained("user/text_var")
    assert type(other) is VARTextToImagePipeline
    codes = [one("a cat, 3", generator=torch.Generator().manual_seed(0)).codes for one in (pipe, other)]
    assert codes[0].equal(codes[1])
assert pipe.tokenizer("a cat").input_ids == other.tokenizer("a cat").input_ids
"""


def test_a_folder_with_captions_becomes_a_pipeline_on_the_hub(hub, run_in_hub_process, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    lines = ["file_name,text", *(f'{number}.png,"a cat, {number}"' for number in range(12))]
    (folder / "metadata.csv").write_text("\n".join(lines))

    data, vqvae, encoder = ["--train_data", folder], tmp_path / "vqvae", tmp_path / "text_encoder"
    run_in_hub_process(EXAMPLES / "train_vqvae.py", *data, *TINY_VQVAE, *RUN, "--output_dir", vqvae)
    words = ["--caption_column", "text", "--output", encoder, "--hidden_size", "16", "--vocab_size", "300"]
    run_in_hub_process(EXAMPLES / "make_text_encoder.py", folder, *words)
    prior = ["--caption_column", "text", "--vqvae", vqvae, "--text_encoder", encoder, "--train_text_encoder", "true"]
    prior += ["--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
    result = ["--output_dir", tmp_path / "text_var", "--push_to_hub", "true", "--push_steps", "1"]
    run_in_hub_process(EXAMPLES / "train_var.py", *data, *prior, *RUN, *result)

    files = hub.files("user/text_var")
    models = {f"{name}/model.safetensors" for name in ("transformer", "vqvae", "text_encoder")}
    assert {"model_index.json", "tokenizer/tokenizer.json", "README.md", "samples.png"} | models <= files.keys()
    (snippet,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    run_in_hub_process(f"import os\nos.chdir({str(tmp_path)!r})\n{snippet}{CHECK}", token=None)
