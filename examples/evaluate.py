# SPDX-License-Identifier: Apache-2.0
"""
Evaluate a pipeline by the protocol of published metrics: FID, sFID, Inception Score, precision, recall and KID; or a
tokenizer: rFID, PSNR, SSIM, LPIPS and the usage of its codes. `hf-var evaluate` is the same in one process.

The first argument may be a recipe, a YAML file of arguments, which the command line overrides. The result is a folder with
the images as PNG files and as one `.npz` for OpenAI's evaluator, `evaluation.json` and `evaluation.md`. If interrupted,
rerun the same command to resume.

The paper's protocol, on one or many GPUs:

    accelerate launch examples/evaluate.py --model user/var-d16-256 --preset imagenet256 --dtype float16 \
        --output_dir outputs/evaluation

In another domain, against a data set and with features of one's own (see docs/evaluation.md):

    accelerate launch examples/evaluate.py --model user/var --reference user/images --num_images 10000 \
        --feature_extractor my_package:make_extractor --output_dir outputs/evaluation
"""

import sys
from collections.abc import Sequence

from hf_var.cli.jobs import evaluate


def main(argv: Sequence[str] | None = None) -> None:
    evaluate(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
