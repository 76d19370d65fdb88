# SPDX-License-Identifier: Apache-2.0
"""
Train a VAR transformer (Tian et al. 2024) on your images, or on their codes, with a trained tokenizer.

The first argument may be a recipe, a YAML file of arguments; the command line counts more. All fields of `VARConfig` are
arguments; those that it shares with the tokenizer are taken from there. The result is a folder for
`VARPipeline.from_pretrained`.

On one or many GPUs:

    accelerate launch examples/train_var.py examples/recipes/var_digits.yaml --train_data user/images \
        --vqvae user/vqvae --output_dir outputs/var --mixed_precision bf16

On a laptop's CPU, in a minute, after the commands in train_vqvae.py:

    python examples/train_var.py examples/recipes/var_digits.yaml --max_train_steps 500 --augmented_copies 8
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.training import data
from hf_var.training.arguments import TrainingArguments, given_config_fields, parse_arguments, with_config_fields
from hf_var.training.optimization import averaged_weights, make_optimizer
from hf_var.training.run import TrainingRun, make_accelerator


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass
class VARTrainingArguments(TrainingArguments):
    """Arguments of this script alone."""

    vqvae: str | None = field(default=None, metadata={"help": "folder or repository of the tokenizer; required"})
    num_labels: int | None = field(
        default=None, metadata={"help": "0: without classes; default: as many as in the data"}
    )
    augmented_copies: int = field(
        default=0,
        metadata={"help": "tokenize this many augmented copies of each image first; 0: tokenize every batch anew"},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flex_attention"})
    guidance_scale: float = field(default=2.5, metadata={"help": "default of the pipeline that is saved; 1: off"})
    top_p: float = field(default=0.96, metadata={"help": "default of the pipeline that is saved; 1: off"})
    temperature: float = field(default=1.0, metadata={"help": "default of the pipeline that is saved"})

    def __post_init__(self):
        super().__post_init__()
        if self.vqvae is None:
            raise ValueError("`vqvae` must name the folder or the repository of a trained tokenizer.")
        if self.augmented_copies < 0:
            raise ValueError(f"`augmented_copies` must be at least 0, got {self.augmented_copies}.")


def make_config(args: VARTrainingArguments, tokenizer: VQVAEConfig, id2label: dict[int, str] | None) -> VARConfig:
    given = given_config_fields(args, VARConfig)
    shared = {name: getattr(tokenizer, name) for name in ("codebook_size", "latent_channels", "patch_nums")}
    for name, value in shared.items():
        if given.setdefault(name, value) != value:
            raise ValueError(f"`{name}` is {value} in the tokenizer {args.vqvae!r}, got {given[name]}.")
    if id2label is None:
        return VARConfig(num_labels=0, **given)
    return VARConfig(id2label=id2label, **given)


# --------------------------------------------------------------------------------------------------------------------
# Data


def find_labels(args: VARTrainingArguments, dataset: data.AnyDataset) -> tuple[str | None, dict[int, str] | None]:
    """The column of labels and their names; neither where `num_labels` is 0."""
    if args.num_labels == 0:
        return None, None
    label_column = data.find_label_column(dataset, args.label_column)
    if args.num_labels is None or isinstance(dataset.features[label_column], datasets.ClassLabel):
        id2label = data.label_names(dataset, label_column)
    else:
        id2label = {label: str(label) for label in range(args.num_labels)}
    if args.num_labels not in (None, len(id2label)):
        raise ValueError(f"`num_labels` is {args.num_labels}, but the data names the labels {id2label}.")
    data.check_labels(dataset, label_column, len(id2label))
    return label_column, id2label


def make_row_reader(
    args: VARTrainingArguments,
    vqvae: VQVAEModel,
    dataset: data.AnyDataset,
    label_column: str | None,
    num_labels: int,
    augment: bool,
):
    """How a row becomes an item: from codes as they are, or from an image."""
    config = vqvae.config
    if data.is_codes_dataset(dataset):
        data.check_codes(dataset, sum(config.scale_lengths), config.codebook_size)
        return data.codes_rows(label_column, num_labels)
    return data.image_rows(
        args, dataset, config.image_size, config.in_channels, augment, label_column=label_column, num_labels=num_labels
    )


def check_tokenizer(args: VARTrainingArguments, source: str, vqvae: VQVAEModel) -> None:
    made_by = data.codes_fingerprint(source)
    if made_by is not None and made_by != data.tokenizer_fingerprint(vqvae):
        raise ValueError(f"The codes in {source!r} were made by another tokenizer than `vqvae` = {args.vqvae!r}.")


@torch.no_grad()
def read_batch(batch: dict[str, torch.Tensor], vqvae: VQVAEModel) -> dict[str, torch.Tensor | None]:
    """Arguments of the transformer for a batch of images or codes."""
    codes = batch["codes"] if "codes" in batch else vqvae.encode(batch["pixel_values"]).codes
    return {
        "class_labels": batch.get("class_labels"),
        "scale_inputs": vqvae.teacher_forcing(codes),
        "labels": codes,
    }


# --------------------------------------------------------------------------------------------------------------------
# Validation


@torch.no_grad()
def log_validation(
    transformer: VARTransformer, vqvae: VQVAEModel, validation: data.ValidationBatches, accelerator: Accelerator
) -> dict[str, float]:
    """Mean cross-entropy per token, in nats and without label smoothing, of all tokens and of each scale."""
    transformer.eval()
    losses = []
    for batch in validation:
        inputs = read_batch({name: values.to(accelerator.device) for name, values in batch.items()}, vqvae)
        codes = inputs.pop("labels")
        logits = transformer(**inputs).logits
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes, reduction="none"))
    transformer.train()
    token_losses = torch.cat(losses).mean(dim=0)  # (length,)
    figures = {"validation_loss": token_losses.mean().item()}
    for scale, scale_losses in enumerate(token_losses.split(vqvae.config.scale_lengths)):
        figures[f"validation_loss_{scale}"] = scale_losses.mean().item()
    return figures


# --------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(with_config_fields(VARTrainingArguments, VARConfig), sys.argv[1:] if argv is None else argv)

    # Everything that can be wrong with the input is found before any work.
    vqvae = VQVAEModel.from_pretrained(args.vqvae, dtype=torch.float32).eval().requires_grad_(False)
    train_data = data.load_source("train_data", args.train_data, args.train_split, ["train"], args.streaming)
    label_column, id2label = find_labels(args, train_data)
    config = make_config(args, vqvae.config, id2label)
    train_rows = make_row_reader(args, vqvae, train_data, label_column, config.num_labels, augment=True)
    check_tokenizer(args, args.train_data, vqvae)
    validation = None
    if args.validation_data is not None:
        validation_data = data.load_source(
            "validation_data", args.validation_data, args.validation_split, ["validation", "test"], args.streaming
        )
        validation_labels = None
        if label_column is not None:
            validation_labels = data.find_label_column(validation_data, args.label_column)
            data.check_labels(validation_data, validation_labels, config.num_labels)
        validation_rows = make_row_reader(
            args, vqvae, validation_data, validation_labels, config.num_labels, augment=False
        )
        check_tokenizer(args, args.validation_data, vqvae)
        validation = data.ValidationBatches(validation_data, validation_rows, args)

    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    run = TrainingRun(accelerator, args, "train_var")

    vqvae.to(accelerator.device)
    transformer = VARTransformer(config)
    if args.attn_implementation is not None:
        transformer.set_attn_implementation(args.attn_implementation)
    sampling = {"guidance_scale": args.guidance_scale, "top_p": args.top_p, "temperature": args.temperature}
    pipeline = VARPipeline(transformer=transformer, vqvae=vqvae, **sampling)
    transformer.train()
    optimizer = make_optimizer(transformer, args)
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    if args.augmented_copies > 0 and not data.is_codes_dataset(train_data):
        show_progress = accelerator.is_local_main_process
        train_data = data.tokenized_copies(train_data, train_rows, args, vqvae, args.augmented_copies, show_progress)
        train_rows = data.codes_rows(None if label_column is None else "class_labels", config.num_labels)
    batches = data.TrainingBatches(train_data, train_rows, args, accelerator.process_index, accelerator.num_processes)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    average = EMAModel(transformer.parameters(), decay=args.ema_decay) if args.ema_decay > 0 else None
    accelerator.register_for_checkpointing(scheduler, batches, *([] if average is None else [average]))
    run.resume(average)

    stream = iter(batches)
    while not run.is_finished:
        batch = {name: values.to(accelerator.device, non_blocking=True) for name, values in next(stream).items()}
        with accelerator.accumulate(model):
            loss = model(**read_batch(batch, vqvae)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.add(loss)
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        if average is not None:
            average.step(transformer.parameters())
        run.finish_step(scheduler.get_last_lr()[0], broken_images=batches.broken_images)
        if validation is not None and run.is_validation_due:
            with averaged_weights(average, transformer):
                run.write(log_validation(transformer, vqvae, validation, accelerator))
            run.restart_clock()
        run.save_if_due(transformer)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged_weights(average, transformer):
            pipeline.save_pretrained(args.output_dir)
            if args.push_to_hub:
                pipeline.push_to_hub(args.hub_model_id or Path(args.output_dir).name)
    accelerator.end_training()


if __name__ == "__main__":
    main()
