# SPDX-License-Identifier: Apache-2.0
"""
Train diffusers' DiT (Peebles & Xie 2023) on the latents of a KL autoencoder, in a plain loop: what autoregressive models are
compared with. The command `latents` encodes augmented copies of the images, `train` trains on them. The result is a folder
for `DiTPipeline.from_pretrained`.

    python benchmarks/racing/dit.py latents --train_data data/digits/train.parquet --autoencoder outputs/kl_digits_latents \
        --resize_ratio 1 --interpolation bicubic --augment_rotation 5 --copies 64 --latents outputs/latents.safetensors
    python benchmarks/racing/dit.py train --autoencoder outputs/kl_digits_latents --latents outputs/latents.safetensors \
        --max_train_steps 2000 --output_dir outputs/dit_digits

The model predicts the noise (Ho et al. 2020) and is sampled by DPM-Solver++ (Lu et al. 2022).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import LabelEmbedding
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from hf_var.cli.arguments import parse_arguments
from hf_var.data import AugmentConfig, DataConfig, TrainingBatches, image_rows, load_source, training_labels
from hf_var.ranges import CheckedFields, NonNegativeInt, PositiveInt, Share, argument
from hf_var.training.optimization import Optimization, OptimizerConfig


NUM_NOISE_LEVELS = 1000


@dataclass(kw_only=True)
class LatentsConfig(CheckedFields):
    """What is encoded."""

    autoencoder: str = argument(help="folder of the AutoencoderKL")
    latents: str = argument(help="file to write")
    copies: PositiveInt = argument(1, help="augmented copies of each image")
    seed: NonNegativeInt = argument(0, help="seed of the augmentation")


@dataclass(kw_only=True)
class DiTConfig(CheckedFields):
    """What is trained."""

    autoencoder: str = argument(help="folder of the AutoencoderKL")
    latents: str = argument(help="file that the command `latents` wrote")
    output_dir: str = argument(help="folder for the pipeline")
    max_train_steps: PositiveInt = argument(2000, help="optimizer steps")
    train_batch_size: PositiveInt = argument(64, help="latents of a step")
    seed: NonNegativeInt = argument(0, help="fixes weights, order and noise")
    hidden_size: PositiveInt = argument(128, help="width of the transformer")
    num_hidden_layers: PositiveInt = argument(4, help="number of layers")
    num_attention_heads: PositiveInt = argument(2, help="attention heads, a divisor of hidden_size")
    class_dropout_prob: Share = argument(0.1, help="probability to leave the class out")


def make_transformer(config: DiTConfig, channels: int, side: int, num_labels: int) -> DiTTransformer2DModel:
    """A DiT of patches of one latent, that begins as the paper's: every layer is the identity, and the output zero."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        in_channels=channels,
        out_channels=channels,
        sample_size=side,
        patch_size=1,
        num_embeds_ada_norm=num_labels,
    )
    blocks: Any = transformer.transformer_blocks
    outputs: list[Any] = [*(block.norm1.linear for block in blocks), transformer.proj_out_1, transformer.proj_out_2]
    for layer in outputs:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def train_mode(transformer: DiTTransformer2DModel) -> None:
    """Training mode without diffusers' class dropout, which every layer would draw for itself."""
    transformer.train()
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()


@torch.no_grad()
def write_latents(argv: Sequence[str]) -> None:
    config, reading, augment = parse_arguments([LatentsConfig, DataConfig, AugmentConfig], argv)
    autoencoder: Any = AutoencoderKL.from_pretrained(config.autoencoder).eval()
    dataset = load_source("train_data", reading.train_data, reading.train_split, ["train"])
    condition, _ = training_labels(dataset, reading.label_column, None)
    side = autoencoder.config.sample_size
    rows = image_rows(reading, augment, dataset, (side, side), autoencoder.config.in_channels, condition)
    # As many epochs, whose images are all changed anew.
    batches = TrainingBatches(dataset, rows, reading, config.seed)
    number = -(-config.copies * len(dataset) // reading.train_batch_size)
    moments, labels = [], []
    for batch in islice(batches, number):
        moments.append(autoencoder.encode(batch["pixel_values"]).latent_dist.parameters)
        labels.append(batch["class_labels"])
    save_file({"moments": torch.cat(moments), "labels": torch.cat(labels)}, config.latents)


def shuffled(number: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The indices of endless batches, without the last, smaller one of an epoch."""
    batch_size = min(batch_size, number)
    while True:
        yield from torch.randperm(number, generator=generator).split(batch_size)[: number // batch_size]


def train(argv: Sequence[str]) -> None:
    config, optimizer = parse_arguments([DiTConfig, OptimizerConfig], argv)
    autoencoder: Any = AutoencoderKL.from_pretrained(config.autoencoder).requires_grad_(False)
    tensors = load_file(config.latents)
    moments, labels = tensors["moments"], tensors["labels"]
    channels, side = moments.shape[1] // 2, moments.shape[2]
    num_labels = int(labels.max()) + 1
    accelerator = Accelerator(mixed_precision="bf16")
    set_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    transformer = make_transformer(config, channels, side, num_labels)
    noise_levels = DDPMScheduler(NUM_NOISE_LEVELS)
    optimization = Optimization(accelerator, transformer, optimizer, config.max_train_steps)
    train_mode(transformer)

    batches = shuffled(len(moments), config.train_batch_size, generator)
    for chosen in islice(batches, config.max_train_steps):
        posterior = DiagonalGaussianDistribution(moments[chosen])
        latents = posterior.sample(generator) * autoencoder.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(NUM_NOISE_LEVELS, (len(latents),), generator=generator)
        dropped = torch.rand(len(latents), generator=generator) < config.class_dropout_prob
        classes = labels[chosen].where(~dropped, num_labels)
        noisy = noise_levels.add_noise(latents, noise, times)  # pyright: ignore[reportArgumentType]
        predicted = optimization.model(noisy, timestep=times, class_labels=classes).sample
        optimization.minimize(functional.mse_loss(predicted.float(), noise))
        optimization.finish_step()

    sampler: Any = DPMSolverMultistepScheduler.from_config(noise_levels.config)
    with optimization.averaged():
        DiTPipeline(transformer, autoencoder, sampler).save_pretrained(config.output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    commands = {"latents": write_latents, "train": train}
    if command not in commands:
        raise SystemExit("The first argument is latents or train, then come theirs.")
    commands[command](arguments)


if __name__ == "__main__":
    main()
