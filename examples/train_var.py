# SPDX-License-Identifier: Apache-2.0
"""
Train a VAR transformer (Tian et al. 2024) on your images, or on their codes, with a trained tokenizer.

The first argument may be a recipe, a YAML file of arguments; the command line overrides it. All fields of `VARConfig` are
arguments; those that it shares with the tokenizer are taken from there. The result is a folder for
`VARPipeline.from_pretrained`, in raster order (`--block_sizes 1 1 ...`) for `ARPipeline.from_pretrained`.

With `--caption_column` the condition is a text (Switti, Voronov et al. 2024): the fields are those of `TextVARConfig`, and the
result is a folder for `VARTextToImagePipeline.from_pretrained`, with the text encoder.

On one or many GPUs, from codes that tokenize_dataset.py made:

    accelerate launch examples/train_var.py examples/recipes/var_d16_256.yaml --train_data "codes/train/*.parquet" \
        --vqvae user/vqvae --output_dir outputs/var --mixed_precision bf16

On a laptop's CPU, in a minute, after the commands in train_vqvae.py:

    python examples/train_var.py examples/recipes/var_digits.yaml --max_train_steps 500 --augmented_copies 8

On your own pictures and captions, a folder with metadata.csv (file_name, text), from a released model:

    python examples/train_var.py examples/recipes/switti_512_finetune.yaml --train_data my_pictures --caption_column text
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image

from hf_var import (
    ARPipeline,
    TextVARConfig,
    TextVARTransformer,
    VARConfig,
    VARPipeline,
    VARTextToImagePipeline,
    VARTransformer,
    VQVAEModel,
    data,
)
from hf_var.autoencoders import load_tokenizer
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, public_arguments
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.conversion.common import check_overrides
from hf_var.data import AugmentConfig, DataConfig
from hf_var.hub.cards import write_pipeline_card
from hf_var.hub.push import BackgroundPush, PipelineHubConfig, create_repository, push_result
from hf_var.metrics.agreement import TextAgreement
from hf_var.pipelines.base import load_pipeline
from hf_var.pipelines.image_grids import image_grid
from hf_var.priors.costs import training_flops
from hf_var.ranges import CheckedFields, NonNegativeInt, OneOf, PositiveFloat, Share, argument, own_annotations
from hf_var.text_encoders import TextEncoders
from hf_var.training.accelerator import make_accelerator
from hf_var.training.captions import (
    CaptionConfig,
    CaptionInputs,
    caption_encoders,
    check_stored_embeddings,
    read_captions,
    stored_captions,
    trained_module,
)
from hf_var.training.identity import RunIdentity, make_identity
from hf_var.training.lora import LoraFields, add_lora, save_lora
from hf_var.training.optimization import SCHEDULERS, Optimization, OptimizerConfig
from hf_var.training.prior_data import ConditionConfig, PriorData, adopt_fields, load_prior_data, tokenize_copies
from hf_var.training.prior_inputs import check_blocks, prior_inputs
from hf_var.training.prior_training import CAPTIONS, CURVES, METRICS, train_prior
from hf_var.training.run import RunConfig, TrainingRun
from hf_var.training.samples import SAMPLING, SampleConfig, spread_labels
from hf_var.training.setup import Rows, card_contents, make_batches
from hf_var.training.sharding import is_sharded, whole_model


# Fields of the configuration that may change when a trained transformer is trained further.
FREE_CONFIG_FIELDS = ("dropout", "attention_dropout", "drop_path_rate", "class_dropout_prob", "label_smoothing")
# What a resumed run cannot change, beside the configuration.
FIXED_ARGUMENTS = ("seed", "streaming", "augmented_copies", "lora_rank", "lora_alpha", "lora_target_modules")
FIXED_ARGUMENTS += ("train_text_encoder", "max_caption_length")
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
    captions: CaptionConfig
    data: DataConfig
    augment: AugmentConfig
    run: RunConfig
    optimizer: VAROptimizerConfig
    lora: LoraFields
    samples: SampleConfig
    hub: PipelineHubConfig
    model: config_fields_class(VARConfig, TextVARConfig)


def read_arguments(argv: Sequence[str]) -> Arguments:
    args = Arguments(*parse_arguments(list(Arguments.__annotations__.values()), argv))
    if args.lora.lora_rank > 0 and args.script.pretrained_var is None:
        raise ValueError(f"`lora_rank` = {args.lora.lora_rank} adapts a trained transformer: set `pretrained_var`.")
    if args.captions.caption_column is not None:
        others = {"label_column": args.data.label_column, "condition_column": args.conditions.condition_column}
        others["num_labels"] = args.conditions.num_labels or None
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"`{name}` = {value!r} and `caption_column` exclude each other.")
        if args.captions.train_text_encoder and args.lora.lora_rank > 0:
            raise ValueError("`train_text_encoder` must be false with `lora_rank`, whose adapter has no place for it.")
    return args


# --------------------------------------------------------------------------------------------------------------------
# Model


class Models(NamedTuple):
    """What a training begins with."""

    vqvae: VQVAEModel
    # The transformer that is trained further, if there is one.
    pretrained: Any
    # Those of captions, if there are any.
    encoders: TextEncoders | None
    # Defaults of the pipeline that is saved.
    sampling: dict[str, Any]


def load_models(args: Arguments) -> Models:
    pretrained, sampling, encoders = None, {}, None
    reads_captions = args.captions.caption_column is not None
    if args.script.pretrained_var is not None:
        pretrained = load_pipeline(args.script.pretrained_var, dtype=torch.float32)
        wanted = TextVARTransformer if reads_captions else VARTransformer
        if not isinstance(pretrained.priors[0], wanted):
            what = "with a `caption_column`" if reads_captions else "without a `caption_column`"
            raise ValueError(
                f"`pretrained_var` must be a pipeline of a {wanted.__name__} {what}, got a "
                f"{type(pretrained.priors[0]).__name__}."
            )
        if args.lora.lora_rank > 0 and pretrained.priors[0].config.is_raster:
            raise ValueError(f"`lora_rank` must be 0 for a transformer of raster order, got {args.lora.lora_rank}.")
        names = (*SAMPLING, *(["guidance_rule"] if reads_captions else []))
        sampling = {name: pretrained.config[name] for name in names}
    sampling |= args.samples.defaults
    if reads_captions:
        encoders = caption_encoders(args.captions, pretrained)
        if args.captions.guidance_rule is not None:
            sampling["guidance_rule"] = args.captions.guidance_rule
    if args.script.vqvae is None:
        vqvae = pretrained.vqvae
    else:
        vqvae = load_tokenizer(args.script.vqvae, dtype=torch.float32)
        if not isinstance(vqvae, VQVAEModel):
            raise ValueError(
                f"`vqvae` must be a VQVAEModel, got a {type(vqvae).__name__}, which has no running latents."
            )
    return Models(vqvae.eval().requires_grad_(False), pretrained and pretrained.priors[0], encoders, sampling)


def load_data(args: Arguments, models: Models) -> PriorData:
    conditions, makers = args.conditions, {}
    if models.encoders is not None:
        conditions = ConditionConfig(condition_column=args.captions.caption_column)
        makers["make_condition"] = read_captions(args.captions, models.encoders)
    known_labels = models.pretrained and models.pretrained.config.id2label
    images = load_prior_data(args.data, args.augment, conditions, args.run, models.vqvae, known_labels, **makers)
    if models.encoders is not None:
        sources = {"train_data": args.data.train_data, "validation_data": args.data.validation_data}
        for (name, source), rows in zip(sources.items(), (images.train, images.validation), strict=True):
            if rows is not None:
                check_stored_embeddings(name, str(source), rows, models.encoders)
    return images


def make_config(args: Arguments, models: Models, images: PriorData) -> VARConfig | TextVARConfig:
    """Configuration of the transformer: that of the arguments and the tokenizer, or of a trained one with other labels."""
    given, pretrained, tokenizer = given_fields(args.model), models.pretrained, models.vqvae.config
    config_class = VARConfig if models.encoders is None else TextVARConfig
    check_overrides(config_class, given)
    shared = {name: getattr(tokenizer, name) for name in ("codebook_size", "latent_channels", "patch_nums")}
    adopt_fields(given, shared, "the tokenizer")
    if models.encoders is None:
        adopt_fields(given, {"condition_channels": images.condition_size}, "`condition_column`")
    else:
        adopt_fields(given, models.encoders.widths, "`text_encoder`")
    values = given
    if pretrained is not None:
        values = {name: getattr(pretrained.config, name) for name in own_annotations(config_class)}
        for name, value in given.items():
            if name not in FREE_CONFIG_FIELDS and values[name] != value:
                raise ValueError(f"`{name}` is {values[name]} in `pretrained_var`, got {value}.")
        values |= given
    id2label = images.id2label
    config = config_class(**values, **({"num_labels": 0} if id2label is None else {"id2label": id2label}))
    check_blocks(config)
    return config


def make_transformer(args: Arguments, config: Any, pretrained: Any) -> VARTransformer | TextVARTransformer:
    """A new transformer, or `pretrained` with the labels of `config`."""
    model_class: Any = VARTransformer if isinstance(config, VARConfig) else TextVARTransformer
    if pretrained is None:
        transformer = model_class(config)
    else:
        # Dropout is built in.
        adapted = copy.deepcopy(pretrained.config)
        for name in free_fields(config):
            setattr(adapted, name, getattr(config, name))
        transformer = model_class(adapted)
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


def free_fields(config: Any) -> list[str]:
    """The fields that may change, of those that a configuration has."""
    return [name for name in FREE_CONFIG_FIELDS if hasattr(config, name)]


def identify(args: Arguments, config: Any, models: Models, rows: Rows) -> RunIdentity:
    """What a run that is resumed must have in common with its checkpoint."""
    parts = {"ema_decay > 0": args.optimizer.ema_decay > 0, "labels": config.id2label}
    parts |= {"vqvae (its fingerprint)": data.tokenizer_fingerprint(models.vqvae), "train_data_rows": rows.number}
    if models.encoders is not None:
        parts["text_encoder (its fingerprint)"] = models.encoders.fingerprint
    arguments = public_arguments(*args[:-1])
    return make_identity(arguments, FIXED_ARGUMENTS, config, free_fields(config), **parts)


# --------------------------------------------------------------------------------------------------------------------
# Samples and results


def first_metrics(args: Arguments, vqvae: VQVAEModel, transformer: Any, run: TrainingRun) -> dict[str, Any]:
    """What the log begins with: what trainings of different sizes are compared by."""
    config, validation_data = transformer.config, args.data.validation_data
    return {
        "num_parameters": transformer.num_parameters(),
        "flops_per_step": training_flops(config) * run.images_per_step,
        "tokenizer": data.tokenizer_fingerprint(vqvae),
        "length": config.length,
        "validation_data": None if validation_data is None else Path(validation_data).name,
    }


def make_pipeline(transformer: Any, models: Models) -> Any:
    """What samples, with its defaults: scale by scale or, in raster order, code by code."""
    vqvae, sampling = models.vqvae, models.sampling
    if models.encoders is not None:
        pipeline = VARTextToImagePipeline(transformer, vqvae, **models.encoders.components, **sampling)
    elif transformer.config.is_raster:
        pipeline = ARPipeline(vqvae, transformer, **sampling)
    else:
        pipeline = VARPipeline(transformer, vqvae, **sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(
    args: Arguments, pipeline: Any, batches: data.TrainingBatches, prompts: list[str], accelerator: Accelerator
) -> list[Image.Image]:
    """Images of classes from the first to the last, of the embeddings of the first training images, or of `prompts`."""
    number = len(prompts) or args.samples.num_samples
    generators = [torch.Generator().manual_seed(args.run.seed + index) for index in range(number)]
    if prompts:
        condition: dict[str, Any] = {"prompt": prompts}
    elif args.captions.caption_column is not None:
        condition = stored_captions(batches.first_items(number))
    elif args.conditions.condition_column is not None:
        condition = {"class_embeds": batches.first_items(number)["class_embeds"]}
    else:
        condition = {"class_labels": spread_labels(pipeline.priors[0].config.num_labels, number)}
    with accelerator.autocast():
        return pipeline(**condition, generator=generators).images


def choose_prompts(args: Arguments, images: PriorData) -> list[str]:
    """Texts of samples: those that are given, or captions of unseen images, or of training images if there are none."""
    column = args.captions.caption_column
    if column is None or args.captions.sample_prompts:
        return list(args.captions.sample_prompts or [])
    dataset = (images.validation or images.train).dataset
    return (
        []
        if data.holds_embedded_captions(dataset, column)
        else data.first_captions(dataset, column, args.samples.num_samples)
    )


def make_agreement(args: Arguments, prompts: list[str]) -> TextAgreement | None:
    """What measures how well samples agree with `prompts`, if there is a CLIP."""
    if args.captions.clip_model is None:
        return None
    if len(set(prompts)) < 2:
        raise ValueError(f"`clip_model` needs two different `sample_prompts` at least, got {prompts}.")
    return TextAgreement(args.captions.clip_model)


def whole_transformer(args: Arguments, transformer: Any) -> Any:
    """`transformer`, or if it is sharded a whole copy, in the first process alone; for all processes together."""
    return whole_model(transformer, lambda: make_transformer(args, transformer.config, None), args.run.output_dir)


def save(args: Arguments, transformer: Any, models: Models, folder: Path, is_final: bool = False) -> Any:
    """Save a pipeline. Adapters are saved alone while they are trained, and become part of the final weights as well."""
    if args.lora.lora_rank > 0:
        save_lora(transformer, folder / LORA_FOLDER)
        if not is_final:
            return None
    pipeline = make_pipeline(transformer, models)
    if args.lora.lora_rank > 0:
        pipeline.fuse_lora()
    pipeline.save_pretrained(str(folder))
    return pipeline


def describe(args: Arguments, pipeline: Any, run: TrainingRun, prompts: list[str]) -> None:
    """Plot the training's curves and write the model card."""
    write_pipeline_card(
        args.run.output_dir,
        pipeline,
        public_arguments(*args[:-1], given_fields(args.model)),
        **card_contents(run, METRICS, CURVES, CAPTIONS),
        repo_id=args.hub.hub_model_id,
        license=args.hub.license,
        data_license=args.hub.data_license,
        prompts=prompts,
    )


# --------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(sys.argv[1:] if argv is None else argv)

    # Everything that can be wrong with the input is found before any work.
    models = load_models(args)
    vqvae, encoders = models.vqvae, models.encoders
    images = load_data(args, models)
    config = make_config(args, models, images)
    prompts = choose_prompts(args, images)
    agreement = make_agreement(args, prompts)

    seed, batch_size = args.run.seed, args.data.train_batch_size
    accelerator = make_accelerator(args.run, batch_size, args.optimizer.max_grad_norm)
    identity = identify(args, config, models, images.train)
    run = TrainingRun(args.run, accelerator, "train_var", batch_size, identity, tokens_per_image=config.length)
    args.optimizer.learning_rate = args.optimizer.learning_rate_of(run.images_per_step)
    # A sharded model takes a part of its first weights from every process.
    set_seed(seed)
    transformer = make_transformer(args, config, models.pretrained)
    set_seed(seed, device_specific=True)
    pipeline = make_pipeline(transformer, models).to(accelerator.device)
    if args.hub.push_to_hub and accelerator.is_main_process:
        args.hub.hub_model_id = create_repository(args.run.output_dir, args.hub.hub_model_id)
        pusher = BackgroundPush(args.hub.hub_model_id, args.run.output_dir)

    show_progress = accelerator.is_local_main_process
    train_rows = tokenize_copies(images.train, args.script.augmented_copies, args.data, seed, vqvae, show_progress)
    batches, validation = make_batches(args.data, seed, accelerator, train_rows, images.validation)
    model, validation_inputs = transformer, None
    if encoders is None:
        make_inputs = partial(prior_inputs, vqvae, is_raster=config.is_raster)
    else:
        model = trained_module(transformer, encoders, args.captions)
        validation_inputs = CaptionInputs(vqvae, encoders, model is transformer, transformer.config.learned_empty_text)
        make_inputs = replace(validation_inputs, dropout_prob=args.captions.caption_dropout_prob)
    optimization = Optimization(accelerator, model, args.optimizer, args.run.max_train_steps)
    if model is not transformer and is_sharded(transformer):
        raise ValueError("`train_text_encoder` must be false for a model that is sharded.")

    parts = {"model": model, "optimization": optimization, "batches": batches}
    with run.started(parts, public_arguments(*args)):
        if accelerator.is_main_process and run.log.last("num_parameters") is None:
            run.write(first_metrics(args, vqvae, transformer, run))
        for _ in train_prior(run, optimization, batches, validation, make_inputs, validation_inputs):
            is_sampled = args.samples.num_samples > 0 and run.is_due(args.samples.sample_steps)
            is_pushed = args.hub.push_steps > 0 and run.step % args.hub.push_steps == 0 and not run.is_finished
            if is_sampled or is_pushed:
                with optimization.averaged():
                    if is_sampled:
                        # In all processes, whose parts of a sharded model are needed.
                        samples = sample_images(args, pipeline, batches, prompts, accelerator)
                        run.write_image("samples", image_grid(samples, columns=8))
                        if agreement is not None and accelerator.is_main_process:
                            run.write(agreement(samples, prompts), prefix="sample_")
                    if is_pushed:
                        with run.writing():
                            whole = whole_transformer(args, transformer)
                        if accelerator.is_main_process:
                            pusher.push(partial(save, args, whole, models), f"Step {run.step}")
                run.restart_clock()

        accelerator.wait_for_everyone()
        with optimization.averaged():
            with run.writing():
                whole = whole_transformer(args, transformer)
            if accelerator.is_main_process:
                with run.writing():
                    saved = save(args, whole, models, Path(args.run.output_dir), is_final=True)
                describe(args, saved, run, prompts)
                if args.hub.push_to_hub:
                    pusher.finish()
                    push_result(args.run.output_dir, args.hub.hub_model_id)


if __name__ == "__main__":
    main()
