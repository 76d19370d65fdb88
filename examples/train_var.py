# SPDX-License-Identifier: Apache-2.0
"""
Train a VAR transformer (Tian et al. 2024) on your images, or on their codes, with a trained tokenizer.

The first argument may be a recipe, a YAML file of arguments; the command line counts more. All fields of `VARConfig` are
arguments; those that it shares with the tokenizer are taken from there. The result is a folder for
`VARPipeline.from_pretrained`.

On one or many GPUs, from codes that tokenize_dataset.py made:

    accelerate launch examples/train_var.py examples/recipes/var_d16_256.yaml --train_data "codes/train/*.parquet" \
        --vqvae user/vqvae --output_dir outputs/var --mixed_precision bf16

On a laptop's CPU, in a minute, after the commands in train_vqvae.py:

    python examples/train_var.py examples/recipes/var_digits.yaml --max_train_steps 500 --augmented_copies 8
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.utils import make_image_grid
from PIL import Image
from transformers.utils import logging

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel, data
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.hub.cards import write_pipeline_card
from hf_var.hub.push import BackgroundPush, create_repository, push_result
from hf_var.metrics.likelihood import CodePredictions, measure_likelihood
from hf_var.training import lora
from hf_var.training.arguments import (
    SCHEDULERS,
    TrainingArguments,
    config_field_types,
    given_config_fields,
    parse_arguments,
    with_config_fields,
)
from hf_var.training.curves import curves_plot
from hf_var.training.flops import training_flops
from hf_var.training.optimization import (
    AveragedWeights,
    averaged_weights,
    make_optimizer,
    make_scheduler,
    schedule_weight_decay,
)
from hf_var.training.run import TrainingRun, make_accelerator
from hf_var.training.sharding import whole_model
from hf_var.training.teacher_forcing import TeacherForcing


logger = logging.get_logger("hf_var.train_var")

# Fields of the configuration that may change when a trained transformer is trained further.
FREE_CONFIG_FIELDS = ("dropout", "attention_dropout", "drop_path_rate", "class_dropout_prob", "label_smoothing")
# Arguments that become defaults of the pipeline.
SAMPLING = ("guidance_scale", "top_p", "temperature")
# Folder of the adapter in that of the result.
LORA_FOLDER = "lora"
# What the picture of the training shows, where the log has it.
CURVES = ("loss", "validation_bits_per_token", "validation_accuracy", "gradient_norm", "learning_rate")


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass
class VARTrainingArguments(TrainingArguments):
    """Arguments of this script alone, and what the paper's recipe has for those of all scripts."""

    vqvae: str | None = field(
        default=None, metadata={"help": "folder or repository of the tokenizer; default: that of pretrained_var"}
    )
    pretrained_var: str | None = field(
        default=None, metadata={"help": "folder or repository of a pipeline whose transformer is trained further"}
    )
    num_labels: int | None = field(
        default=None, metadata={"help": "0: without classes; default: as many as in the data"}
    )
    augmented_copies: int = field(
        default=0,
        metadata={"help": "tokenize this many augmented copies of each image first; 0: tokenize every batch anew"},
    )
    input_noise: float = field(
        default=0.0, metadata={"help": "share of the codes that are read, not predicted, replaced by random ones"}
    )
    attn_implementation: str = field(
        default="blockwise_sdpa", metadata={"help": "blockwise_sdpa, sdpa, flex_attention or eager"}
    )

    # Optimisation
    learning_rate: float | None = field(
        default=None, metadata={"help": "largest learning rate; default: base_learning_rate * images of a step / 256"}
    )
    base_learning_rate: float = field(default=1e-4, metadata={"help": "largest learning rate for 256 images a step"})
    lr_scheduler: str = field(default="linear", metadata={"help": ", ".join(SCHEDULERS)})
    lr_final_ratio: float = field(
        default=0.1, metadata={"help": "a linear or cosine decay ends at this share of the largest learning rate"}
    )

    # Low-rank adaptation
    lora_rank: int = field(
        default=0, metadata={"help": "train adapters of this rank and the class embedding alone; 0: all weights"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "scale of the adapters; default: lora_rank"})
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "default: all projections of attention and feed-forward layers"}
    )

    # Samples
    sample_steps: int = field(default=0, metadata={"help": "draw samples this often; 0: at the end only"})
    num_samples: int = field(default=16, metadata={"help": "images in the picture of samples; 0: no picture"})
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "default of the pipeline that is saved: that of pretrained_var, or 2.5; 1: off"},
    )
    top_p: float | None = field(
        default=None,
        metadata={"help": "default of the pipeline that is saved: that of pretrained_var, or 0.96; 1: off"},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "default of the pipeline that is saved: that of pretrained_var, or 1"}
    )

    # Run
    push_steps: int = field(
        default=0, metadata={"help": "upload the pipeline this often, in the background; 0: at the end only"}
    )
    data_license: str | None = field(default=None, metadata={"help": "licence of the data, for the model card"})

    def __post_init__(self):
        super().__post_init__()
        if self.vqvae is None and self.pretrained_var is None:
            raise ValueError("`vqvae` must name the folder or the repository of a trained tokenizer.")
        for name in ("augmented_copies", "lora_rank", "sample_steps", "num_samples", "push_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.input_noise < 1:
            raise ValueError(f"`input_noise` must be at least 0 and below 1, got {self.input_noise}.")
        if self.base_learning_rate <= 0:
            raise ValueError(f"`base_learning_rate` must be positive, got {self.base_learning_rate}.")
        if self.lora_rank > 0 and self.pretrained_var is None:
            raise ValueError(f"`lora_rank` = {self.lora_rank} adapts a trained transformer: set `pretrained_var`.")
        if self.push_steps > 0 and not self.push_to_hub:
            raise ValueError(f"`push_steps` = {self.push_steps} needs `push_to_hub`.")


# --------------------------------------------------------------------------------------------------------------------
# Data


def load_data(args: VARTrainingArguments, argument: str, splits: list[str], vqvae: VQVAEModel) -> data.AnyDataset:
    """The images or codes that `argument` names, refused if another tokenizer made the codes."""
    source = getattr(args, argument)
    split = args.train_split if argument == "train_data" else args.validation_split
    dataset = data.load_source(argument, source, split, splits, args.streaming)
    if data.is_codes_dataset(dataset):
        data.check_codes(dataset, sum(vqvae.config.scale_lengths), vqvae.config.codebook_size)
        made_by = data.codes_fingerprint(source)
        if made_by is None:
            logger.warning(f"`{argument}` does not tell which tokenizer made its codes: let it be `vqvae`.")
        if made_by is not None and made_by != data.tokenizer_fingerprint(vqvae):
            raise ValueError(f"The codes in `{argument}` = {source!r} were made by another tokenizer than `vqvae`.")
    return dataset


def make_row_reader(
    args: VARTrainingArguments,
    tokenizer: VQVAEConfig,
    dataset: data.AnyDataset,
    label_column: data.LabelCondition | None,
    num_labels: int,
    augment: bool,
):
    """How a row becomes an item: from codes as they are, or from an image."""
    if data.is_codes_dataset(dataset):
        return data.codes_rows(label_column, num_labels)
    labels = {"label_column": label_column, "num_labels": num_labels}
    changes = args if augment else None
    return data.image_rows(args, changes, dataset, tokenizer.image_size, tokenizer.in_channels, **labels)


# --------------------------------------------------------------------------------------------------------------------
# Model


def load_models(args: VARTrainingArguments) -> tuple[VQVAEModel, VARTransformer | None]:
    """The tokenizer, and the transformer that is trained further, if there is one; sampling defaults become `args`."""
    pretrained = None
    if args.pretrained_var is not None:
        pretrained = VARPipeline.from_pretrained(args.pretrained_var, dtype=torch.float32)
        for name in SAMPLING:
            if getattr(args, name) is None:
                setattr(args, name, pretrained.config[name])
    vqvae = pretrained.vqvae if args.vqvae is None else VQVAEModel.from_pretrained(args.vqvae, dtype=torch.float32)
    return vqvae.eval().requires_grad_(False), None if pretrained is None else pretrained.transformer


def make_config(
    args: VARTrainingArguments,
    tokenizer: VQVAEConfig,
    id2label: dict[int, str] | None,
    pretrained: VARTransformer | None = None,
) -> VARConfig:
    """Configuration of the transformer: that of the arguments and the tokenizer, or `pretrained`'s with other labels."""
    given = given_config_fields(args, VARConfig)
    if "block_sizes" in given:
        raise ValueError("`block_sizes` cannot be set here: a scale is predicted at once.")
    shared = {name: getattr(tokenizer, name) for name in ("codebook_size", "latent_channels", "patch_nums")}
    for name, value in shared.items():
        if given.setdefault(name, value) != value:
            raise ValueError(f"`{name}` is {value} in the tokenizer, got {given[name]}.")
    fields = given
    if pretrained is not None:
        fields = {name: getattr(pretrained.config, name) for name in config_field_types(VARConfig)}
        for name, value in given.items():
            if name not in FREE_CONFIG_FIELDS and fields[name] != value:
                raise ValueError(f"`{name}` is {fields[name]} in `pretrained_var`, got {value}.")
        fields |= given
    return VARConfig(num_labels=0, **fields) if id2label is None else VARConfig(id2label=id2label, **fields)


def make_transformer(
    args: VARTrainingArguments, config: VARConfig, pretrained: VARTransformer | None
) -> VARTransformer:
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
    transformer.set_attn_implementation(args.attn_implementation)
    if args.gradient_checkpointing:
        enable_activation_checkpointing(transformer)
    if args.lora_rank > 0:
        lora.add_lora(
            transformer, args.lora_rank, args.lora_alpha, args.lora_dropout, target_modules=args.lora_target_modules
        )
    return transformer.train()


# --------------------------------------------------------------------------------------------------------------------
# Samples and results


def draw_samples(args: VARTrainingArguments, pipeline: VARPipeline, accelerator: Accelerator) -> Image.Image:
    """Images of classes from the first to the last, a row of eight beside each other."""
    number, num_labels = args.num_samples, pipeline.transformer.config.num_labels
    labels = [index * num_labels // number if num_labels > 0 else None for index in range(number)]
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(number)]
    with accelerator.autocast():
        images = pipeline(labels, generator=generators).images
    columns = min(number, 8)
    images += [Image.new(images[0].mode, images[0].size)] * (-number % columns)
    return make_image_grid(images, rows=len(images) // columns, cols=columns)


def whole_pipeline(args: VARTrainingArguments, pipeline: VARPipeline, config: VARConfig) -> VARPipeline | None:
    """
    `pipeline`, or if its transformer is sharded one with a whole copy, in the first process alone; for all processes
    together.
    """
    transformer = whole_model(pipeline.transformer, lambda: make_transformer(args, config, None))
    if transformer is None or transformer is pipeline.transformer:
        return None if transformer is None else pipeline
    return VARPipeline(transformer, pipeline.vqvae, **{name: pipeline.config[name] for name in SAMPLING})


def save(args: VARTrainingArguments, pipeline: VARPipeline, folder: Path, is_final: bool) -> None:
    """
    Save a pipeline. Adapters are saved for themselves as well, and alone as long as they are trained: they become part of
    the weights that are saved at the end.
    """
    if args.lora_rank > 0:
        lora.save_lora(pipeline.transformer, folder / LORA_FOLDER)
        if not is_final:
            return
        pipeline.fuse_lora()
    pipeline.save_pretrained(str(folder))


def describe(args: VARTrainingArguments, pipeline: VARPipeline, run: TrainingRun) -> None:
    """Draw the training's curves and write the model card."""
    curves = [name for name in CURVES if run.log.last(name) is not None]
    run.write_picture("curves", curves_plot(run.log.path, curves))
    metrics = {name: run.log.last(f"validation_{name}") for name in ("loss", "bits_per_token", "accuracy")}
    captions = {"samples.png": "Samples, not chosen.", "curves.png": "The training."}
    recipe = asdict(args) | given_config_fields(args, VARConfig)
    write_pipeline_card(
        args.output_dir,
        pipeline,
        {name: value for name, value in recipe.items() if value not in (None, [])},
        metrics={name: value for name, value in metrics.items() if value is not None},
        pictures={name: text for name, text in captions.items() if (Path(args.output_dir) / name).is_file()},
        repo_id=args.hub_model_id,
        license=args.license,
        data_license=args.data_license,
    )


# --------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(with_config_fields(VARTrainingArguments, VARConfig), sys.argv[1:] if argv is None else argv)

    # Everything that can be wrong with the input is found before any work.
    vqvae, pretrained = load_models(args)
    train_data = load_data(args, "train_data", ["train"], vqvae)
    known = None if pretrained is None else pretrained.config.id2label
    label_column, id2label = data.training_labels(train_data, args.label_column, args.num_labels, known)
    config = make_config(args, vqvae.config, id2label, pretrained)
    train_rows = make_row_reader(args, vqvae.config, train_data, label_column, config.num_labels, augment=True)
    if args.validation_data is not None:
        validation_data = load_data(args, "validation_data", ["validation", "test"], vqvae)
        validation_labels = None
        if label_column is not None:
            validation_labels = data.validation_labels(
                validation_data, args.label_column, id2label, data.has_label_names(train_data, label_column)
            )
        validation_rows = make_row_reader(
            args, vqvae.config, validation_data, validation_labels, config.num_labels, augment=False
        )

    accelerator = make_accelerator(args)
    # A sharded model takes a part of its first weights from every process.
    set_seed(args.seed)
    transformer = make_transformer(args, config, pretrained)
    set_seed(args.seed, device_specific=True)
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    pipeline = VARPipeline(transformer=transformer, vqvae=vqvae.to(accelerator.device), **sampling)
    pipeline.set_progress_bar_config(disable=True)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_repository(args.output_dir, args.hub_model_id)
        pusher = BackgroundPush(args.hub_model_id, args.output_dir)
    run = TrainingRun(accelerator, args, "train_var", tokens_per_image=config.length)
    if args.learning_rate is None:
        args.learning_rate = args.base_learning_rate * run.images_per_step / 256

    shares = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    if args.augmented_copies > 0 and not data.is_codes_dataset(train_data):
        show_progress = accelerator.is_local_main_process
        copies = args.augmented_copies
        train_data = data.tokenized_copies(train_data, train_rows, args, args.seed, vqvae, copies, show_progress)
        train_rows = data.codes_rows(None if label_column is None else "class_labels", config.num_labels)
    batches = data.TrainingBatches(train_data, train_rows, args, args.seed, **shares)
    validation = None
    if args.validation_data is not None:
        validation = data.ValidationBatches(validation_data, validation_rows, args, **shares)
    teacher_forcing = TeacherForcing(vqvae, args.input_noise, args.seed)
    optimizer = make_optimizer(transformer, args)
    scheduler = make_scheduler(optimizer, args)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    average = AveragedWeights(transformer, args.ema_decay) if args.ema_decay > 0 else None
    accelerator.register_for_checkpointing(scheduler, batches, *([] if average is None else [average]))
    run.resume()
    if run.step == 0:
        run.write(
            {
                "num_parameters": transformer.num_parameters(),
                "flops_per_step": training_flops(config) * run.images_per_step,
                "tokenizer": data.tokenizer_fingerprint(vqvae),
                "length": config.length,
                "validation_data": None if args.validation_data is None else Path(args.validation_data).name,
            }
        )
    predictions = CodePredictions(config.scale_lengths, accelerator.device)

    stream = iter(batches)
    while not run.is_finished:
        inputs = teacher_forcing(next(stream), run.position)
        with accelerator.accumulate(model):
            output = model(**inputs)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.add(output.loss)
        if run.is_logged(run.step + 1):
            predictions.add(output.logits, inputs["labels"])
        # The logits are large, and the next ones come before these would go.
        del output
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        schedule_weight_decay(optimizer, args, run.step + 1)
        if average is not None:
            average.step(transformer.parameters())
        run.finish_step(scheduler.get_last_lr()[0], gradient_norm, broken_images=batches.broken_images)
        if run.is_logged(run.step):
            run.write({f"train_{name}": value for name, value in predictions.compute(accelerator).items()})
            predictions.reset()
        is_sampled = args.num_samples > 0 and run.is_due(args.sample_steps)
        is_validated = validation is not None and run.is_due(args.validation_steps)
        is_pushed = args.push_steps > 0 and run.step % args.push_steps == 0 and not run.is_finished
        if is_sampled or is_validated or is_pushed:
            with averaged_weights(average, transformer):
                if is_validated:
                    figures = measure_likelihood(transformer, teacher_forcing, validation, accelerator)
                    run.write({f"validation_{name}": value for name, value in figures.items()})
                if is_sampled:
                    # In all processes, whose parts of a sharded model are needed.
                    run.write_picture("samples", draw_samples(args, pipeline, accelerator))
                if is_pushed:
                    whole = whole_pipeline(args, pipeline, config)
                    if accelerator.is_main_process and pusher.is_free:
                        folder = pusher.new_folder()
                        save(args, whole, folder, is_final=False)
                        pusher.push(folder, f"Step {run.step}")
            run.restart_clock()
        run.save_if_due(transformer)

    accelerator.wait_for_everyone()
    if average is not None:
        average.copy_to(transformer.parameters())
    whole = whole_pipeline(args, pipeline, config)
    if accelerator.is_main_process:
        save(args, whole, Path(args.output_dir), is_final=True)
        describe(args, whole, run)
        if args.push_to_hub:
            pusher.finish()
            push_result(args.output_dir, args.hub_model_id)
    run.end()


if __name__ == "__main__":
    main()
