# SPDX-License-Identifier: Apache-2.0
"""Long jobs, whose arguments are configurations: `hf-var tokenize` and `hf-var evaluate`, `[RECIPE.yaml] --key value ...`."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from .flags import TRUTH_VALUES, load_library


RESUME = (
    "The first argument may be a recipe, a YAML file of arguments. If interrupted, rerun the same command to resume."
)


def tokenize(argv: Sequence[str]) -> None:
    """Turn the images of a data set into codes."""
    from ..data.tokenization_config import TokenizationConfig

    config = _parse(
        TokenizationConfig,
        argv,
        repository="hub_dataset_id",
        prog="hf-var tokenize",
        description=f"Encode the images of a data set once, into parquet files of codes for the training of a transformer. {RESUME}",
        epilog="example: hf-var tokenize --data user/images --vqvae user/vqvae --horizontal-flip --output codes",
    )
    # What it needs comes with an extra.
    from accelerate import Accelerator

    from ..data.tokenization import tokenize_dataset

    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    count = tokenize_dataset(config, accelerator)
    accelerator.print(
        f"{config.output_dir}: {count.rows} rows of codes from {count.images - count.broken_images} images"
    )
    accelerator.end_training()


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate a pipeline, a tokenizer or existing images."""
    from ..evaluation.protocol import EvaluationConfig

    config = _parse(
        EvaluationConfig,
        argv,
        repository="hub_model_id",
        prog="hf-var evaluate",
        description="Measure FID, sFID, Inception Score, precision, recall and KID of a pipeline or of existing images, or "
        f"the reconstructions of a tokenizer. {RESUME}",
        epilog="example: hf-var evaluate --model user/var-d16-256 --preset imagenet256 --output outputs/evaluation",
    )
    # What it needs comes with an extra.
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ..evaluation.run import evaluate

    # A long timeout: the processes' shares differ, and the reference may have to be downloaded.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    evaluate(config, accelerator)
    if accelerator.is_main_process:
        accelerator.print((Path(config.output_dir) / "evaluation.md").read_text(encoding="utf-8"))
    accelerator.end_training()


# The function that gets the command line, and what it does in a few words.
JOBS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "tokenize": (tokenize, "turn a data set of images into codes"),
    "evaluate": (evaluate, "measure a pipeline, a tokenizer or existing images"),
}


def _parse(config_class: type, argv: Sequence[str], repository: str, **texts: str) -> Any:
    """The configuration on a command line, on which the words of the other commands work as well."""
    from .arguments import parse_arguments

    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        flag, equals, value = word.partition("=")
        if flag == "--output":
            flag = "--output_dir"
        # A repository in place of a truth value.
        given = value if equals else following
        names_one = flag in ("--push-to-hub", "--push_to_hub") and not given.startswith("--")
        if names_one and given.lower() not in TRUTH_VALUES:
            words.append(flag)
            flag = f"--{repository}"
        words.append(flag + equals + value)
    (config,) = parse_arguments([config_class], words, **texts)
    load_library()
    return config
