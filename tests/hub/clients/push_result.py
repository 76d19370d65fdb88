# SPDX-License-Identifier: Apache-2.0
"""Somebody whose tokenizer is trained: a folder as the training leaves it, its card, and the upload."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.hub.cards import write_model_card
from hf_var.hub.push import create_repository, push_result
from hf_var.metrics.reconstruction_plots import RECONSTRUCTION_CAPTION, USAGE_CAPTION, reconstruction_grid, usage_plot


def make_vqvae() -> VQVAEModel:
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    vqvae = VQVAEModel(VQVAEConfig(**sizes, latent_channels=4, codebook_size=32, patch_nums=(1, 2, 4)))
    with torch.no_grad():
        vqvae.codebook.vectors.normal_()
        vqvae.encoder.conv_out.weight.mul_(4)
        vqvae.quant_conv.weight.mul_(3)
    return vqvae.eval()


def main(output_dir: Path) -> None:
    repo_id = create_repository(output_dir)
    # Fine-tuned from a folder, whose place is nobody's business.
    make_vqvae().save_pretrained(output_dir / "checkpoints" / "step-00000001")
    vqvae = VQVAEModel.from_pretrained(output_dir / "checkpoints" / "step-00000001")
    vqvae.save_pretrained(output_dir)
    (output_dir / "checkpoints" / "step-00000001" / "optimizer.bin").write_bytes(b"moments")
    (output_dir / "train_vqvae").mkdir()
    (output_dir / "train_vqvae" / "events.out.tfevents.1").write_bytes(b"events")
    (output_dir / "train_vqvae" / "hparams.json").write_bytes(b"{}")
    (output_dir / "optimizer.bin").write_bytes(b"moments")
    (output_dir / "train_log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        codes = vqvae.encode(images).codes
    assert len(codes.unique()) > 5, "too few codes to tell two tokenizers apart"
    save_file({"images": images, "codes": codes}, output_dir.with_name("expected.safetensors"))
    reconstruction_grid(vqvae, images).save(output_dir / "reconstruction.png")
    usage_plot(vqvae.config.patch_nums, [0.1] * 3, [0.1] * 3, [0.2] * 3).savefig(output_dir / "usage.png")
    recipe = {"train_data": str(output_dir.parent / "birds"), "validation_data": "user/birds", "learning_rate": 1e-4}
    write_model_card(
        output_dir,
        vqvae,
        recipe,
        metrics={"psnr": 27.1, "rfid": 3.5},
        pictures={"reconstruction.png": RECONSTRUCTION_CAPTION, "usage.png": USAGE_CAPTION},
        repo_id=repo_id,
    )
    sys.stdout.write(push_result(output_dir, repo_id) + "\n")
    # Once more, as after a run that was resumed; with the name that it has by itself.
    sys.stdout.write(push_result(output_dir) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
