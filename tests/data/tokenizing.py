# SPDX-License-Identifier: Apache-2.0
"""A tiny tokenizer, images for it, and what a tokenization leaves."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset
from PIL import Image

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.data.tokenization import TokenizationConfig, tokenize_dataset

from .samples import encoded, image_rows_of


SIZES = {
    "in_channels": 1,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "norm_num_groups": 4,
}
NAMES = ["cat", "dog", "newt"]


def make_vqvae(seed: int = 0, **fields) -> VQVAEModel:
    torch.manual_seed(seed)
    config = VQVAEConfig(**SIZES, **({"latent_channels": 4, "codebook_size": 64, "patch_nums": (1, 2, 4)} | fields))
    vqvae = VQVAEModel(config)
    with torch.no_grad():
        # Fresh weights give all images the same few codes.
        vqvae.codebook.vectors.normal_()
        vqvae.encoder.conv_out.weight.mul_(8)
        vqvae.quant_conv.weight.mul_(4)
    return vqvae.eval()


def noise_images(number: int, height: int = 12, width: int = 15) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (number, height, width), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def noise_contents(number: int) -> list[bytes]:
    return [encoded(image) for image in noise_images(number)]


def write_named(path: Path, contents: list[bytes | None], batch_size: int = 4) -> str:
    """A parquet file of images whose labels have names."""
    image_rows_of(contents).cast_column("label", ClassLabel(names=NAMES)).to_parquet(path, batch_size=batch_size)
    return str(path)


def tokenize(source: str, vqvae_folder: str, output_dir: Path, **values):
    args = TokenizationConfig(**({"data": source, "vqvae": vqvae_folder, "output_dir": str(output_dir)} | values))
    return tokenize_dataset(args, Accelerator(cpu=True))


def contents_of(folder: Path) -> dict[str, bytes]:
    """The files that a run leaves, by name, but for those that tell its arguments."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".parquet"}


def rows_of(folder: Path) -> Dataset:
    return Dataset.from_parquet([str(path) for path in sorted(folder.glob("*.parquet"))])
