# SPDX-License-Identifier: Apache-2.0
"""
Train a multi-scale VQ-VAE, the tokenizer of VAR (Tian et al. 2024, section 3.2), on your images.

The first argument may be a recipe, a YAML file of arguments; the command line counts more. All fields of `VQVAEConfig` are
arguments. The result is a folder for `VQVAEModel.from_pretrained` and for `--vqvae` of train_var.py.

On one or many GPUs:

    accelerate launch examples/train_vqvae.py examples/recipes/vqvae_imagenet256.yaml --train_data user/images \
        --output_dir outputs/vqvae --mixed_precision bf16

On a laptop's CPU, in a minute:

    python examples/prepare_digits.py data/digits
    python examples/train_vqvae.py examples/recipes/vqvae_digits.yaml --max_train_steps 800 --unquantized_steps 100
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hf_var import VQVAEConfig, VQVAEModel, data
from hf_var.autoencoders import VQVAEOutput
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.hub.cards import write_model_card
from hf_var.hub.push import create_repository, push_result
from hf_var.metrics.codebook_usage import CodeStatistics, residual_energy
from hf_var.metrics.feature_extractors import load_feature_extractor
from hf_var.metrics.perceptual import PerceptualLoss
from hf_var.metrics.reconstruction import measure_reconstruction
from hf_var.metrics.reconstruction_plots import RECONSTRUCTION_CAPTION, USAGE_CAPTION
from hf_var.training import codebook
from hf_var.training.adversary import make_adversary
from hf_var.training.arguments import (
    AdversaryArguments,
    TrainingArguments,
    given_config_fields,
    parse_arguments,
    with_config_fields,
)
from hf_var.training.curves import curves_plot
from hf_var.training.losses import reconstruction_loss
from hf_var.training.optimization import (
    AveragedWeights,
    averaged_weights,
    make_optimizer,
    make_scheduler,
    restart_average,
    schedule_weight_decay,
)
from hf_var.training.run import TrainingRun, make_accelerator


# What is drawn of the log, where the run has it.
CURVES = ("reconstruction_loss", "adversarial_weight", "usage", "validation_psnr")
# What may be changed in fine-tuning: all else belongs to the weights.
FREE_CONFIG_FIELDS = ("dropout", "commitment_loss_weight", "codebook_loss_weight")


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass
class VQVAETrainingArguments(AdversaryArguments, TrainingArguments):
    """Arguments of this script alone."""

    pretrained_vqvae: str | None = field(default=None, metadata={"help": "folder or repository to start from"})
    channels_last: bool = field(default=False, metadata={"help": "memory format of the convolutions"})

    # Reconstruction
    l1_weight: float = field(default=0.0, metadata={"help": "weight of the mean absolute error of the pixels"})
    l2_weight: float = field(default=1.0, metadata={"help": "weight of the mean squared error of the pixels"})
    lpips_weight: float = field(default=0.0, metadata={"help": "weight of the perceptual distance LPIPS"})
    lpips_weights: str | None = field(
        default=None,
        metadata={"help": "file of torchvision's VGG16 weights; default: downloaded; random: for tests"},
    )
    quantizer_weight: float = field(default=1.0, metadata={"help": "weight of the codebook and commitment terms"})

    # Codebook
    unquantized_steps: int = field(
        default=0, metadata={"help": "first steps, in which the features are not quantized"}
    )
    kmeans_images: int = field(
        default=0, metadata={"help": "images for a k-means start of the codebook after unquantized_steps; 0: none"}
    )
    codebook_update: str = field(default="gradient", metadata={"help": "gradient, or ema for moving averages"})
    codebook_decay: float = field(default=0.99, metadata={"help": "of the moving averages"})
    codebook_window: int = field(
        default=100, metadata={"help": "steps over which the codes' use is counted before dead ones are moved"}
    )
    restart_until: float = field(
        default=0.0, metadata={"help": "move dead codes during this share of the training; 0: never"}
    )
    restart_threshold: float = field(
        default=0.03, metadata={"help": "dead: chosen less than this many times as often as the average code"}
    )

    # Validation
    rfid_extractor: str | None = field(
        default=None, metadata={"help": "inception, or package.module:function that makes another extractor"}
    )
    rfid_weights: str | None = field(default=None, metadata={"help": "file of the weights of inception"})

    def __post_init__(self):
        super().__post_init__()
        if self.l1_weight < 0 or self.l2_weight < 0 or self.l1_weight + self.l2_weight == 0:
            raise ValueError(
                "`l1_weight` and `l2_weight` must be at least 0, and one of them positive, got "
                f"{self.l1_weight} and {self.l2_weight}."
            )
        for name in ("quantizer_weight", "lpips_weight", "unquantized_steps", "kmeans_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.codebook_update not in ("gradient", "ema"):
            raise ValueError(f"`codebook_update` must be gradient or ema, got {self.codebook_update!r}.")
        if not 0 <= self.codebook_decay < 1:
            raise ValueError(f"`codebook_decay` must be at least 0 and below 1, got {self.codebook_decay}.")
        if self.codebook_window < 1:
            raise ValueError(f"`codebook_window` must be at least 1, got {self.codebook_window}.")
        for name in ("restart_until", "restart_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a share from 0 to 1, got {getattr(self, name)}.")
        for name in ("unquantized_steps", *(["discriminator_start"] if self.adversarial_weight > 0 else [])):
            if getattr(self, name) >= self.max_train_steps:
                raise ValueError(f"`{name}` must be below `max_train_steps`, got {getattr(self, name)}.")
        if self.pretrained_vqvae is not None and self.kmeans_images + self.unquantized_steps > 0:
            raise ValueError("`kmeans_images` and `unquantized_steps` would undo `pretrained_vqvae`: set both to 0.")
        if self.adversarial_weight > 0 and self.torch_compile:
            raise ValueError(
                "`torch_compile` cannot go with `adversarial_weight`, which takes several gradients of a graph."
            )
        if self.adversarial_weight > 0 and self.mixed_precision == "fp16":
            raise ValueError("`mixed_precision` fp16 has one loss scale, too few for two players: take bf16.")
        if self.validation_data is None and self.rfid_extractor is not None:
            raise ValueError(f"`rfid_extractor` = {self.rfid_extractor!r} needs `validation_data`.")
        if self.rfid_extractor is None and self.rfid_weights is not None:
            raise ValueError(f"`rfid_weights` = {self.rfid_weights!r} needs `rfid_extractor`.")


def make_config(args: VQVAETrainingArguments) -> VQVAEConfig:
    given = given_config_fields(args, VQVAEConfig)
    if args.pretrained_vqvae is None:
        config = VQVAEConfig(**given)
        check_codebook_options(args, config)
        if config.num_output_channels != config.in_channels:
            raise ValueError(
                f"`out_channels` must be `in_channels` = {config.in_channels}, got {config.out_channels}."
            )
        if args.kmeans_images > 0 and codebook.kmeans_vectors(config, args.kmeans_images) < config.codebook_size:
            raise ValueError(
                f"`kmeans_images` = {args.kmeans_images} gives {codebook.kmeans_vectors(config, args.kmeans_images)} "
                f"vectors, too few for `codebook_size` = {config.codebook_size}."
            )
        return config
    config = VQVAEConfig.from_pretrained(args.pretrained_vqvae)
    for name, value in given.items():
        if name in FREE_CONFIG_FIELDS:
            setattr(config, name, value)
        elif getattr(config, name) != value:
            raise ValueError(f"`{name}` is {getattr(config, name)} in `pretrained_vqvae`, got {value}.")
    check_codebook_options(args, config)
    return config


def check_codebook_options(args: VQVAETrainingArguments, config: VQVAEConfig) -> None:
    """Raise a `ValueError` if code vectors are to be moved that are no weights."""
    for name, value in {"kmeans_images": 0, "restart_until": 0.0, "codebook_update": "gradient"}.items():
        if not config.has_trainable_codes and getattr(args, name) != value:
            raise ValueError(
                f"`{name}` must be {value} with quantizer={config.quantizer!r}, whose code vectors are fixed, got "
                f"{getattr(args, name)!r}."
            )


# --------------------------------------------------------------------------------------------------------------------
# Data, model and adversary


def make_row_reader(args: VQVAETrainingArguments, config: VQVAEConfig, dataset, augment: bool):
    if data.is_codes_dataset(dataset):
        raise ValueError("A tokenizer is trained on images, but the data set has a column of codes.")
    return data.image_rows(args, args if augment else None, dataset, config.image_size, config.in_channels)


def make_model(args: VQVAETrainingArguments, config: VQVAEConfig) -> VQVAEModel:
    if args.pretrained_vqvae is None:
        vqvae = VQVAEModel(config)
    else:
        vqvae = VQVAEModel.from_pretrained(args.pretrained_vqvae, config=config, dtype=torch.float32)
    if args.gradient_checkpointing:
        enable_activation_checkpointing(vqvae)
    return vqvae.train()


# --------------------------------------------------------------------------------------------------------------------
# Codebook


def start_codebook(
    args: VQVAETrainingArguments, vqvae: VQVAEModel, batches: data.TrainingBatches, accelerator: Accelerator
) -> None:
    """k-means on the features of the first images."""
    pixel_values = batches.first_items(args.kmeans_images)["pixel_values"]
    vqvae.eval()
    with torch.no_grad(), accelerator.autocast():
        parts = [part.to(accelerator.device) for part in pixel_values.split(args.train_batch_size)]
        features = torch.cat([vqvae.encode(part).features for part in parts])
    vqvae.train()
    codebook.initialize_codebook(vqvae, features, args.seed)


def restart_averages(
    vqvae: VQVAEModel,
    average: AveragedWeights | None,
    moving_average: codebook.MovingAverageCodebook | None,
    codes: torch.Tensor | None = None,
) -> None:
    """Codes that jumped (all, if `None`) are not averaged with what they were before."""
    if moving_average is not None:
        moving_average.restart(codes)
    if average is not None:
        restart_average(average, vqvae, vqvae.codebook.vectors, codes)


def codes_figures(
    vqvae: VQVAEModel, statistics: CodeStatistics, output: VQVAEOutput, accelerator: Accelerator, window: int
) -> dict[str, float]:
    """How the codes were used since the last window, for the log, and for the buffer that travels with the weights."""
    figures = statistics.compute()
    energy = accelerator.reduce(residual_energy(vqvae, output.features, output.codes), reduction="sum")
    for scale, left in enumerate((energy[1:] / energy[0]).tolist()):
        figures[f"residual_energy_{scale}"] = left
    vqvae.codebook.running_hits.copy_(statistics.hits / window)
    return figures


# --------------------------------------------------------------------------------------------------------------------
# Training


def describe(args: VQVAETrainingArguments, vqvae: VQVAEModel, run: TrainingRun) -> None:
    """Draw the training's curves and write the model card."""
    curves = [name for name in CURVES if run.log.last(name) is not None]
    marks = {"quantizer": args.unquantized_steps} if args.unquantized_steps > 0 else {}
    if args.adversarial_weight > 0:
        marks["discriminator"] = args.discriminator_start
    run.write_picture("curves", curves_plot(run.log.path, curves, marks))
    metrics = {name: run.log.last(f"validation_{name}") for name in ("psnr", "ssim", "lpips", "rfid", "usage")}
    captions = {
        "reconstructions.png": RECONSTRUCTION_CAPTION,
        "codes.png": USAGE_CAPTION,
        "curves.png": "The training.",
    }
    recipe = asdict(args) | given_config_fields(args, VQVAEConfig)
    write_model_card(
        args.output_dir,
        vqvae,
        {name: value for name, value in recipe.items() if value not in (None, [])},
        metrics={name: value for name, value in metrics.items() if value is not None},
        pictures={name: text for name, text in captions.items() if (Path(args.output_dir) / name).is_file()},
        repo_id=args.hub_model_id,
        license=args.license,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(
        with_config_fields(VQVAETrainingArguments, VQVAEConfig), sys.argv[1:] if argv is None else argv
    )

    # Everything that can be wrong with the input is found before any work.
    config = make_config(args)
    train_data = data.load_source("train_data", args.train_data, args.train_split, ["train"], args.streaming)
    train_rows = make_row_reader(args, config, train_data, augment=True)
    if args.validation_data is not None:
        validation_data = data.load_source(
            "validation_data", args.validation_data, args.validation_split, ["validation", "test"], args.streaming
        )
        validation_rows = make_row_reader(args, config, validation_data, augment=False)

    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    # Before anything is prepared, which may draw random numbers where there are several processes.
    vqvae = make_model(args, config)
    shares = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    batches = data.TrainingBatches(train_data, train_rows, args, args.seed, **shares)
    validation = None
    if args.validation_data is not None:
        validation = data.ValidationBatches(validation_data, validation_rows, args, **shares)
    perceptual_loss, feature_extractor, adversary = None, None, None
    if args.lpips_weight > 0 or args.lpips_weights is not None:
        perceptual_loss = PerceptualLoss(config.num_output_channels, config.image_size, args.lpips_weights)
        perceptual_loss.to(accelerator.device)
    if args.rfid_extractor is not None:
        feature_extractor = load_feature_extractor(args.rfid_extractor, args.rfid_weights).to(accelerator.device)
    if args.adversarial_weight > 0:
        adversary, judge_optimizer = make_adversary(args, config, accelerator)
        judge_scheduler = make_scheduler(judge_optimizer, args, args.discriminator_start)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_repository(args.output_dir, args.hub_model_id)
    run = TrainingRun(accelerator, args, "train_vqvae")

    vqvae.codebook.requires_grad_(args.codebook_update == "gradient")
    if args.channels_last:
        vqvae.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(vqvae, args)
    scheduler = make_scheduler(optimizer, args)
    model, optimizer = accelerator.prepare(codebook.VQVAEWarmup(vqvae), optimizer)
    average = AveragedWeights(vqvae, args.ema_decay) if args.ema_decay > 0 else None
    moving_average = None
    if args.codebook_update == "ema":
        moving_average = codebook.MovingAverageCodebook(vqvae, args.codebook_decay)
    statistics = CodeStatistics(config, accelerator.device)
    parts = [scheduler, batches, statistics, moving_average, average]
    if adversary is not None:
        parts += [adversary, judge_scheduler]
    accelerator.register_for_checkpointing(*(part for part in parts if part is not None))
    run.resume()

    stream = iter(batches)
    while not run.is_finished:
        pixel_values = next(stream)["pixel_values"].to(accelerator.device, non_blocking=True)
        if args.channels_last:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if run.step == args.unquantized_steps and run.begins_step and args.kmeans_images > 0:
            start_codebook(args, vqvae, batches, accelerator)
            restart_averages(vqvae, average, moving_average)
        is_judged = adversary is not None and adversary.is_active(run.step)
        with accelerator.accumulate(model, *([adversary.discriminator] if is_judged else [])):
            output = model(pixel_values, quantize=run.step >= args.unquantized_steps)
            reconstruction = reconstruction_loss(output.sample, pixel_values, args.l1_weight, args.l2_weight)
            figures = {"reconstruction_loss": reconstruction, "quantizer_loss": output.loss}
            if output.codes is not None:
                statistics.count(output.codes)
                if moving_average is not None:
                    moving_average.observe(output.quantizer_inputs, output.codes)
            if args.lpips_weight > 0:
                figures["lpips_loss"] = perceptual_loss(output.sample, pixel_values).mean()
                reconstruction = reconstruction + args.lpips_weight * figures["lpips_loss"]
            loss = reconstruction + args.quantizer_weight * output.loss
            if is_judged:
                last_layer = vqvae.decoder.conv_out.weight
                judgement, judged = adversary.generator_loss(
                    output.sample, reconstruction, last_layer, step=run.step, position=run.position
                )
                loss = loss + judgement
                figures |= judged
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if is_judged:
                judge_loss, judged = adversary.discriminator_loss(
                    pixel_values, output.sample.detach(), position=run.position
                )
                figures |= judged
                accelerator.backward(judge_loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(adversary.discriminator.parameters(), args.max_grad_norm)
                judge_optimizer.step()
                judge_optimizer.zero_grad()
        run.add(loss, **figures)
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        if is_judged:
            adversary.finish_step()
            judge_scheduler.step()
        if moving_average is not None and output.codes is not None:
            moving_average.finish_step()
        if average is not None:
            average.step(vqvae.parameters())
        schedule_weight_decay(optimizer, args, run.step + 1)
        run.finish_step(scheduler.get_last_lr()[0], gradient_norm, broken_images=batches.broken_images)
        if output.codes is not None and run.step % args.codebook_window == 0:
            figures = codes_figures(vqvae, statistics, output, accelerator, args.codebook_window)
            run.write(figures)
            run.show(usage=f"{figures['usage']:.0%}")
            if run.step < args.restart_until * args.max_train_steps:
                hits = statistics.hits.sum(dim=0)
                moved = codebook.restart_dead_codes(
                    vqvae, hits, output.quantizer_inputs, args.seed + run.step, args.restart_threshold
                )
                restart_averages(vqvae, average, moving_average, moved)
            statistics.reset()
        if validation is not None and run.is_due(args.validation_steps):
            with averaged_weights(average, vqvae):
                figures, drawn = measure_reconstruction(
                    vqvae, validation, accelerator, perceptual_loss, feature_extractor
                )
            run.write({f"validation_{name}": value for name, value in figures.items()})
            for name, picture in drawn.items():
                run.write_picture(name, picture)
            run.restart_clock()
        run.save_if_due(vqvae, *([adversary.discriminator] if adversary is not None else []))

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged_weights(average, vqvae):
            vqvae.save_pretrained(args.output_dir)
        describe(args, vqvae, run)
        if args.push_to_hub:
            push_result(args.output_dir, args.hub_model_id)
    run.end()


if __name__ == "__main__":
    main()
