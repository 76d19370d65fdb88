# SPDX-License-Identifier: Apache-2.0
"""
The trainings of a race, each within its budget, with their results in a folder:

    seed0/NAME/        what a training made, and seed0/NAME.yaml, .log and .json: its arguments, output and core-seconds
    rates/NAME.json    what a step costs, by a calibration and then by the training of the seed before

What is there is not made again. A training that was interrupted begins anew, so that its core-seconds are those of one run.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_var.cli.arguments import read_recipe
from hf_var.data import load_source

from .budget import Rate, calibrate, schedule
from .entrants import DIT, DataSet, Entrant, Training
from .processes import read_json, run_process, run_script, write_json


TOKENIZE = "examples/tokenize_dataset.py"
CODES = "*.parquet"


@dataclass(frozen=True)
class Race:
    """
    What is the same for all entrants.

    Args:
        data (`DataSet`): Images.
        train_data (`str`): Parquet files of the training images.
        output (`Path`): Folder of the results.
        seconds (`float`): Core-seconds of each entrant, of both stages.
        first_share (`float`): Share of the first stage; the second has what the first leaves.
        copies (`int`): Changed copies of an image that the second stage is trained on.
        steps (`int`, *optional*): Steps of all trainings, in place of budgets: for tests.
    """

    data: DataSet
    train_data: str
    output: Path
    seconds: float
    first_share: float
    copies: int
    steps: int | None = None

    @property
    def _augmentation(self) -> dict[str, Any]:
        """That of the second stage's copies, of which a single one is the image as it is."""
        return self.data.augmentation if self.copies > 1 else {}

    def folder(self, seed: int, name: str) -> Path:
        """Where a training leaves its result."""
        return self.output / f"seed{seed}" / name

    def train(self, seed: int, entrant: Entrant) -> dict[str, Any]:
        """Train an entrant, and say what each part of it cost. Parts that entrants share are trained once."""
        tokenizer = entrant.tokenizer
        images = {"train_data": self.train_data, **self.data.reading, **self.data.augmentation}
        budget = self.seconds * (self.first_share if entrant.priors else 1)
        usage = {"first": self._training(seed, tokenizer, budget, images)}
        if not entrant.priors:
            return usage
        first = self.folder(seed, tokenizer.name)
        codes = self.folder(seed, f"{tokenizer.name}_codes")
        is_diffusion = entrant.priors[0].script == DIT
        usage["codes"] = (self._latents if is_diffusion else self._codes)(seed, first, codes)
        left = self.seconds - sum(part["seconds"] for part in usage.values())
        coarser: list[str] = []
        for training in entrant.priors:
            if is_diffusion:
                inputs = {"autoencoder": str(first), "latents": str(codes / "latents.safetensors"), **self.data.dit}
            else:
                inputs = {"vqvae": str(first), "train_data": str(codes / CODES), "train_split": None}
                inputs |= {"augmented_copies": 0, "num_samples": 0}
            if coarser and training is entrant.priors[-1]:
                inputs["coarser_priors"] = coarser
            usage[training.name] = self._training(seed, training, left * training.share, inputs)
            coarser = [*coarser, str(self.folder(seed, training.name))]
        return usage

    # ----------------------------------------------------------------------------------------------------------------

    def _training(self, seed: int, training: Training, budget: float, inputs: Mapping[str, Any]) -> dict[str, Any]:
        folder = self.folder(seed, training.name)

        def run(folder: Path, steps: int) -> float:
            arguments = self._arguments(training, steps, inputs, seed, folder)
            return self._measured(training.script, folder, arguments)

        def train() -> dict[str, Any]:
            if self.steps is not None:
                return {"seconds": run(folder, self.steps), "steps": self.steps, "budget": None}
            path = self.output / "rates" / f"{training.name}.json"
            known = read_json(path)
            if known is None:
                tell(f"calibrating {training.name}")
                rate = calibrate(lambda steps: run(path.with_suffix(""), steps), budget)
                shutil.rmtree(path.with_suffix(""))
                write_json(path, asdict(rate))
            else:
                rate = Rate(**known)
            steps = rate.steps_within(budget)
            tell(f"seed {seed}, {training.name}: {steps} steps for {budget:.1f} core-seconds")
            seconds = run(folder, steps)
            write_json(path, asdict(rate.after(steps, seconds)))
            return {"seconds": seconds, "steps": steps, "budget": budget}

        return self._once(seed, training.name, train)

    def _arguments(
        self, training: Training, steps: int, inputs: Mapping[str, Any], seed: int, folder: Path
    ) -> dict[str, Any]:
        """What is other than in the recipe."""
        recipe = training.recipe_path(self.data.name)
        arguments = {"output_dir": str(folder), "seed": seed, **inputs}
        if recipe is None:
            return {**arguments, "max_train_steps": steps, "lr_warmup_steps": min(100, steps // 10)}
        known = read_recipe(recipe)
        arguments = {"base": str(recipe), **arguments, **schedule(known, steps)}
        # Validation, checkpoints and pictures are no part of the race.
        arguments |= {"validation_data": None, "checkpointing_steps": 0, "resume_from_checkpoint": None}
        return {**arguments, "report_to": "none"}

    def _codes(self, seed: int, tokenizer: Path, folder: Path) -> dict[str, Any]:
        """The codes of changed copies of the training images."""
        arguments = {"data": self.train_data, "vqvae": str(tokenizer), "output_dir": str(folder), "seed": seed}
        arguments |= {"num_crops": self.copies, **self.data.reading, **self._augmentation}
        if "horizontal_flip" in self._augmentation:
            # Each crop comes with its mirror image.
            arguments["num_crops"] = self.copies // 2
        usage = self._once(seed, folder.name, lambda: {"seconds": self._measured(TOKENIZE, folder, arguments)})
        # datasets converts files that it reads for the first time, which is no part of any training.
        load_source("train_data", str(folder / CODES), None, ["train"])
        return usage

    def _latents(self, seed: int, autoencoder: Path, folder: Path) -> dict[str, Any]:
        """The same without a quantizer."""
        arguments = {
            "train_data": self.train_data,
            "autoencoder": str(autoencoder),
            "copies": self.copies,
            "seed": seed,
        }
        arguments |= {"latents": str(folder / "latents.safetensors"), **self.data.reading, **self._augmentation}
        return self._once(
            seed, folder.name, lambda: {"seconds": self._measured(DIT, folder, arguments, command=["latents"])}
        )

    def _once(self, seed: int, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder(seed, f"{name}.json")
        usage = read_json(path)
        if usage is None:
            usage = make()
            write_json(path, usage)
            tell(f"seed {seed}, {name}: {usage['seconds']:.1f} core-seconds")
        return usage

    def _measured(
        self, script: str, folder: Path, arguments: Mapping[str, Any], command: list[str] | None = None
    ) -> float:
        """Core-seconds of a script with a recipe of its own, which is kept beside its folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = folder.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(dict(arguments), sort_keys=False), encoding="utf-8")
        command = (["train"] if script == DIT else []) if command is None else command
        result = folder.with_name(f"{folder.name}.seconds")
        return run_process(run_script, script, [*command, str(recipe)], log=folder.with_suffix(".log"), result=result)


def tell(message: str) -> None:
    """Tell how far the race is, beside the tables."""
    print(message, file=sys.stderr, flush=True)
