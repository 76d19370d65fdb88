# SPDX-License-Identifier: Apache-2.0
"""
Evaluate a pipeline by the protocol of published figures: FID, sFID, Inception Score, precision, recall and KID; or a
tokenizer: rFID, PSNR, SSIM, LPIPS and the usage of its codes.

The first argument may be a recipe, a YAML file of arguments; the command line counts more. The result is a folder with the
images as PNG files and as one `.npz` for OpenAI's evaluator, `evaluation.json` and `evaluation.md`. A run that was killed
goes on when the same command is given again.

The paper's protocol, on one or many GPUs:

    accelerate launch examples/evaluate.py --model user/var-d16-256 --preset imagenet256 --dtype float16 \
        --output_dir outputs/evaluation

In another domain, against a data set and with features of one's own (see docs/evaluation.md):

    accelerate launch examples/evaluate.py --model user/var --reference user/images --num_images 10000 \
        --feature_extractor my_package:make_extractor --output_dir outputs/evaluation
"""

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from hf_var.cli.arguments import parse_arguments
from hf_var.evaluation.arguments import EvaluationArguments
from hf_var.evaluation.run import evaluate


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_arguments([EvaluationArguments], sys.argv[1:] if argv is None else argv)
    # Processes wait for each other, as long as it takes: shares differ, and the reference may have to be downloaded.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    evaluate(args, accelerator)
    if accelerator.is_main_process:
        print((Path(args.output_dir) / "evaluation.md").read_text(encoding="utf-8"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
