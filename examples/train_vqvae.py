# SPDX-License-Identifier: Apache-2.0
"""
Train a multi-scale VQ-VAE, the tokenizer of VAR (Tian et al. 2024, section 3.2), on your images.

The first argument may be a recipe, a YAML file of arguments; the command line counts more. All fields of `VQVAEConfig` are
arguments. The result is a folder for `VQVAEModel.from_pretrained` and for `--vqvae` of train_var.py.

On one or many GPUs:

    accelerate launch examples/train_vqvae.py examples/recipes/vqvae_digits.yaml --train_data user/images \
        --output_dir outputs/vqvae --mixed_precision bf16

On a laptop's CPU, in a minute:

    python examples/prepare_digits.py data/digits
    python examples/train_vqvae.py examples/recipes/vqvae_digits.yaml --max_train_steps 800 --unquantized_steps 100
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional
from torch.utils.data import DataLoader

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.training import codebook, data
from hf_var.training.arguments import TrainingArguments, given_config_fields, parse_arguments, with_config_fields
from hf_var.training.optimization import averaged_weights, make_optimizer
from hf_var.training.run import TrainingRun


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass
class VQVAETrainingArguments(TrainingArguments):
    """Arguments of this script alone."""

    pretrained_vqvae: str | None = field(default=None, metadata={"help": "folder or repository to start from"})
    l1_weight: float = field(default=0.0, metadata={"help": "weight of the mean absolute error of the pixels"})
    l2_weight: float = field(default=1.0, metadata={"help": "weight of the mean squared error of the pixels"})
    quantizer_weight: float = field(default=1.0, metadata={"help": "weight of the codebook and commitment terms"})
    unquantized_steps: int = field(
        default=0, metadata={"help": "first steps, in which the features are not quantized"}
    )
    kmeans_images: int = field(
        default=0, metadata={"help": "images for a k-means start of the codebook after unquantized_steps; 0: none"}
    )
    restart_steps: int = field(default=0, metadata={"help": "move dead codes this often; 0: never"})
    restart_until: float = field(default=0.7, metadata={"help": "stop moving them after this share of the training"})

    def __post_init__(self):
        super().__post_init__()
        if self.l1_weight < 0 or self.l2_weight < 0 or self.l1_weight + self.l2_weight == 0:
            raise ValueError(
                "`l1_weight` and `l2_weight` must be at least 0, and one of them positive, got "
                f"{self.l1_weight} and {self.l2_weight}."
            )


def make_config(args: VQVAETrainingArguments) -> VQVAEConfig:
    given = given_config_fields(args, VQVAEConfig)
    if args.pretrained_vqvae is None:
        return VQVAEConfig(**given)
    config = VQVAEConfig.from_pretrained(args.pretrained_vqvae)
    for name, value in given.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` is {getattr(config, name)} in `pretrained_vqvae`, got {value}.")
    return config


# --------------------------------------------------------------------------------------------------------------------
# Data


def make_row_reader(args: VQVAETrainingArguments, config: VQVAEConfig, dataset, augment: bool):
    if data.is_codes_dataset(dataset):
        raise ValueError("A tokenizer is trained on images, but the data set has a column of codes.")
    transform = data.image_transform(args, config.image_size, config.in_channels, augment)
    return data.image_row(data.find_image_column(dataset, args.image_column), None, transform)


# --------------------------------------------------------------------------------------------------------------------
# Losses and validation


def reconstruction_loss(
    sample: torch.Tensor, target: torch.Tensor, l1_weight: float, l2_weight: float
) -> torch.Tensor:
    sample = sample.float()
    loss = l2_weight * functional.mse_loss(sample, target)
    return loss if l1_weight == 0 else loss + l1_weight * functional.l1_loss(sample, target)


@torch.no_grad()
def log_validation(vqvae: VQVAEModel, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Peak signal-to-noise ratio, averaged over the images, and the share of codes that each scale uses."""
    vqvae.eval()
    ratios, codes = [], []
    for batch in loader:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        codes.append(vqvae.encode(pixel_values).codes)
        errors = (vqvae.decode(codes[-1]).sample.float() - pixel_values).square().mean(dim=(1, 2, 3))
        ratios.append(10 * torch.log10(4 / errors.clamp(min=1e-10)))  # pixels span 2
    vqvae.train()
    figures = {"validation_psnr": torch.cat(ratios).mean().item()}
    for scale, scale_codes in enumerate(torch.cat(codes).split(vqvae.config.scale_lengths, dim=1)):
        figures[f"validation_usage_{scale}"] = len(scale_codes.unique()) / vqvae.config.codebook_size
    return figures


# --------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(
        with_config_fields(VQVAETrainingArguments, VQVAEConfig), sys.argv[1:] if argv is None else argv
    )

    # Everything that can be wrong with the input is found before any work.
    config = make_config(args)
    train_data = data.load_source("train_data", args.train_data, args.train_split, ["train"])
    train_rows = make_row_reader(args, config, train_data, augment=True)
    validation = None
    if args.validation_data is not None:
        validation_data = data.load_source(
            "validation_data", args.validation_data, args.validation_split, ["validation", "test"]
        )
        validation_rows = make_row_reader(args, config, validation_data, augment=False)
        validation = data.validation_loader(validation_data, validation_rows, args)

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    set_seed(args.seed, device_specific=True)
    run = TrainingRun(accelerator, args, "train_vqvae")

    if args.pretrained_vqvae is None:
        vqvae = VQVAEModel(config)
    else:
        vqvae = VQVAEModel.from_pretrained(args.pretrained_vqvae, dtype=torch.float32)
    vqvae.train()
    optimizer = make_optimizer(vqvae, args)
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    dead_codes = codebook.DeadCodes(config.codebook_size)
    train_set = data.EndlessDataset(train_data, train_rows, args.seed)
    loader = data.training_loader(train_set, args, accelerator.num_processes, run.step)
    model, optimizer, loader = accelerator.prepare(codebook.VQVAEWarmup(vqvae), optimizer, loader)
    average = EMAModel(vqvae.parameters(), decay=args.ema_decay) if args.ema_decay > 0 else None
    accelerator.register_for_checkpointing(scheduler, dead_codes, *([] if average is None else [average]))
    run.resume()

    for batch in loader:
        if run.step == args.unquantized_steps and run.begins_step and args.kmeans_images > 0:
            pixel_values = data.first_items(train_set, args.kmeans_images)["pixel_values"].to(accelerator.device)
            codebook.initialize_codebook(vqvae, pixel_values, args.seed)
        with accelerator.accumulate(model):
            output = model(batch["pixel_values"], quantize=run.step >= args.unquantized_steps)
            reconstruction = reconstruction_loss(output.sample, batch["pixel_values"], args.l1_weight, args.l2_weight)
            loss = reconstruction + args.quantizer_weight * output.loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.add_loss(loss)
        if output.codes is not None:
            dead_codes.count(output.codes)
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        if output.codes is not None and args.restart_steps > 0 and (run.step + 1) % args.restart_steps == 0:
            if run.step < args.restart_until * args.max_train_steps:
                dead_codes.restart(vqvae, output.features.detach(), output.codes, seed=args.seed + run.step)
        if average is not None:
            average.step(vqvae.parameters())
        run.finish_step(scheduler.get_last_lr()[0], reconstruction_loss=reconstruction.item())
        if validation is not None and run.is_validation_due:
            with averaged_weights(average, vqvae):
                run.write(**log_validation(vqvae, validation, accelerator))

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged_weights(average, vqvae):
            vqvae.save_pretrained(args.output_dir)
            if args.push_to_hub:
                vqvae.push_to_hub(args.hub_model_id or Path(args.output_dir).name)
    accelerator.end_training()


if __name__ == "__main__":
    main()
