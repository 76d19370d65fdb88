# SPDX-License-Identifier: Apache-2.0
"""Arguments of the training scripts: `script.py [RECIPE.yaml] --key value ...`."""

import difflib
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from ..data.config import AugmentConfig, DataConfig


# Those of transformers' get_scheduler that need no further arguments.
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# Those of them that end where `lr_final_ratio` says.
DECAYS = ("linear", "cosine")


@dataclass
class TrainingArguments(DataConfig, AugmentConfig):
    """Arguments that every training script has."""

    output_dir: str = field(metadata={"help": "folder for the trained model, its log and its checkpoints"})

    # Optimisation
    max_train_steps: int = field(default=10_000, metadata={"help": "optimizer steps"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes per optimizer step"})
    learning_rate: float = field(default=3e-4, metadata={"help": "largest learning rate"})
    lr_scheduler: str = field(default="cosine", metadata={"help": ", ".join(SCHEDULERS)})
    lr_warmup_steps: int = field(default=100, metadata={"help": "steps over which the learning rate rises from zero"})
    lr_stable_steps: int = field(
        default=0, metadata={"help": "steps at the largest learning rate before a linear or cosine decay"}
    )
    lr_final_ratio: float = field(
        default=0.0, metadata={"help": "a linear or cosine decay ends at this share of the largest learning rate"}
    )
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = field(default=0.05, metadata={"help": "acts on matrices, not on biases and other vectors"})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "weight decay of the last step, reached by a cosine; default: weight_decay"}
    )
    max_grad_norm: float = field(default=2.0, metadata={"help": "gradients are scaled down to this norm"})
    ema_decay: float = field(
        default=0.999, metadata={"help": "of the averaged weights, which are saved; 0: no average"}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16"})
    matmul_precision: str = field(
        default="ieee",
        metadata={
            "help": "ieee, or tf32 or bf16: what factors of fp32 matrix products may be rounded to where it is faster"
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations twice instead of keeping them"}
    )
    torch_compile: bool = field(default=False, metadata={"help": "compile the model with torch.compile"})
    seed: int = field(
        default=0,
        kw_only=True,
        metadata={"help": "fixes the initial weights, the data's order and all random draws"},
    )

    # Run
    checkpointing_steps: int = field(default=1000, metadata={"help": "0: no checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "older checkpoints are removed"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "latest, or a folder; latest starts afresh where there is no checkpoint yet"}
    )
    validation_steps: int = field(default=0, metadata={"help": "validate this often; 0: at the end only"})
    logging_steps: int = field(default=10, metadata={"help": "write the loss to train_log.jsonl this often"})
    report_to: str = field(default="tensorboard", metadata={"help": "a tracker of Accelerate, or none"})
    push_to_hub: bool = field(default=False, metadata={"help": "upload the result"})
    hub_model_id: str | None = field(default=None, metadata={"help": "default: the name of output_dir"})
    license: str | None = field(default=None, metadata={"help": "licence of the weights, for the model card"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_train_steps", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        counts = ("seed", "checkpointing_steps", "validation_steps", "lr_warmup_steps", "lr_stable_steps")
        for name in (*counts, "weight_decay", "weight_decay_end"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}.")
        if self.max_grad_norm <= 0:
            raise ValueError(f"`max_grad_norm` must be positive, got {self.max_grad_norm}.")
        if self.lr_scheduler not in SCHEDULERS:
            raise ValueError(f"`lr_scheduler` must be one of {', '.join(SCHEDULERS)}, got {self.lr_scheduler!r}.")
        if not 0 <= self.lr_final_ratio <= 1:
            raise ValueError(f"`lr_final_ratio` must be a share from 0 to 1, got {self.lr_final_ratio}.")
        for name in ("lr_stable_steps", "lr_final_ratio"):
            if getattr(self, name) > 0 and self.lr_scheduler not in DECAYS:
                raise ValueError(
                    f"`{name}` goes with `lr_scheduler` {' or '.join(DECAYS)}, got {self.lr_scheduler!r}."
                )
        if self.validation_data is None and self.validation_steps > 0:
            raise ValueError(f"`validation_steps` = {self.validation_steps} needs `validation_data`.")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"`mixed_precision` must be no, fp16 or bf16, got {self.mixed_precision!r}.")
        if self.matmul_precision not in ("ieee", "tf32", "bf16"):
            raise ValueError(f"`matmul_precision` must be ieee, tf32 or bf16, got {self.matmul_precision!r}.")
        if self.checkpoints_total_limit < 1:
            raise ValueError(f"`checkpoints_total_limit` must be at least 1, got {self.checkpoints_total_limit}.")


@dataclass
class AdversaryArguments:
    """Arguments of the adversarial part of an objective."""

    adversarial_weight: float = field(default=0.0, metadata={"help": "weight of the discriminator's judgement"})
    discriminator: str = field(default="patchgan", metadata={"help": "patchgan or stylegan"})
    discriminator_channels: int = field(default=64, metadata={"help": "width of its first layer"})
    discriminator_layers: int = field(default=3, metadata={"help": "downsampling layers of a patchgan"})
    discriminator_start: int = field(default=0, metadata={"help": "step from which on the discriminator is trained"})
    discriminator_ramp_steps: int = field(
        default=0, metadata={"help": "steps after that over which its weight in the tokenizer's loss rises from zero"}
    )
    discriminator_learning_rate: float | None = field(default=None, metadata={"help": "default: learning_rate"})
    discriminator_adam_beta1: float = 0.5
    adversarial_loss: str = field(default="hinge", metadata={"help": "hinge or non_saturating"})
    adaptive_weight: bool = field(
        default=True, metadata={"help": "balance the gradients of reconstruction and judgement, as VQGAN does"}
    )
    adaptive_weight_min: float = 0.0
    adaptive_weight_max: float = 1e4
    r1_weight: float = field(default=0.0, metadata={"help": "weight of the penalty on gradients at real images"})
    lecam_weight: float = field(default=0.0, metadata={"help": "weight of the LeCam regularisation"})
    diffaugment: list[str] = field(
        default_factory=list, metadata={"help": "what the discriminator's images go through: color translation cutout"}
    )

    def __post_init__(self):
        # What remains is checked where it is used, at the start of the run as well.
        getattr(super(), "__post_init__", lambda: None)()
        for name in ("adversarial_weight", "discriminator_start", "discriminator_ramp_steps", "r1_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        for name, choices in (
            ("discriminator", ("patchgan", "stylegan")),
            ("adversarial_loss", ("hinge", "non_saturating")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if not 0 <= self.adaptive_weight_min <= self.adaptive_weight_max:
            raise ValueError(
                "`adaptive_weight_min` must be from 0 to `adaptive_weight_max`, got "
                f"{self.adaptive_weight_min} and {self.adaptive_weight_max}."
            )
        if self.discriminator_learning_rate is not None and self.discriminator_learning_rate <= 0:
            raise ValueError(
                f"`discriminator_learning_rate` must be positive, got {self.discriminator_learning_rate}."
            )


ArgumentsType = TypeVar("ArgumentsType", bound=TrainingArguments)


def config_field_types(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields that `config_class` itself declares, with the type each has on the command line."""
    own = inspect.get_annotations(config_class)
    return {name: _command_line_type(annotation) for name, annotation in own.items()}


def with_config_fields(
    arguments_class: type[ArgumentsType], config_class: type[PreTrainedConfig]
) -> type[ArgumentsType]:
    """
    A dataclass with the fields of `arguments_class` and, after them, those of `config_class`, which are all `None`
    unless they are given.
    """
    defaults = {config_field.name: config_field.default for config_field in fields(config_class)}
    added = []
    for name, kind in config_field_types(config_class).items():
        if name in arguments_class.__dataclass_fields__:
            raise ValueError(f"`{name}` is an argument of the script and a field of {config_class.__name__}.")
        metadata = {"help": f"{config_class.__name__}; default: {defaults.get(name)}"}
        if kind is bool:
            metadata |= {"nargs": "?", "const": True}
        added.append((name, kind | None, field(default=None, metadata=metadata)))
    return make_dataclass(f"{config_class.__name__}{arguments_class.__name__}", added, bases=(arguments_class,))


def given_config_fields(args: TrainingArguments, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of `config_class` that recipe or command line set."""
    given = {name: getattr(args, name) for name in config_field_types(config_class)}
    given = {name: value for name, value in given.items() if value is not None}
    if "patch_nums" in given:
        given["patch_nums"] = [_parse_patch_num(entry) for entry in given["patch_nums"]]
    return given


def parse_arguments(arguments_class: type[ArgumentsType], argv: Sequence[str]) -> ArgumentsType:
    """
    Read `[RECIPE.yaml] --key value ...`. What the command line gives counts more than the recipe.

    Args:
        arguments_class (`type`): A dataclass of arguments.
        argv (`Sequence[str]`): The command line, without the script's name.

    Raises:
        `ValueError`: If a key of the recipe or of the command line is no argument of the script.
    """
    parser = HfArgumentParser(
        cast(Any, arguments_class), allow_abbrev=False, usage="%(prog)s [RECIPE.yaml] [--key value ...]"
    )
    known = {action.dest for action in parser._actions}
    arguments = list(argv)
    recipe_arguments: list[str] = []
    if arguments and not arguments[0].startswith("-"):
        recipe = arguments.pop(0)
        recipe_arguments = _recipe_arguments(recipe, known)
    # argparse keeps the last value of an argument that comes twice.
    args, unknown = parser.parse_args_into_dataclasses(
        recipe_arguments + arguments, return_remaining_strings=True, look_for_args_file=False
    )
    for word in unknown:
        if word.startswith("--"):
            _raise_unknown(word[2:].split("=")[0], "the command line", known)
        raise ValueError(f"The command line has the value {word!r} that belongs to no argument.")
    return args


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    The arguments that a recipe sets. Its key `base` names another recipe, by a path from its own folder, whose arguments
    it changes and adds to.

    Raises:
        `ValueError`: If a file is missing or is no list of arguments.
    """
    if not Path(path).is_file():
        raise ValueError(f"The recipe {str(path)!r} is not a file. The first argument is a recipe or begins with --.")
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {str(path)!r} must be lines `key: value`, got {type(recipe).__name__}.")
    base = recipe.pop("base", None)
    return recipe if base is None else read_recipe(Path(path).parent / str(base)) | recipe


def _recipe_arguments(path: str, known: set[str]) -> list[str]:
    recipe = read_recipe(path)
    arguments = []
    for key, value in recipe.items():
        if key not in known:
            _raise_unknown(str(key), f"the recipe {path!r}", known)
        if value is not None:
            words = value if isinstance(value, list) else [value]
            arguments += [f"--{key}", *(_as_word(word) for word in words)]
    return arguments


def _as_word(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(str(entry) for entry in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _raise_unknown(key: str, place: str, known: set[str]) -> None:
    near = difflib.get_close_matches(key, sorted(known), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else " --help lists the arguments."
    raise ValueError(f"Unknown argument {key!r} in {place}.{hint}")


def _command_line_type(annotation: Any) -> Any:
    """What one field of a config is on the command line: a scalar type, or a list of integers or of words."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(member for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) is list:
        element = get_args(annotation)[0]
        return list[element if element in (int, float, str) else str]
    return annotation


def _parse_patch_num(text: str) -> int | list[int]:
    try:
        sides = [int(side) for side in str(text).split("x")]
    except ValueError as error:
        raise ValueError(f"`patch_nums` must be sizes such as 4 or 2x3 (height x width), got {text!r}.") from error
    return sides[0] if len(sides) == 1 else sides
