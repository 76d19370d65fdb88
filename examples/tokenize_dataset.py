# SPDX-License-Identifier: Apache-2.0
"""
Turn the images of a data set into the codes of a tokenizer, once, so that train_var.py need not encode them in every epoch.

The first argument may be a recipe, a YAML file of arguments; the command line counts more. The result is a folder of
parquet files for `--train_data` of train_var.py, which refuses any other tokenizer than this one. A run that was killed
goes on when the same command is given again. `hf-var tokenize` does the same in one process.

On one or many GPUs:

    accelerate launch examples/tokenize_dataset.py --data user/images --vqvae user/vqvae --output_dir codes/train \
        --horizontal_flip --num_crops 10 --dataloader_num_workers 8 --mixed_precision bf16

On a laptop's CPU, in seconds, with the tokenizer that ships with the package:

    python examples/prepare_digits.py data/digits
    python examples/tokenize_dataset.py --data data/digits/train.parquet --vqvae src/hf_var/checkpoints/digits/vqvae \
        --output_dir codes/digits --resize_ratio 1
"""

import sys
from collections.abc import Sequence

from accelerate import Accelerator

from hf_var.cli.arguments import parse_arguments
from hf_var.data.tokenization import TokenizationConfig, tokenize_dataset


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse_arguments((TokenizationConfig,), sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    count = tokenize_dataset(config, accelerator)
    accelerator.print(
        f"{config.output_dir}: {count.rows} rows of codes from {count.images - count.broken_images} images"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
