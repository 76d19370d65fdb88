# SPDX-License-Identifier: Apache-2.0
"""
Train a tokenizer on your images: a multi-scale VQ-VAE, which VAR needs (Tian et al. 2024, section 3.2), or with
`--model_type hierarchical_vqvae` a VQ-VAE-2 (Razavi et al. 2019).

The first argument may be a recipe, a YAML file of arguments; the command line overrides it. All fields of `VQVAEConfig`, or
of `HierarchicalVQVAEConfig`, are arguments. The result is a folder for `from_pretrained` of `VQVAEModel`, which is also what
`--vqvae` of train_var.py takes, or of `HierarchicalVQVAEModel`.

On one or many GPUs:

    accelerate launch examples/train_vqvae.py examples/recipes/vqvae_imagenet256.yaml --train_data user/images \
        --output_dir outputs/vqvae --mixed_precision bf16

On a laptop's CPU, in a minute:

    python examples/prepare_digits.py data/digits
    python examples/train_vqvae.py examples/recipes/vqvae_digits.yaml --max_train_steps 800 --unquantized_steps 100
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import torch
from accelerate.utils import set_seed

from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel, VQVAEConfig, VQVAEModel
from hf_var.autoencoders import Tokenizer, TokenizerConfig
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, public_arguments
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.conversion.common import check_overrides
from hf_var.data import AnyDataset, AugmentConfig, DataConfig, image_rows, is_codes_dataset
from hf_var.hub.cards import write_model_card
from hf_var.hub.push import HubConfig, create_repository, push_result
from hf_var.metrics.reconstruction import measure_reconstruction
from hf_var.metrics.reconstruction_plots import RECONSTRUCTION_CAPTION, USAGE_CAPTION
from hf_var.ranges import CheckedFields, OneOf, argument
from hf_var.training.accelerator import make_accelerator
from hf_var.training.adversary import AdversaryConfig, make_adversary, minimize_reconstruction
from hf_var.training.codebook_training import CodebookConfig, CodebookTraining, VQVAEWarmup, check_codebook
from hf_var.training.identity import RunIdentity, make_identity
from hf_var.training.losses import ReconstructionConfig, reconstruction_objective
from hf_var.training.optimization import Optimization, OptimizerConfig
from hf_var.training.run import RunConfig, TrainingRun
from hf_var.training.setup import (
    FrechetConfig,
    Rows,
    card_contents,
    check_autoencoder_run,
    check_sample_type,
    load_image_rows,
    make_batches,
    make_measures,
)


MODELS = {
    "vqvae": (VQVAEConfig, VQVAEModel),
    "hierarchical_vqvae": (HierarchicalVQVAEConfig, HierarchicalVQVAEModel),
}
# What is plotted of the log, where the run has it.
CURVES = ("reconstruction_loss", "adversarial_weight", "usage", "validation_psnr", "validation_mean_iou")
METRICS = ("psnr", "ssim", "lpips", "rfid", "pixel_accuracy", "mean_iou", "usage")
CAPTIONS = {"reconstructions.png": RECONSTRUCTION_CAPTION, "codes.png": USAGE_CAPTION, "curves.png": "The training."}
# What may be changed in fine-tuning: all else belongs to the weights.
FREE_CONFIG_FIELDS = ("dropout", "commitment_loss_weight", "codebook_loss_weight")
# What a resumed run cannot change, beside the configuration.
FIXED_ARGUMENTS = ("seed", "streaming", "unquantized_steps", "kmeans_images", "codebook_update", "discriminator")
FIXED_ARGUMENTS += ("discriminator_channels", "discriminator_layers", "discriminator_start")


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass(kw_only=True)
class ScriptConfig(CheckedFields):
    """Arguments of this script alone."""

    model_type: Annotated[str, OneOf(*MODELS)] = argument(
        "vqvae", help="vqvae or hierarchical_vqvae: which fields there are, and what is trained"
    )
    pretrained_vqvae: str | None = argument(None, help="folder or repository to start from")
    channels_last: bool = argument(False, help="memory format of the convolutions")


class Arguments(NamedTuple):
    """The configuration of each component. Their fields are the arguments of the command line."""

    script: ScriptConfig
    data: DataConfig
    augment: AugmentConfig
    run: RunConfig
    optimizer: OptimizerConfig
    reconstruction: ReconstructionConfig
    frechet: FrechetConfig
    codebook: CodebookConfig
    adversary: AdversaryConfig
    hub: HubConfig
    model: config_fields_class(VQVAEConfig, HierarchicalVQVAEConfig)


def read_arguments(argv: Sequence[str]) -> Arguments:
    args = Arguments(*parse_arguments(list(Arguments.__annotations__.values()), argv))
    check_arguments(args)
    return args


def check_arguments(args: Arguments) -> None:
    """Rules about arguments of several components."""
    check_autoencoder_run(args.run, args.data, args.frechet, args.adversary)
    if args.codebook.unquantized_steps >= args.run.max_train_steps:
        raise ValueError(
            f"`unquantized_steps` must be below `max_train_steps`, got {args.codebook.unquantized_steps}."
        )
    if args.codebook.codebook_update == "sequential_ema" and args.run.torch_compile:
        raise ValueError(
            "`torch_compile` cannot go with `codebook_update` sequential_ema, which moves codes in between."
        )
    if args.script.pretrained_vqvae is not None and args.codebook.kmeans_images + args.codebook.unquantized_steps > 0:
        raise ValueError("`kmeans_images` and `unquantized_steps` would undo `pretrained_vqvae`: set both to 0.")


def make_config(args: Arguments) -> TokenizerConfig:
    given = given_fields(args.model)
    config_class, _ = MODELS[args.script.model_type]
    check_overrides(config_class, given)
    if args.script.pretrained_vqvae is None:
        config = config_class(**given)
        if config.num_output_channels != config.in_channels:
            raise ValueError(
                f"`out_channels` must be `in_channels` = {config.in_channels}, got {config.out_channels}."
            )
    else:
        config = config_class.from_pretrained(args.script.pretrained_vqvae)
        for name, value in given.items():
            if name in FREE_CONFIG_FIELDS:
                setattr(config, name, value)
            elif getattr(config, name) != value:
                raise ValueError(f"`{name}` is {getattr(config, name)} in `pretrained_vqvae`, got {value}.")
    check_codebook(args.codebook, config)
    check_sample_type(config, args.reconstruction, args.data, args.frechet, args.adversary)
    return config


# --------------------------------------------------------------------------------------------------------------------
# Parts


def make_row_reader(args: Arguments, config: TokenizerConfig, dataset: AnyDataset, augment: bool):
    if is_codes_dataset(dataset):
        raise ValueError("A tokenizer is trained on images, but the data set has a column of codes.")
    sizes, num_classes = (config.image_size, config.in_channels), config.num_pixel_classes
    return image_rows(args.data, args.augment if augment else None, dataset, *sizes, num_classes=num_classes)


def identify(args: Arguments, config: TokenizerConfig, rows: Rows) -> RunIdentity:
    """What a run that is resumed must have in common with its checkpoint."""
    parts = {"ema_decay > 0": args.optimizer.ema_decay > 0}
    parts["adversarial_weight > 0"] = args.adversary.adversarial_weight > 0
    arguments = public_arguments(*args[:-1])
    free = [name for name in FREE_CONFIG_FIELDS if hasattr(config, name)]
    return make_identity(arguments, FIXED_ARGUMENTS, config, free, **parts, train_data_rows=rows.number)


def make_model(args: Arguments, config: TokenizerConfig) -> Tokenizer:
    _, model_class = MODELS[args.script.model_type]
    if args.script.pretrained_vqvae is None:
        vqvae = model_class(config)
    else:
        vqvae = model_class.from_pretrained(args.script.pretrained_vqvae, config=config, dtype=torch.float32)
    if args.run.gradient_checkpointing:
        enable_activation_checkpointing(vqvae)
    if args.script.channels_last:
        vqvae.to(memory_format=torch.channels_last)
    for codebook in vqvae.codebooks:
        codebook.requires_grad_(args.codebook.codebook_update == "gradient")
    return vqvae.train()


def to_device(args: Arguments, pixel_values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Images, in the memory format of the model, or maps of class ids."""
    has_channels = pixel_values.ndim == 4
    memory_format = torch.channels_last if args.script.channels_last and has_channels else torch.contiguous_format
    return pixel_values.to(device, non_blocking=True).contiguous(memory_format=memory_format)


# --------------------------------------------------------------------------------------------------------------------
# Results


def describe(args: Arguments, vqvae: Tokenizer, run: TrainingRun) -> None:
    """Plot the training's curves and write the model card."""
    marks = {"quantizer": args.codebook.unquantized_steps} if args.codebook.unquantized_steps > 0 else {}
    if args.adversary.adversarial_weight > 0:
        marks["discriminator"] = args.adversary.discriminator_start
    write_model_card(
        args.run.output_dir,
        vqvae,
        public_arguments(*args[:-1], given_fields(args.model)),
        **card_contents(run, METRICS, CURVES, CAPTIONS, marks),
        repo_id=args.hub.hub_model_id,
        license=args.hub.license,
    )


# --------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(sys.argv[1:] if argv is None else argv)

    # Everything that can be wrong with the input is found before any work.
    config = make_config(args)
    train_rows, validation_rows = load_image_rows(args.data, args.run, partial(make_row_reader, args, config))

    seed, batch_size = args.run.seed, args.data.train_batch_size
    accelerator = make_accelerator(args.run, batch_size, args.optimizer.max_grad_norm)
    run = TrainingRun(args.run, accelerator, "train_vqvae", batch_size, identify(args, config, train_rows))
    set_seed(seed, device_specific=True)
    # Before anything is prepared, which may draw random numbers where there are several processes.
    vqvae = make_model(args, config)
    batches, validation = make_batches(args.data, seed, accelerator, train_rows, validation_rows)
    image_shape = config.num_output_channels, *config.image_size
    perceptual_loss, feature_extractor = make_measures(
        args.reconstruction, args.frechet, image_shape, accelerator.device
    )
    adversary, max_steps = None, args.run.max_train_steps
    if args.adversary.adversarial_weight > 0:
        adversary = make_adversary(
            args.adversary, image_shape, args.optimizer, accelerator, batch_size, max_steps, seed
        )
    if args.hub.push_to_hub and accelerator.is_main_process:
        args.hub.hub_model_id = create_repository(args.run.output_dir, args.hub.hub_model_id)
    optimization = Optimization(accelerator, vqvae, args.optimizer, max_steps, VQVAEWarmup(vqvae))
    codebook = CodebookTraining(args.codebook, vqvae, accelerator, max_steps, seed, optimization.average)
    parts = {"model": vqvae, "optimization": optimization, "codebook": codebook, "batches": batches}
    if adversary is not None:
        parts |= {"discriminator": adversary.bare_discriminator, "adversary": adversary}

    with run.started(parts, public_arguments(*args)):
        for batch in run.until_the_end(batches):
            pixel_values = to_device(args, batch["pixel_values"], accelerator.device)
            if codebook.is_started_at(run.step) and run.begins_step:
                codebook.start(batches.first_items(args.codebook.kmeans_images)["pixel_values"], batch_size)
            judge = adversary if adversary is not None and adversary.is_active(run.step) else None
            with accelerator.accumulate(optimization.model, *([] if judge is None else [judge.discriminator])):
                callback = codebook.scale_callback(run.step, run.position)
                output = optimization.model(pixel_values, codebook.is_quantized(run.step), callback)
                codebook.observe(output)
                reconstruction, quantizer_loss, metrics = reconstruction_objective(
                    args.reconstruction, output, pixel_values, perceptual_loss
                )
                losses = reconstruction, quantizer_loss
                loss, judged = minimize_reconstruction(
                    optimization, judge, (pixel_values, output.sample), losses, vqvae.decoder.conv_out.weight, run
                )
            run.add(loss, **metrics, **judged)
            if not accelerator.sync_gradients:
                continue

            if judge is not None:
                judge.finish_step()
            codebook.finish_step(run.step)
            optimization.finish_step()
            run.finish_step(
                optimization.learning_rate, optimization.gradient_norm, broken_images=batches.broken_images
            )
            if usage := codebook.finish_window(output, run.step):
                run.write(usage)
                run.show(usage=f"{usage['usage']:.0%}")
            if validation is not None and run.is_due(args.run.validation_steps):
                with optimization.averaged():
                    measured = measure_reconstruction(
                        vqvae, validation, accelerator, perceptual_loss, feature_extractor
                    )
                run.write_validation(*measured)
            run.save_if_due()

        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with optimization.averaged(), run.writing():
                vqvae.save_pretrained(args.run.output_dir)
            describe(args, vqvae, run)
            if args.hub.push_to_hub:
                push_result(args.run.output_dir, args.hub.hub_model_id)


if __name__ == "__main__":
    main()
