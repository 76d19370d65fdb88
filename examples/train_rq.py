# SPDX-License-Identifier: Apache-2.0
"""
Train an RQ-Transformer (Lee et al. 2022) or VQGAN's GPT (Esser et al. 2021) on your images, or on their codes, with a trained
tokenizer of maps of one size.

The first argument may be a recipe, a YAML file of arguments; the command line overrides it. All fields of
`RQTransformerConfig` are arguments; those that it shares with the tokenizer are taken from there. The result is a folder for
`ARPipeline.from_pretrained`.

The condition of an image is its class, or with `--condition_column` a text (and a `--text_tokenizer` of transformers), another
image (and a `--condition_vqvae`), or a list of token ids. A folder of pairs has a file `metadata.jsonl` beside the images, with
a line such as {"image_file_name": "photos/1.png", "condition_file_name": "maps/1.png"} for each of them.

On one or many GPUs:

    accelerate launch examples/train_rq.py examples/recipes/rq_480m.yaml --train_data "codes/train/*.parquet" \
        --vqvae user/rqvae --output_dir outputs/rq --mixed_precision bf16

On a laptop's CPU, in some minutes:

    python examples/prepare_digits.py data/digits
    python examples/train_vqvae.py examples/recipes/vqvae_digits_rq.yaml
    python examples/train_rq.py examples/recipes/rq_digits.yaml
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_var import ARPipeline, RQTransformer, RQTransformerConfig, VQVAEModel, data
from hf_var.autoencoders import Tokenizer, load_tokenizer
from hf_var.cli.arguments import config_fields_class, given_fields, parse_arguments, public_arguments
from hf_var.compatibility import enable_activation_checkpointing
from hf_var.data import AugmentConfig, DataConfig
from hf_var.fingerprints import fingerprint
from hf_var.hub.cards import write_pipeline_card
from hf_var.hub.push import PipelineHubConfig, create_repository, push_result
from hf_var.metrics.class_maps import class_colors
from hf_var.pipelines.image_grids import image_grid
from hf_var.ranges import CheckedFields, NonNegativeInt, argument
from hf_var.training.accelerator import make_accelerator
from hf_var.training.identity import RunIdentity, make_identity
from hf_var.training.optimization import Optimization, OptimizerConfig
from hf_var.training.prior_data import ConditionConfig, PriorData, adopt_fields, load_prior_data, tokenize_copies
from hf_var.training.prior_inputs import CodeNoiseConfig, StackInputs
from hf_var.training.prior_training import CAPTIONS, CURVES, METRICS, train_prior
from hf_var.training.run import RunConfig, TrainingRun
from hf_var.training.samples import SampleConfig, spread_labels
from hf_var.training.setup import card_contents, make_batches
from hf_var.training.sharding import whole_model


FREE_CONFIG_FIELDS = ("dropout", "attention_dropout", "embedding_dropout", "class_dropout_prob", "label_smoothing")
FREE_CONFIG_FIELDS += ("condition_loss_weight",)
# What a resumed run cannot change, beside the configuration.
FIXED_ARGUMENTS = ("seed", "streaming", "augmented_copies", "code_replacement_prob", "stochastic_codes")
FIXED_ARGUMENTS += ("soft_code_temperature", "condition_column")


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass(kw_only=True)
class ScriptConfig(CheckedFields):
    """Arguments of this script alone."""

    vqvae: str = argument(help="folder or repository of the tokenizer")
    condition_vqvae: str | None = argument(
        None, help="folder or repository of the tokenizer of the images in condition_column"
    )
    text_tokenizer: str | None = argument(
        None, help="folder or repository of transformers' tokenizer of the texts in condition_column"
    )
    augmented_copies: NonNegativeInt = argument(
        0, help="tokenize this many augmented copies of each image first; 0: tokenize every batch anew"
    )
    attn_implementation: str = argument("sdpa", help="sdpa, flash_attention_2, flex_attention or eager")


class Arguments(NamedTuple):
    """The configuration of each component. Their fields are the arguments of the command line."""

    script: ScriptConfig
    conditions: ConditionConfig
    data: DataConfig
    augment: AugmentConfig
    noise: CodeNoiseConfig
    run: RunConfig
    optimizer: OptimizerConfig
    samples: SampleConfig
    hub: PipelineHubConfig
    model: config_fields_class(RQTransformerConfig)


class Tokenizers(NamedTuple):
    """What turns images, images that are conditions, and texts into tokens."""

    vqvae: VQVAEModel
    condition_vqvae: Tokenizer | None
    text: PreTrainedTokenizerBase | None


def read_arguments(argv: Sequence[str]) -> Arguments:
    args = Arguments(*parse_arguments(list(Arguments.__annotations__.values()), argv))
    has_column = args.conditions.condition_column is not None
    for name in ("condition_vqvae", "text_tokenizer"):
        if getattr(args.script, name) is not None and not has_column:
            raise ValueError(f"`{name}` needs a `condition_column`.")
    if args.script.condition_vqvae is not None and args.script.text_tokenizer is not None:
        raise ValueError("Pass one of `condition_vqvae` and `text_tokenizer`, not both.")
    if args.noise.soft_code_temperature > 0 and args.script.augmented_copies > 0:
        raise ValueError(
            "`augmented_copies` must be 0 with `soft_code_temperature`, which needs the images themselves."
        )
    if args.hub.push_steps > 0:
        raise ValueError(f"`push_steps` must be 0: the result is uploaded at the end, got {args.hub.push_steps}.")
    return args


# --------------------------------------------------------------------------------------------------------------------
# Models and data


def load_tokenizers(args: Arguments) -> Tokenizers:
    vqvae = load_tokenizer(args.script.vqvae, dtype=torch.float32)
    if not isinstance(vqvae, VQVAEModel):
        raise ValueError(f"`vqvae` must be a VQVAEModel, got a {type(vqvae).__name__}.")
    condition_vqvae, text = None, None
    if args.script.condition_vqvae is not None:
        condition_vqvae = load_tokenizer(args.script.condition_vqvae, dtype=torch.float32).requires_grad_(False)
    if args.script.text_tokenizer is not None:
        text = AutoTokenizer.from_pretrained(args.script.text_tokenizer)
    return Tokenizers(vqvae.requires_grad_(False), condition_vqvae, text)


def condition_size(args: Arguments, tokenizers: Tokenizers) -> tuple[int | None, int]:
    """Tokens of a condition, if they are known, and how many ids each can have."""
    given = given_fields(args.model)
    length = given.get("condition_length")
    if tokenizers.condition_vqvae is not None:
        config = tokenizers.condition_vqvae.config
        return sum(config.scale_lengths), config.codebook_size
    if tokenizers.text is not None:
        return length, len(tokenizers.text)
    if "condition_vocab_size" not in given and not given.get("shared_embedding"):
        raise ValueError("`condition_vocab_size` must say how many ids a token in `condition_column` can have.")
    return length, given.get("condition_vocab_size", tokenizers.vqvae.config.codebook_size)


def make_condition(
    args: Arguments, tokenizers: Tokenizers, dataset: data.AnyDataset, column: str, augment: AugmentConfig | None
) -> data.Condition:
    """The condition of a column of images, texts or tokens."""
    vqvae = tokenizers.condition_vqvae
    if vqvae is not None and not data.is_codes_dataset(dataset):
        return data.image_condition(args.data, augment, dataset, column, vqvae.config)
    length, num_ids = condition_size(args, tokenizers)
    return data.token_condition(dataset, column, num_ids, length, tokenizers.text)


def make_config(args: Arguments, tokenizers: Tokenizers, images: PriorData) -> RQTransformerConfig:
    """Configuration of the transformer: that of the arguments, the tokenizers and the data."""
    given, vqvae = given_fields(args.model), tokenizers.vqvae.config
    shared: dict[str, Any] = {
        name: getattr(vqvae, name) for name in ("codebook_size", "latent_channels", "patch_nums")
    }
    labels: dict[str, Any] = {"num_labels": 0} if images.id2label is None else {"id2label": images.id2label}
    if args.conditions.condition_column is not None:
        _, num_ids = condition_size(args, tokenizers)
        shared["condition_length"] = images.condition_size
        if not given.get("shared_embedding"):
            shared["condition_vocab_size"] = num_ids
        elif num_ids > vqvae.codebook_size:
            raise ValueError(
                f"`shared_embedding` needs condition tokens below `codebook_size` = {vqvae.codebook_size}, got {num_ids}."
            )
    adopt_fields(given, shared, "the tokenizer or the data")
    return RQTransformerConfig(**given, **labels)


def make_transformer(args: Arguments, config: RQTransformerConfig) -> RQTransformer:
    transformer = RQTransformer(config)
    transformer.set_attn_implementation(args.script.attn_implementation)
    if args.run.gradient_checkpointing:
        enable_activation_checkpointing(transformer)
    return transformer.train()


def identify(args: Arguments, config: RQTransformerConfig, tokenizers: Tokenizers, images: PriorData) -> RunIdentity:
    """What a run that is resumed must have in common with its checkpoint."""
    parts = {"ema_decay > 0": args.optimizer.ema_decay > 0, "labels": config.id2label}
    parts |= {"vqvae (its fingerprint)": data.tokenizer_fingerprint(tokenizers.vqvae)}
    if tokenizers.condition_vqvae is not None:
        parts["condition_vqvae (its fingerprint)"] = data.tokenizer_fingerprint(tokenizers.condition_vqvae)
    if tokenizers.text is not None:
        parts["text_tokenizer (its fingerprint)"] = fingerprint(tokenizers.text.get_vocab(), {})
    parts["train_data_rows"] = images.train.number
    return make_identity(public_arguments(*args[:-1]), FIXED_ARGUMENTS, config, FREE_CONFIG_FIELDS, **parts)


# --------------------------------------------------------------------------------------------------------------------
# Samples and results


def make_pipeline(args: Arguments, transformer: RQTransformer, tokenizers: Tokenizers) -> ARPipeline:
    """What samples, with its defaults."""
    others = {"condition_vqvae": tokenizers.condition_vqvae, "tokenizer": tokenizers.text}
    pipeline = ARPipeline(tokenizers.vqvae, transformer, **others, **args.samples.defaults)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(
    args: Arguments, pipeline: ARPipeline, make_inputs: StackInputs, batches: data.TrainingBatches
) -> Image.Image:
    """Images of classes from the first to the last, or for the conditions of the first training images."""
    number = args.samples.num_samples
    generators = [torch.Generator().manual_seed(args.run.seed + index) for index in range(number)]
    if args.conditions.condition_column is None:
        images = pipeline(spread_labels(len(pipeline.id2label), number), generator=generators).images
        return image_grid(images, columns=8)
    ids = make_inputs(batches.first_items(number))["condition_ids"]
    images = pipeline(condition_codes=ids, generator=generators[: len(ids)]).images
    if pipeline.condition_vqvae is None:
        return image_grid(images, columns=8)
    conditions = [condition.resize(images[0].size) for condition in decoded(pipeline.condition_vqvae, ids)]
    return image_grid([image.convert("RGB") for image in (*conditions, *images)], columns=len(images))


def decoded(vqvae: Tokenizer, codes: torch.Tensor) -> list[Image.Image]:
    """The conditions as pictures, for the row above their samples; classes have colours."""
    pixels = vqvae.decode(codes).sample
    if vqvae.config.num_pixel_classes is not None:
        pixels = class_colors(pixels)
    return VaeImageProcessor().postprocess(pixels, output_type="pil")


def save(args: Arguments, transformer: RQTransformer, tokenizers: Tokenizers, run: TrainingRun) -> None:
    """Save the pipeline with its card."""
    pipeline = make_pipeline(args, transformer, tokenizers)
    with run.writing():
        pipeline.save_pretrained(str(args.run.output_dir))
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
    tokenizers = load_tokenizers(args)
    maker = partial(make_condition, args, tokenizers)
    images = load_prior_data(
        args.data, args.augment, args.conditions, args.run, tokenizers.vqvae, make_condition=maker
    )
    config = make_config(args, tokenizers, images)
    if args.noise.soft_code_temperature > 0 and data.is_codes_dataset(images.train.dataset):
        raise ValueError("`soft_code_temperature` must be 0 for a data set of codes: it needs the images themselves.")

    seed, batch_size = args.run.seed, args.data.train_batch_size
    accelerator = make_accelerator(args.run, batch_size, args.optimizer.max_grad_norm)
    identity = identify(args, config, tokenizers, images)
    run = TrainingRun(args.run, accelerator, "train_rq", batch_size, identity, tokens_per_image=config.length)
    set_seed(seed)
    transformer = make_transformer(args, config)
    set_seed(seed, device_specific=True)
    for vqvae in tokenizers[:2]:
        if vqvae is not None:
            vqvae.to(accelerator.device)
    pipeline = make_pipeline(args, transformer, tokenizers)
    if args.hub.push_to_hub and accelerator.is_main_process:
        args.hub.hub_model_id = create_repository(args.run.output_dir, args.hub.hub_model_id)

    copies, show_progress = args.script.augmented_copies, accelerator.is_local_main_process
    train_rows = tokenize_copies(
        images.train, copies, args.data, seed, tokenizers.vqvae, show_progress, tokenizers.condition_vqvae
    )
    batches, validation = make_batches(args.data, seed, accelerator, train_rows, images.validation)
    make_inputs = StackInputs(tokenizers.vqvae, config, tokenizers.condition_vqvae)
    noisy_inputs = replace(make_inputs, noise=args.noise)
    optimization = Optimization(accelerator, transformer, args.optimizer, args.run.max_train_steps)

    parts = {"model": transformer, "optimization": optimization, "batches": batches}
    with run.started(parts, public_arguments(*args)):
        for _ in train_prior(run, optimization, batches, validation, noisy_inputs, make_inputs):
            if args.samples.num_samples > 0 and run.is_due(args.samples.sample_steps):
                with optimization.averaged(), accelerator.autocast():
                    # In all processes, whose parts of a sharded model are needed.
                    run.write_image("samples", sample_images(args, pipeline, make_inputs, batches))
                run.restart_clock()

        accelerator.wait_for_everyone()
        with optimization.averaged():
            with run.writing():
                whole = whole_model(transformer, lambda: make_transformer(args, config), args.run.output_dir)
            if accelerator.is_main_process:
                save(args, whole, tokenizers, run)
                if args.hub.push_to_hub:
                    push_result(args.run.output_dir, args.hub.hub_model_id)


if __name__ == "__main__":
    main()
