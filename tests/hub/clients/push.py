# SPDX-License-Identifier: Apache-2.0
"""Publishes tiny pipelines and models in every way, and keeps what they draw for those who pull them."""

import sys
from pathlib import Path

import torch
from common import draw, save_drawing
from huggingface_hub import HfApi

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel


def make_pipeline(seed: int) -> VARPipeline:
    schedule = {"codebook_size": 32, "latent_channels": 4, "patch_nums": (1, 2, 4)}
    torch.manual_seed(seed)
    vqvae = VQVAEModel(
        VQVAEConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm_num_groups=4, **schedule)
    )
    names = {0: "cat", 1: "dog", 2: "owl"}
    transformer = VARTransformer(
        VARConfig(id2label=names, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **schedule)
    )
    with torch.no_grad():
        # Fresh weights draw grey images from nearly uniform logits, which would hide a wrong weight.
        for parameter in (*vqvae.parameters(), *transformer.parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        transformer.head.weight.mul_(4)
    return VARPipeline(transformer.eval(), vqvae.eval())


def main(reference: Path) -> None:
    pipe, other = make_pipeline(seed=0), make_pipeline(seed=1)
    save_drawing(draw(pipe), reference / "first.npz")
    save_drawing(draw(other), reference / "second.npz")

    pipe.push_to_hub("user/pipeline")
    HfApi().create_tag("user/pipeline", tag="v1.0")
    HfApi().create_branch("user/pipeline", branch="stable")
    other.push_to_hub("user/pipeline")
    pipe.push_to_hub("user/private", private=True)

    pipe.transformer.push_to_hub("user/transformer", max_shard_size="20KB")
    pipe.vqvae.push_to_hub("user/vqvae")

    half = make_pipeline(seed=0).to(torch.float16)
    half.save_pretrained(
        str(reference / "half"), variant="fp16", max_shard_size="20KB", push_to_hub=True, repo_id="user/half"
    )
    save_drawing(draw(half), reference / "half.npz")
    pipe.push_to_hub("user/half")  # full precision beside the variant, as in most repositories that have one


if __name__ == "__main__":
    main(Path(sys.argv[1]))
