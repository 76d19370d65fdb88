# SPDX-License-Identifier: Apache-2.0
"""Somebody whose transformer is trained: a folder as the training leaves it, its card, and the upload."""

import sys
from pathlib import Path

from common import draw, save_drawing
from PIL import Image
from push import make_pipeline

from hf_var.hub.cards import write_pipeline_card
from hf_var.hub.push import create_repository, push_result


def main(output_dir: Path) -> None:
    repo_id = create_repository(output_dir)
    pipe = make_pipeline(seed=0)
    save_drawing(draw(pipe), output_dir.with_name("expected.npz"))
    # diffusers uploads a card of its own and leaves it in the folder.
    pipe.save_pretrained(str(output_dir), push_to_hub=True, repo_id=repo_id)
    assert "library_name: diffusers" in (output_dir / "README.md").read_text()

    checkpoint = output_dir / "checkpoints" / "step-00000001"
    pipe.transformer.save_pretrained(checkpoint)
    (checkpoint / "optimizer.bin").write_bytes(b"moments")
    for folder, name in (
        ("train_var", "hparams.json"),
        ("pictures", "samples-00000001.png"),
        ("cache", "model.safetensors"),
        ("lora", "adapter_model.safetensors"),
    ):
        (output_dir / folder).mkdir()
        (output_dir / folder / name).write_bytes(b"{}")
    (output_dir / "train_var" / "events.out.tfevents.1").write_bytes(b"events")
    (output_dir / "transformer" / "optimizer.bin").write_bytes(b"moments")
    (output_dir / "train_log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    for name in ("samples.png", "curves [1].png"):
        Image.new("RGB", (8, 8)).save(output_dir / name)
    recipe = {"train_data": "user/birds", "vqvae": str(output_dir.parent / "tokenizer"), "learning_rate": 1e-4}
    write_pipeline_card(
        output_dir,
        pipe,
        recipe,
        metrics={"loss": 4.25, "bits_per_token": 4.25 / 0.6931, "accuracy": 0.125},
        pictures={"samples.png": "Samples.", "curves [1].png": "The training."},
        repo_id=repo_id,
        license="cc0-1.0",
        data_license="cc-by-4.0",
    )
    sys.stdout.write(push_result(output_dir, repo_id) + "\n")
    sys.stdout.write(push_result(output_dir) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
