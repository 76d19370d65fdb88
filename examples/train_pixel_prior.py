# SPDX-License-Identifier: Apache-2.0
"""
Train a PixelCNN (van den Oord et al. 2016) or a PixelSNAIL (Chen et al. 2018) on your images, or on their codes, with a
trained tokenizer: the prior of a VQ-VAE, or of one level of a VQ-VAE-2.

The first argument may be a recipe, a YAML file of arguments; the command line overrides it. All fields of `PixelCNNConfig`, or
of `PixelSNAILConfig`, are arguments; those that the tokenizer decides are taken from there. The result of the finest level is
a folder for `ARPipeline.from_pretrained`, with the `--coarser_priors` in it; that of a coarser level is the prior alone.

On a laptop's CPU, in some minutes:

    python examples/prepare_digits.py data/digits
    python examples/train_vqvae.py examples/recipes/vqvae2_digits.yaml
    python examples/train_pixel_prior.py examples/recipes/pixelsnail_digits_top.yaml
    python examples/train_pixel_prior.py examples/recipes/pixelsnail_digits_bottom.yaml
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from transformers import AutoModel

from hf_var import ARPipeline, PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig, data
from hf_var.autoencoders import Tokenizer, load_tokenizer
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, public_arguments
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.conversion.common import check_overrides
from hf_var.data import AugmentConfig, DataConfig
from hf_var.hub.cards import write_pipeline_card, write_prior_card
from hf_var.hub.push import PipelineHubConfig, create_repository, push_result
from hf_var.pipelines.image_grids import image_grid
from hf_var.ranges import CheckedFields, NonNegativeInt, OneOf, argument
from hf_var.training.accelerator import make_accelerator
from hf_var.training.identity import RunIdentity, make_identity
from hf_var.training.optimization import Optimization, OptimizerConfig
from hf_var.training.prior_data import ConditionConfig, PriorData, load_prior_data, tokenize_copies
from hf_var.training.prior_inputs import level_inputs
from hf_var.training.prior_training import CAPTIONS, CURVES, METRICS, train_prior
from hf_var.training.run import RunConfig, TrainingRun
from hf_var.training.samples import SampleConfig, spread_labels
from hf_var.training.setup import card_contents, make_batches


PRIORS = {"pixelcnn": (PixelCNNConfig, PixelCNN), "pixelsnail": (PixelSNAILConfig, PixelSNAIL)}
# What a resumed run cannot change, beside the configuration.
FIXED_ARGUMENTS = ("seed", "streaming", "augmented_copies", "prior", "level", "coarser_priors")
FREE_CONFIG_FIELDS = ("dropout", "class_dropout_prob")


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass(kw_only=True)
class ScriptConfig(CheckedFields):
    """Arguments of this script alone."""

    vqvae: str = argument(help="folder or repository of the tokenizer")
    prior: Annotated[str, OneOf(*PRIORS)] = argument("pixelsnail", help=" or ".join(PRIORS))
    level: NonNegativeInt = argument(0, help="level of the tokenizer whose codes are modelled; 0 is the coarsest")
    coarser_priors: list[str] = field(
        default_factory=list, metadata={"help": "for the finest level: folders of the trained priors of the others"}
    )
    augmented_copies: NonNegativeInt = argument(
        0, help="tokenize this many augmented copies of each image first; 0: tokenize every batch anew"
    )


class Arguments(NamedTuple):
    """The configuration of each component. Their fields are the arguments of the command line."""

    script: ScriptConfig
    conditions: ConditionConfig
    data: DataConfig
    augment: AugmentConfig
    run: RunConfig
    optimizer: OptimizerConfig
    samples: SampleConfig
    hub: PipelineHubConfig
    model: config_fields_class(PixelSNAILConfig, PixelCNNConfig)


def read_arguments(argv: Sequence[str]) -> Arguments:
    args = Arguments(*parse_arguments(list(Arguments.__annotations__.values()), argv))
    if args.conditions.condition_column is not None:
        raise ValueError("`condition_column` is for train_var.py: a prior of convolutions is conditioned on classes.")
    if args.script.prior == "pixelcnn" and args.script.level > 0:
        raise ValueError(
            f"`level` must be 0 for `prior` pixelcnn, which reads no coarser level: take pixelsnail, got {args.script.level}."
        )
    if args.hub.push_steps > 0:
        raise ValueError(f"`push_steps` must be 0: the result is uploaded at the end, got {args.hub.push_steps}.")
    return args


# --------------------------------------------------------------------------------------------------------------------
# Models


def load_models(args: Arguments) -> tuple[Tokenizer, list[nn.Module]]:
    """The tokenizer, and the trained priors of the coarser levels for the pipeline that is saved."""
    vqvae = load_tokenizer(args.script.vqvae, dtype=torch.float32)
    levels, level, coarser = len(vqvae.config.patch_nums), args.script.level, args.script.coarser_priors
    if level >= levels:
        raise ValueError(f"`level` must be below the {levels} levels of `vqvae`, got {level}.")
    needed = level if level == levels - 1 else 0
    if len(coarser) != needed:
        raise ValueError(f"`coarser_priors` must be {needed} folders for level {level} of {levels}, got {coarser}.")
    priors = [AutoModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False) for folder in coarser]
    return vqvae.requires_grad_(False), priors


def make_config(args: Arguments, tokenizer: Any, images: PriorData) -> Any:
    """Configuration of the prior: that of the arguments, the tokenizer and the data."""
    config_class, _ = PRIORS[args.script.prior]
    given, level = given_fields(args.model), args.script.level
    shared = {"codebook_size": tokenizer.codebook_size, "map_size": tokenizer.scale_sizes[level]}
    if level > 0:
        shared["condition_map_size"] = tokenizer.scale_sizes[level - 1]
    check_overrides(config_class, {**shared, **given})
    for name in shared.keys() & given.keys():
        raise ValueError(f"`{name}` is {shared[name]} in the tokenizer: leave it out, got {given[name]!r}.")
    labels = {"num_labels": 0} if images.id2label is None else {"id2label": images.id2label}
    return config_class(**shared, **given, **labels)


def identify(args: Arguments, config: Any, vqvae: Tokenizer, images: PriorData) -> RunIdentity:
    """What a run that is resumed must have in common with its checkpoint."""
    parts = {"ema_decay > 0": args.optimizer.ema_decay > 0, "labels": config.id2label}
    parts |= {"vqvae (its fingerprint)": data.tokenizer_fingerprint(vqvae), "train_data_rows": images.train.number}
    free = [name for name in FREE_CONFIG_FIELDS if hasattr(config, name)]
    return make_identity(public_arguments(*args[:-1]), FIXED_ARGUMENTS, config, free, **parts)


def make_pipeline(args: Arguments, vqvae: Tokenizer, priors: Sequence[nn.Module]) -> ARPipeline | None:
    """What samples, if there is a prior for every level."""
    if len(priors) < len(vqvae.config.patch_nums):
        return None
    first, *middle, last = priors if len(priors) > 1 else (*priors, None)
    pipeline = ARPipeline(vqvae, first, *(middle or [None]), last, **args.samples.defaults)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(args: Arguments, pipeline: ARPipeline) -> Image.Image:
    """Images of classes from the first to the last."""
    number = args.samples.num_samples
    generators = [torch.Generator().manual_seed(args.run.seed + index) for index in range(number)]
    labels = spread_labels(len(pipeline.id2label), number)
    return image_grid(pipeline(labels, generator=generators).images, columns=8)


# --------------------------------------------------------------------------------------------------------------------
# Training


def save(args: Arguments, prior: nn.Module, pipeline: ARPipeline | None, run: TrainingRun) -> None:
    """Save the pipeline, or the prior of a coarser level, with its card."""
    with run.writing():
        (prior if pipeline is None else pipeline).save_pretrained(str(args.run.output_dir))
    contents = card_contents(run, METRICS, CURVES, CAPTIONS)
    recipe = public_arguments(*args[:-1], given_fields(args.model))
    contents |= {"repo_id": args.hub.hub_model_id, "license": args.hub.license}
    if pipeline is None:
        write_prior_card(args.run.output_dir, prior, recipe, **contents)
    else:
        write_pipeline_card(args.run.output_dir, pipeline, recipe, **contents, data_license=args.hub.data_license)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(sys.argv[1:] if argv is None else argv)

    # Everything that can be wrong with the input is found before any work.
    vqvae, coarser_priors = load_models(args)
    images = load_prior_data(args.data, args.augment, args.conditions, args.run, vqvae)
    config = make_config(args, vqvae.config, images)

    seed, batch_size = args.run.seed, args.data.train_batch_size
    accelerator = make_accelerator(args.run, batch_size, args.optimizer.max_grad_norm)
    identity = identify(args, config, vqvae, images)
    run = TrainingRun(args.run, accelerator, "train_pixel_prior", batch_size, identity, tokens_per_image=config.length)
    set_seed(seed)
    _, model_class = PRIORS[args.script.prior]
    prior = model_class(config).train()
    if args.run.gradient_checkpointing:
        enable_activation_checkpointing(prior)
    set_seed(seed, device_specific=True)
    device = accelerator.device
    pipeline = make_pipeline(args, vqvae.to(device), [*(coarser.to(device) for coarser in coarser_priors), prior])
    if args.hub.push_to_hub and accelerator.is_main_process:
        args.hub.hub_model_id = create_repository(args.run.output_dir, args.hub.hub_model_id)

    copies, show_progress = args.script.augmented_copies, accelerator.is_local_main_process
    train_rows = tokenize_copies(images.train, copies, args.data, seed, vqvae, show_progress)
    batches, validation = make_batches(args.data, seed, accelerator, train_rows, images.validation)
    make_inputs = partial(level_inputs, vqvae, args.script.level)
    optimization = Optimization(accelerator, prior, args.optimizer, args.run.max_train_steps)

    parts = {"model": prior, "optimization": optimization, "batches": batches}
    with run.started(parts, public_arguments(*args)):
        for _ in train_prior(run, optimization, batches, validation, make_inputs):
            number = args.samples.num_samples if pipeline is not None else 0
            if number > 0 and run.is_due(args.samples.sample_steps):
                with optimization.averaged():
                    run.write_image("samples", sample_images(args, pipeline))
                run.restart_clock()

        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with optimization.averaged():
                save(args, prior, pipeline, run)
            if args.hub.push_to_hub:
                push_result(args.run.output_dir, args.hub.hub_model_id)


if __name__ == "__main__":
    main()
