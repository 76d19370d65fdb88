# SPDX-License-Identifier: Apache-2.0
"""
Turn the images of a data set into the codes of a tokenizer, once, so that train_var.py need not encode them in every epoch.

The first argument may be a recipe, a YAML file of arguments, which the command line overrides. The result is a folder of
parquet files for `--train_data` of train_var.py, which refuses any other tokenizer than this one. If interrupted, rerun the
same command to resume. `hf-var tokenize` is the same in one process.

On one or many GPUs:

    accelerate launch examples/tokenize_dataset.py --data user/images --vqvae user/vqvae --output_dir codes/train \
        --horizontal_flip --num_crops 10 --dataloader_num_workers 8 --mixed_precision bf16

On a Ray cluster, which decodes on all CPUs and encodes on eight GPUs (needs the extra `ray`):

    RAY_ADDRESS=auto python examples/tokenize_dataset.py --data user/images --vqvae user/vqvae --output_dir codes/train \
        --horizontal_flip --num_crops 10 --engine ray --ray_actors 8 --mixed_precision bf16

On a laptop's CPU, in seconds, with the tokenizer that ships with the package:

    python examples/prepare_digits.py data/digits
    python examples/tokenize_dataset.py --data data/digits/train.parquet --vqvae src/hf_var/checkpoints/digits/vqvae \
        --output_dir codes/digits --resize_ratio 1
"""

import sys
from collections.abc import Sequence

from hf_var.cli.jobs import tokenize


def main(argv: Sequence[str] | None = None) -> None:
    tokenize(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
