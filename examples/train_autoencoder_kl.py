# SPDX-License-Identifier: Apache-2.0
"""
Train diffusers' `AutoencoderKL`, a variational autoencoder (Kingma & Welling 2014; Rombach et al. 2022), on your images.

The first argument may be a recipe, a YAML file of arguments; the command line overrides it. All arguments of the constructor of
`AutoencoderKL` are arguments; `sample_size` is the side of the images. The result is a folder for
`diffusers.AutoencoderKL.from_pretrained`, which needs nothing of this package.

On one or many GPUs:

    accelerate launch examples/train_autoencoder_kl.py examples/recipes/kl_f8_256.yaml --train_data user/images \
        --output_dir outputs/kl_f8

On a laptop's CPU:

    python examples/prepare_digits.py data/digits
    python examples/train_autoencoder_kl.py examples/recipes/kl_digits.yaml
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, public_arguments
from hf_var.data import AnyDataset, AugmentConfig, DataConfig, TrainingBatches, image_rows, is_codes_dataset
from hf_var.hub.cards import write_autoencoder_kl_card
from hf_var.hub.push import HubConfig, create_repository, push_result
from hf_var.metrics.latents import (
    INTERPOLATIONS_CAPTION,
    PAIRS_CAPTION,
    SAMPLES_CAPTION,
    measure_autoencoder_kl,
)
from hf_var.ranges import CheckedFields, argument
from hf_var.training.accelerator import make_accelerator
from hf_var.training.adversary import AdversaryConfig, make_adversary, minimize_reconstruction
from hf_var.training.autoencoder_kl import (
    FREE_FIELDS,
    POSTERIOR_STREAM,
    AutoencoderKLWithPosterior,
    KLConfig,
    KLObjective,
    autoencoder_kl_config,
)
from hf_var.training.identity import RunIdentity, make_identity
from hf_var.training.optimization import Optimization, OptimizerConfig
from hf_var.training.random_numbers import position_generator
from hf_var.training.run import RunConfig, TrainingRun
from hf_var.training.setup import (
    FrechetConfig,
    Rows,
    card_contents,
    check_autoencoder_run,
    load_image_rows,
    make_batches,
    make_measures,
)
from hf_var.weight_files import use_umask


# What is plotted of the log, where the run has it.
CURVES = ("reconstruction_loss", "kl", "adversarial_weight", "validation_psnr")
METRICS = ("psnr", "ssim", "lpips", "rfid", "kl", "active_dimensions")
CAPTIONS = {
    "reconstructions.png": PAIRS_CAPTION,
    "samples.png": SAMPLES_CAPTION,
    "interpolations.png": INTERPOLATIONS_CAPTION,
    "curves.png": "The training.",
}
# What a resumed run cannot change, beside the configuration.
FIXED_ARGUMENTS = ("seed", "streaming", "discriminator", "discriminator_channels", "discriminator_layers")
FIXED_ARGUMENTS += ("discriminator_start",)
# Training images whose latents are measured where there are none for validation.
SCALING_IMAGES = 256


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass(kw_only=True)
class ScriptConfig(CheckedFields):
    """Arguments of this script alone."""

    pretrained_autoencoder: str | None = argument(None, help="folder or repository to start from")


class Arguments(NamedTuple):
    """The configuration of each component. Their fields are the arguments of the command line."""

    script: ScriptConfig
    data: DataConfig
    augment: AugmentConfig
    run: RunConfig
    optimizer: OptimizerConfig
    objective: KLConfig
    frechet: FrechetConfig
    adversary: AdversaryConfig
    hub: HubConfig
    model: config_fields_class(AutoencoderKL)


def read_arguments(argv: Sequence[str]) -> Arguments:
    args = Arguments(*parse_arguments(list(Arguments.__annotations__.values()), argv))
    check_autoencoder_run(args.run, args.data, args.frechet, args.adversary)
    return args


# --------------------------------------------------------------------------------------------------------------------
# Parts


def make_row_reader(args: Arguments, image_shape: tuple[int, int, int], dataset: AnyDataset, augment: bool):
    if is_codes_dataset(dataset):
        raise ValueError("An autoencoder is trained on images, but the data set has a column of codes.")
    return image_rows(args.data, args.augment if augment else None, dataset, image_shape[1:], image_shape[0])


def identify(args: Arguments, config: Mapping[str, Any], rows: Rows) -> RunIdentity:
    """What a run that is resumed must have in common with its checkpoint."""
    parts = {"ema_decay > 0": args.optimizer.ema_decay > 0}
    parts["adversarial_weight > 0"] = args.adversary.adversarial_weight > 0
    arguments = public_arguments(*args[:-1])
    return make_identity(arguments, FIXED_ARGUMENTS, config, ["scaling_factor"], **parts, train_data_rows=rows.number)


def make_model(args: Arguments, config: Mapping[str, Any]) -> AutoencoderKL:
    if args.script.pretrained_autoencoder is None:
        autoencoder = AutoencoderKL(**config)
    else:
        autoencoder = AutoencoderKL.from_pretrained(args.script.pretrained_autoencoder, torch_dtype=torch.float32)
        autoencoder.register_to_config(**{name: config[name] for name in FREE_FIELDS})
    if args.run.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    return autoencoder.train()


# --------------------------------------------------------------------------------------------------------------------
# Results


@torch.no_grad()
def set_scaling_factor(autoencoder: AutoencoderKL, run: TrainingRun, batches: TrainingBatches, seed: int) -> None:
    """Write 1 / the latents' standard deviation into the configuration: of the validation, or of training images."""
    deviation = run.log.last("validation_latent_std")
    if deviation is None:
        images = batches.first_items(SCALING_IMAGES)["pixel_values"].split(run.batch_size)
        generator = position_generator(seed, 0, POSTERIOR_STREAM)
        posteriors = [autoencoder.encode(part.to(autoencoder.device)).latent_dist for part in images]
        deviation = torch.cat([posterior.sample(generator) for posterior in posteriors]).std().item()
    autoencoder.register_to_config(scaling_factor=1 / deviation)


def describe(args: Arguments, autoencoder: AutoencoderKL, run: TrainingRun) -> None:
    """Plot the training's curves and write the model card."""
    marks = {"discriminator": args.adversary.discriminator_start} if args.adversary.adversarial_weight > 0 else {}
    write_autoencoder_kl_card(
        args.run.output_dir,
        autoencoder,
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
    config = autoencoder_kl_config(given_fields(args.model), args.script.pretrained_autoencoder)
    image_shape = config["in_channels"], config["sample_size"], config["sample_size"]
    train_rows, validation_rows = load_image_rows(args.data, args.run, partial(make_row_reader, args, image_shape))

    seed, batch_size, max_steps = args.run.seed, args.data.train_batch_size, args.run.max_train_steps
    accelerator = make_accelerator(args.run, batch_size, args.optimizer.max_grad_norm)
    run = TrainingRun(args.run, accelerator, "train_autoencoder_kl", batch_size, identify(args, config, train_rows))
    set_seed(seed, device_specific=True)
    # Before anything is prepared, which may draw random numbers where there are several processes.
    autoencoder = make_model(args, config)
    batches, validation = make_batches(args.data, seed, accelerator, train_rows, validation_rows)
    measures = make_measures(args.objective, args.frechet, image_shape, accelerator.device)
    objective, adversary = KLObjective(args.objective, measures[0]), None
    if args.adversary.adversarial_weight > 0:
        adversary = make_adversary(
            args.adversary, image_shape, args.optimizer, accelerator, batch_size, max_steps, seed
        )
    if args.hub.push_to_hub and accelerator.is_main_process:
        args.hub.hub_model_id = create_repository(args.run.output_dir, args.hub.hub_model_id)
    model = AutoencoderKLWithPosterior(autoencoder)
    optimization = Optimization(accelerator, autoencoder, args.optimizer, max_steps, model)
    parts = {"model": autoencoder, "optimization": optimization, "batches": batches}
    if adversary is not None:
        parts |= {"discriminator": adversary.bare_discriminator, "adversary": adversary}

    with run.started(parts, public_arguments(*args)):
        for batch in run.until_the_end(batches):
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            judge = adversary if adversary is not None and adversary.is_active(run.step) else None
            with accelerator.accumulate(optimization.model, *([] if judge is None else [judge.discriminator])):
                noise = position_generator(seed, run.position, POSTERIOR_STREAM)
                sample, posterior = optimization.model(pixel_values, noise)
                reconstruction, kl_loss, metrics = objective(sample, posterior, pixel_values)
                losses, last_layer = (reconstruction, kl_loss), autoencoder.decoder.conv_out.weight
                loss, judged = minimize_reconstruction(
                    optimization, judge, (pixel_values, sample), losses, last_layer, run
                )
            run.add(loss, **metrics, **judged)
            if not accelerator.sync_gradients:
                continue

            if judge is not None:
                judge.finish_step()
            optimization.finish_step()
            run.finish_step(
                optimization.learning_rate, optimization.gradient_norm, broken_images=batches.broken_images
            )
            if validation is not None and run.is_due(args.run.validation_steps):
                with optimization.averaged():
                    noise = position_generator(seed, 0, POSTERIOR_STREAM)
                    measured = measure_autoencoder_kl(autoencoder, validation, accelerator, noise, *measures)
                run.write_validation(*measured)
            run.save_if_due()

        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with optimization.averaged(), run.writing():
                if args.model.scaling_factor is None and args.script.pretrained_autoencoder is None:
                    set_scaling_factor(autoencoder, run, batches, seed)
                autoencoder.save_pretrained(args.run.output_dir)
                use_umask(args.run.output_dir)
            describe(args, autoencoder, run)
            if args.hub.push_to_hub:
                push_result(args.run.output_dir, args.hub.hub_model_id)


if __name__ == "__main__":
    main()
