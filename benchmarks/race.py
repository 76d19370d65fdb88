# SPDX-License-Identifier: Apache-2.0
"""
Race all models of the second stage at equal core-seconds: the same data, the same evaluation, one thread each.

    python benchmarks/race.py digits --seconds 240 --seeds 0 1 2 --output outputs/race_digits
    python benchmarks/race.py cifar10 --seconds 1200 --seeds 0 --train_data "cifar10/train-*.parquet" \
        --test_data "cifar10/test-*.parquet" --output outputs/race_cifar10

The entrants are VAR; the same transformer in raster order, VQGAN's GPT and a PixelCNN, all three over one plain tokenizer; the
RQ-Transformer; VQ-VAE-2 with two PixelSNAILs; a DiT on the latents of a KL autoencoder; and a KL autoencoder alone, which has
no classes and is sampled from N(0, I). `--entrants` chooses some. The scripts in examples/ train them by their recipes, the DiT a
plain loop (racing/dit.py).

**Budget.** Each entrant has `--seconds` core-seconds: the processor time of all that its trainings do, reading data and
writing results included, imports not. The first stage has `--first_share` of it, the second what the first and the coding
of the images leave. The KL autoencoder alone has one stage. Two short trainings or three give what a step costs, and the steps
that fit are the length of the schedule (warm-up and the unquantized steps of a tokenizer keep their share of it). Between
seeds what a step costs is taken from the last training. The table has the core-seconds that were really used. A tokenizer
that several entrants share is trained once and counts for each of them. Calibrations and evaluation do not count. The second
stage is trained on the codes (or latents) of `--copies` augmented copies of each image, the same number for all; on CIFAR-10 two
copies are the image and its mirror image. There is no validation during a training.

**Evaluation.** Equally many samples of each class without guidance, of all codes, at temperature 1 and with the same
generator seed:

reconstruction   PSNR of unseen images through the first stage, for context: no second stage makes up for what it loses.
bits             sum over the codes of -log2 of their likelihood, given the class, mean over unseen images. Tokenizers differ,
                 so this compares only entrants with the same tokenizer; the others have none.
recognised       share of the samples in which a classifier sees the class that was asked for.
Frechet distance, precision, recall
                 of the samples and the unseen images, see hf_var.metrics.generation, in the features of racing/judges.py: the
                 pixels of the digits, the small classifier's features of CIFAR-10. They compare only within a data set.
ms               core-milliseconds of an image, in batches of 64 (mean) and alone (median).

The first row has training images in place of samples. With several seeds a cell has the median and, in brackets, the smallest
and the largest value. The second table has the time of an image for larger maps, with random weights (racing/growth.py).

The output folder keeps every result, so the command may be interrupted and continued, and further seeds or entrants be added:
what is there is not made again. `--table` prints the tables from what is there. `samples.png` shows all entrants of the first seed.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from racing.entrants import DATA_SETS, ENTRANTS, Entrant, find_entrants
from racing.evaluation import Evaluation, evaluate, evaluate_real
from racing.growth import ROUNDS, SIDES, measure_growth
from racing.judges import train_classifier
from racing.processes import REPOSITORY, read_json, run_process, write_json
from racing.tables import EVALUATION, GROWTH, REAL, draw_samples, growth_table, race_table
from racing.trainings import Race, tell

from hf_var.data import load_source


CLASSIFIER = "classifier"
# What must stay the same in a folder of results.
SETTINGS = ("data", "seconds", "first_share", "copies", "steps", "train_data", "test_data", "num_samples", "tested")


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(DATA_SETS))
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=240, help="core-seconds of each entrant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    names = [entrant.name for entrant in ENTRANTS]
    parser.add_argument("--entrants", nargs="+", choices=names, help="default: all whose recipes exist")
    parser.add_argument("--train_data", help="parquet files; default: the digits, which are written")
    parser.add_argument("--test_data", help="parquet files of unseen images")
    parser.add_argument("--first_share", type=float, default=0.4, help="share of the first stage's core-seconds")
    parser.add_argument("--copies", type=int, help="copies of an image for the second stage; default: by data set")
    parser.add_argument("--num_samples", type=int, help="default: by data set")
    parser.add_argument("--tested", type=int, help="unseen images to code; default: by data set")
    parser.add_argument("--classifier_epochs", type=int, default=3, help="of the classifier of CIFAR-10")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="maps of the second table")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="calls for each time of the second table")
    parser.add_argument("--steps", type=int, help="steps of all trainings in place of a budget, to try the command")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args(argv)
    data = DATA_SETS[args.data]
    for name in ("copies", "num_samples", "tested"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(data, name))
    if "horizontal_flip" in data.augmentation and args.copies != 1 and args.copies % 2:
        parser.error(f"`copies` must be 1 or even on {args.data}, whose copies come with mirror images")
    if args.data == "digits" and args.train_data is None:
        args.train_data, args.test_data = (
            str(args.output / "digits" / f"{half}.parquet") for half in ("train", "test")
        )
    if args.train_data is None or args.test_data is None:
        parser.error(f"{args.data} needs --train_data and --test_data")
    return args


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a folder with results of another race."""
    path = args.output / "settings.json"
    settings = {name: getattr(args, name) for name in SETTINGS}
    known = read_json(path)
    if known is None:
        write_json(path, settings)
        return
    changed = [
        f"{name} = {settings[name]!r}, was {value!r}" for name, value in known.items() if settings[name] != value
    ]
    if changed:
        raise SystemExit(f"{args.output} has results of other settings ({'; '.join(changed)}): take another folder.")


def prepare_digits(folder: Path) -> None:
    """Write the digits, if they are not there."""
    if (folder / "test.parquet").is_file():
        return
    spec: Any = importlib.util.spec_from_file_location("prepare_digits", REPOSITORY / "examples/prepare_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(folder)])


def run(args: argparse.Namespace, entrants: list[Entrant]) -> None:
    data, output = DATA_SETS[args.data], args.output
    if args.data == "digits":
        prepare_digits(output / "digits")
    # datasets converts what it reads for the first time, which must not count as a training's work.
    load_source("train_data", args.train_data, None, ["train"])
    race = Race(data, args.train_data, output, args.seconds, args.first_share, args.copies, args.steps)
    settings = Evaluation(
        args.data, args.train_data, args.test_data, output / f"{CLASSIFIER}.safetensors", args.num_samples, args.tested
    )

    def once(name: str, function: Any, *arguments: Any) -> None:
        path = output / f"{name}.json"
        if not path.is_file():
            tell(name)
            run_process(function, *arguments, log=output / f"{name}.log", result=path)

    if args.data == "cifar10":
        sources = args.train_data, args.test_data
        once(CLASSIFIER, train_classifier, *sources, str(settings.classifier), args.classifier_epochs)
    once(REAL, evaluate_real, settings, output / f"{REAL}.png")
    for seed in args.seeds:
        for entrant in entrants:
            write_json(race.folder(seed, f"{entrant.name}.usage.json"), race.train(seed, entrant))
            last = (entrant.tokenizer, *entrant.priors)[-1]
            folder, picture = race.folder(seed, last.name), race.folder(seed, f"{entrant.name}.png")
            name = f"seed{seed}/{entrant.name}{EVALUATION.removesuffix('.json')}"
            once(name, evaluate, settings, entrant, folder, picture)
    for entrant in entrants:
        once(f"{GROWTH}/{entrant.name}", measure_growth, data, entrant, tuple(args.sides), args.rounds)


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    entrants = find_entrants(args.entrants, args.data)
    torch.set_num_threads(1)
    if not args.table:
        check_settings(args)
        run(args, entrants)
        draw_samples(args.output, args.seeds[0], entrants, args.output / "samples.png")
    print(race_table(args.output, args.seeds, entrants))
    print()
    print(growth_table(args.output, entrants))


if __name__ == "__main__":
    main()
