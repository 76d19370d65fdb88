# SPDX-License-Identifier: Apache-2.0
"""
Train a VAR transformer (Tian et al. 2024) on your images, or on their codes, with a trained tokenizer.

The first argument may be a recipe, a YAML file of arguments; the command line overrides it. All fields of `VARConfig` are
arguments; those that it shares with the tokenizer are taken from there. The result is a folder for
`VARPipeline.from_pretrained`, in raster order (`--block_sizes 1 1 ...`) for `ARPipeline.from_pretrained`.

On one or many GPUs, from codes that tokenize_dataset.py made:

    accelerate launch examples/train_var.py examples/recipes/var_d16_256.yaml --train_data "codes/train/*.parquet" \
        --vqvae user/vqvae --output_dir outputs/var --mixed_precision bf16

On a laptop's CPU, in a minute, after the commands in train_vqvae.py:

    python examples/train_var.py examples/recipes/var_digits.yaml --max_train_steps 500 --augmented_copies 8
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image

from hf_var import ARPipeline, VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel, data
from hf_var.autoencoders import load_tokenizer
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, public_arguments
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.data import AugmentConfig, DataConfig
from hf_var.hub.cards import write_pipeline_card
from hf_var.hub.push import BackgroundPush, PipelineHubConfig, create_repository, push_result
from hf_var.pipelines.base import load_pipeline
from hf_var.pipelines.image_grids import image_grid
from hf_var.ranges import CheckedFields, NonNegativeInt, OneOf, PositiveFloat, Share, argument, own_annotations
from hf_var.training.accelerator import make_accelerator
from hf_var.training.flops import training_flops
from hf_var.training.identity import RunIdentity, make_identity
from hf_var.training.lora import LoraFields, add_lora, save_lora
from hf_var.training.optimization import SCHEDULERS, Optimization, OptimizerConfig
from hf_var.training.prior_data import ConditionConfig, PriorData, adopt_fields, load_prior_data, tokenize_copies
from hf_var.training.prior_inputs import check_blocks, prior_inputs
from hf_var.training.prior_training import CAPTIONS, CURVES, METRICS, train_prior
from hf_var.training.run import RunConfig, TrainingRun
from hf_var.training.samples import SAMPLING, SampleConfig, spread_labels
from hf_var.training.setup import Rows, card_contents, make_batches
from hf_var.training.sharding import whole_model


# Fields of the configuration that may change when a trained transformer is trained further.
FREE_CONFIG_FIELDS = ("dropout", "attention_dropout", "drop_path_rate", "class_dropout_prob", "label_smoothing")
# What a resumed run cannot change, beside the configuration.
FIXED_ARGUMENTS = ("seed", "streaming", "augmented_copies", "lora_rank", "lora_alpha", "lora_target_modules")
# Folder of the adapter in that of the result.
LORA_FOLDER = "lora"


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass(kw_only=True)
class ScriptConfig(CheckedFields):
    """Arguments of this script alone."""

    vqvae: str | None = argument(None, help="folder or repository of the tokenizer; default: that of pretrained_var")
    pretrained_var: str | None = argument(
        None, help="folder or repository of a pipeline whose transformer is trained further"
    )
    augmented_copies: NonNegativeInt = argument(
        0, help="tokenize this many augmented copies of each image first; 0: tokenize every batch anew"
    )
    attn_implementation: str = argument("blockwise_sdpa", help="blockwise_sdpa, sdpa, flex_attention or eager")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vqvae is None and self.pretrained_var is None:
            raise ValueError("`vqvae` must name the folder or the repository of a trained tokenizer.")


@dataclass(kw_only=True)
class VAROptimizerConfig(OptimizerConfig):
    """The paper's optimizer (Tian et al. 2024, section 5), whose learning rate grows with the batch."""

    learning_rate: PositiveFloat | None = argument(
        None, help="largest learning rate; default: base_learning_rate * images of a step / 256"
    )
    base_learning_rate: PositiveFloat = argument(1e-4, help="largest learning rate for 256 images a step")
    lr_scheduler: Annotated[str, OneOf(*SCHEDULERS)] = argument("linear", help=", ".join(SCHEDULERS))
    lr_final_ratio: Share = argument(
        0.1, help="a linear or cosine decay ends at this share of the largest learning rate"
    )

    def learning_rate_of(self, images_per_step: int) -> float:
        """The largest learning rate, as it is given or as it follows from the images of a step."""
        return self.learning_rate or self.base_learning_rate * images_per_step / 256


class Arguments(NamedTuple):
    """The configuration of each component. Their fields are the arguments of the command line."""

    script: ScriptConfig
    conditions: ConditionConfig
    data: DataConfig
    augment: AugmentConfig
    run: RunConfig
    optimizer: VAROptimizerConfig
    lora: LoraFields
    samples: SampleConfig
    hub: PipelineHubConfig
    model: config_fields_class(VARConfig)


def read_arguments(argv: Sequence[str]) -> Arguments:
    args = Arguments(*parse_arguments(list(Arguments.__annotations__.values()), argv))
    if args.lora.lora_rank > 0 and args.script.pretrained_var is None:
        raise ValueError(f"`lora_rank` = {args.lora.lora_rank} adapts a trained transformer: set `pretrained_var`.")
    return args


# --------------------------------------------------------------------------------------------------------------------
# Model


def load_models(args: Arguments) -> tuple[VQVAEModel, VARTransformer | None, dict[str, float]]:
    """The tokenizer, the transformer that is trained further, if there is one, and the defaults of sampling."""
    pretrained, sampling = None, {}
    if args.script.pretrained_var is not None:
        pretrained = load_pipeline(args.script.pretrained_var, dtype=torch.float32)
        if not isinstance(pretrained.priors[0], VARTransformer):
            raise ValueError(
                f"`pretrained_var` must be a pipeline of a VARTransformer, got a {type(pretrained.priors[0]).__name__}."
            )
        if args.lora.lora_rank > 0 and not isinstance(pretrained, VARPipeline):
            raise ValueError(f"`lora_rank` must be 0 for a transformer of raster order, got {args.lora.lora_rank}.")
        sampling = {name: pretrained.config[name] for name in SAMPLING}
    sampling |= args.samples.defaults
    if args.script.vqvae is None:
        vqvae = pretrained.vqvae
    else:
        vqvae = load_tokenizer(args.script.vqvae, dtype=torch.float32)
        if not isinstance(vqvae, VQVAEModel):
            raise ValueError(
                f"`vqvae` must be a VQVAEModel, got a {type(vqvae).__name__}, which has no running latents."
            )
    return vqvae.eval().requires_grad_(False), pretrained and pretrained.priors[0], sampling


def make_config(
    args: Arguments,
    tokenizer: VQVAEConfig,
    images: PriorData,
    pretrained: VARTransformer | None = None,
) -> VARConfig:
    """Configuration of the transformer: that of the arguments and the tokenizer, or `pretrained`'s with other labels."""
    given = given_fields(args.model)
    shared = {name: getattr(tokenizer, name) for name in ("codebook_size", "latent_channels", "patch_nums")}
    adopt_fields(given, shared, "the tokenizer")
    adopt_fields(given, {"condition_channels": images.condition_size}, "`condition_column`")
    values = given
    if pretrained is not None:
        values = {name: getattr(pretrained.config, name) for name in own_annotations(VARConfig)}
        for name, value in given.items():
            if name not in FREE_CONFIG_FIELDS and values[name] != value:
                raise ValueError(f"`{name}` is {values[name]} in `pretrained_var`, got {value}.")
        values |= given
    id2label = images.id2label
    config = VARConfig(num_labels=0, **values) if id2label is None else VARConfig(id2label=id2label, **values)
    check_blocks(config)
    return config


def make_transformer(args: Arguments, config: VARConfig, pretrained: VARTransformer | None) -> VARTransformer:
    """A new transformer, or `pretrained` with the labels of `config`."""
    if pretrained is None:
        transformer = VARTransformer(config)
    else:
        # Dropout is built in.
        adapted = copy.deepcopy(pretrained.config)
        for name in FREE_CONFIG_FIELDS:
            setattr(adapted, name, getattr(config, name))
        transformer = VARTransformer(adapted)
        transformer.load_state_dict(pretrained.state_dict())
        if adapted.id2label != config.id2label:
            transformer.set_labels(config.id2label or None)
    transformer.set_attn_implementation(args.script.attn_implementation)
    if args.run.gradient_checkpointing:
        enable_activation_checkpointing(transformer)
    if args.lora.lora_rank > 0:
        lora = args.lora
        add_lora(transformer, lora.lora_rank, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules)
    return transformer.train()


def identify(args: Arguments, config: VARConfig, vqvae: VQVAEModel, rows: Rows) -> RunIdentity:
    """What a run that is resumed must have in common with its checkpoint."""
    parts = {"ema_decay > 0": args.optimizer.ema_decay > 0, "labels": config.id2label}
    parts |= {"vqvae (its fingerprint)": data.tokenizer_fingerprint(vqvae), "train_data_rows": rows.number}
    arguments = public_arguments(*args[:-1])
    return make_identity(arguments, FIXED_ARGUMENTS, config, FREE_CONFIG_FIELDS, **parts)


# --------------------------------------------------------------------------------------------------------------------
# Samples and results


def first_metrics(args: Arguments, vqvae: VQVAEModel, transformer: VARTransformer, run: TrainingRun) -> dict[str, Any]:
    """What the log begins with: what trainings of different sizes are compared by."""
    config, validation_data = transformer.config, args.data.validation_data
    return {
        "num_parameters": transformer.num_parameters(),
        "flops_per_step": training_flops(config) * run.images_per_step,
        "tokenizer": data.tokenizer_fingerprint(vqvae),
        "length": config.length,
        "validation_data": None if validation_data is None else Path(validation_data).name,
    }


def make_pipeline(
    transformer: VARTransformer, vqvae: VQVAEModel, sampling: dict[str, float]
) -> VARPipeline | ARPipeline:
    """What samples, with its defaults: scale by scale or, in raster order, code by code."""
    if transformer.config.is_raster:
        pipeline = ARPipeline(vqvae, transformer, **sampling)
    else:
        pipeline = VARPipeline(transformer, vqvae, **sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(
    args: Arguments, pipeline: VARPipeline | ARPipeline, batches: data.TrainingBatches, accelerator: Accelerator
) -> Image.Image:
    """Images of classes from the first to the last, or of the embeddings of the first training images."""
    number = args.samples.num_samples
    generators = [torch.Generator().manual_seed(args.run.seed + index) for index in range(number)]
    if args.conditions.condition_column is not None:
        condition = {"class_embeds": batches.first_items(number)["class_embeds"]}
    else:
        condition = {"class_labels": spread_labels(pipeline.priors[0].config.num_labels, number)}
    with accelerator.autocast():
        return image_grid(pipeline(**condition, generator=generators).images, columns=8)


def whole_transformer(args: Arguments, transformer: VARTransformer) -> VARTransformer | None:
    """`transformer`, or if it is sharded a whole copy, in the first process alone; for all processes together."""
    return whole_model(transformer, lambda: make_transformer(args, transformer.config, None))


def save(
    args: Arguments,
    transformer: VARTransformer,
    vqvae: VQVAEModel,
    sampling: dict[str, float],
    folder: Path,
    is_final: bool = False,
) -> VARPipeline | ARPipeline | None:
    """Save a pipeline. Adapters are saved alone while they are trained, and become part of the final weights as well."""
    if args.lora.lora_rank > 0:
        save_lora(transformer, folder / LORA_FOLDER)
        if not is_final:
            return None
    pipeline = make_pipeline(transformer, vqvae, sampling)
    if args.lora.lora_rank > 0:
        pipeline.fuse_lora()
    pipeline.save_pretrained(str(folder))
    return pipeline


def describe(args: Arguments, pipeline: VARPipeline | ARPipeline, run: TrainingRun) -> None:
    """Plot the training's curves and write the model card."""
    write_pipeline_card(
        args.run.output_dir,
        pipeline,
        public_arguments(*args[:-1], given_fields(args.model)),
        **card_contents(run, METRICS, CURVES, CAPTIONS),
        repo_id=args.hub.hub_model_id,
        license=args.hub.license,
        data_license=args.hub.data_license,
    )


# --------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(sys.argv[1:] if argv is None else argv)

    # Everything that can be wrong with the input is found before any work.
    vqvae, pretrained, sampling = load_models(args)
    known_labels = pretrained and pretrained.config.id2label
    images = load_prior_data(args.data, args.augment, args.conditions, args.run, vqvae, known_labels)
    config = make_config(args, vqvae.config, images, pretrained)

    seed, batch_size = args.run.seed, args.data.train_batch_size
    accelerator = make_accelerator(args.run, batch_size, args.optimizer.max_grad_norm)
    identity = identify(args, config, vqvae, images.train)
    run = TrainingRun(args.run, accelerator, "train_var", batch_size, identity, tokens_per_image=config.length)
    args.optimizer.learning_rate = args.optimizer.learning_rate_of(run.images_per_step)
    # A sharded model takes a part of its first weights from every process.
    set_seed(seed)
    transformer = make_transformer(args, config, pretrained)
    set_seed(seed, device_specific=True)
    pipeline = make_pipeline(transformer, vqvae.to(accelerator.device), sampling)
    if args.hub.push_to_hub and accelerator.is_main_process:
        args.hub.hub_model_id = create_repository(args.run.output_dir, args.hub.hub_model_id)
        pusher = BackgroundPush(args.hub.hub_model_id, args.run.output_dir)

    show_progress = accelerator.is_local_main_process
    train_rows = tokenize_copies(images.train, args.script.augmented_copies, args.data, seed, vqvae, show_progress)
    batches, validation = make_batches(args.data, seed, accelerator, train_rows, images.validation)
    make_inputs = partial(prior_inputs, vqvae, is_raster=config.is_raster)
    optimization = Optimization(accelerator, transformer, args.optimizer, args.run.max_train_steps)

    parts = {"model": transformer, "optimization": optimization, "batches": batches}
    with run.started(parts, public_arguments(*args)):
        if accelerator.is_main_process and run.log.last("num_parameters") is None:
            run.write(first_metrics(args, vqvae, transformer, run))
        for _ in train_prior(run, optimization, batches, validation, make_inputs):
            is_sampled = args.samples.num_samples > 0 and run.is_due(args.samples.sample_steps)
            is_pushed = args.hub.push_steps > 0 and run.step % args.hub.push_steps == 0 and not run.is_finished
            if is_sampled or is_pushed:
                with optimization.averaged():
                    if is_sampled:
                        # In all processes, whose parts of a sharded model are needed.
                        run.write_image("samples", sample_images(args, pipeline, batches, accelerator))
                    if is_pushed:
                        whole = whole_transformer(args, transformer)
                        if accelerator.is_main_process:
                            pusher.push(partial(save, args, whole, vqvae, sampling), f"Step {run.step}")
                run.restart_clock()

        accelerator.wait_for_everyone()
        with optimization.averaged():
            whole = whole_transformer(args, transformer)
            if accelerator.is_main_process:
                with run.writing():
                    saved = save(args, whole, vqvae, sampling, Path(args.run.output_dir), is_final=True)
                describe(args, saved, run)
                if args.hub.push_to_hub:
                    pusher.finish()
                    push_result(args.run.output_dir, args.hub.hub_model_id)


if __name__ == "__main__":
    main()
