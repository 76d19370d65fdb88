# SPDX-License-Identifier: Apache-2.0
"""The loop of all trainings of a prior: what is left to the scripts happens between its steps."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from ..data import TrainingBatches, ValidationBatches
from ..metrics.likelihood import CodePredictions, measure_likelihood
from .optimization import Optimization
from .run import TrainingRun


# What is plotted of the log, where the run has it, and what the card states, with the captions of its pictures.
CURVES = ("loss", "validation_bits_per_token", "validation_accuracy", "gradient_norm", "learning_rate")
METRICS = ("loss", "bits_per_token", "accuracy")
CAPTIONS = {"samples.png": "Samples, not chosen.", "curves.png": "The training."}

Inputs = Callable[[dict[str, torch.Tensor]], dict[str, Any]]


def train_prior(
    run: TrainingRun,
    optimization: Optimization,
    batches: TrainingBatches,
    validation: ValidationBatches | None,
    make_inputs: Inputs,
    make_validation_inputs: Inputs | None = None,
) -> Iterator[None]:
    """
    Train and validate the model of `optimization` until the end of the `run`, inside of `run.started`; control returns after
    every step, before its checkpoint. `make_inputs` maps a batch to the model's arguments, with `labels` or `soft_labels`;
    where it changes them at random, `make_validation_inputs` does not.
    """
    accelerator, config = optimization.accelerator, cast(Any, optimization.weights.config)
    predictions = CodePredictions(config.scale_lengths, accelerator.device)
    for batch in run.until_the_end(batches):
        inputs = make_inputs(batch)
        with accelerator.accumulate(optimization.model):
            output = optimization.model(**inputs)
            optimization.minimize(output.loss)
        run.add(output.loss)
        if run.is_logged(run.step + 1):
            # Of probabilities the most probable code counts.
            targets = inputs["labels"] if "labels" in inputs else inputs["soft_labels"].argmax(dim=-1)
            predictions.add(output.logits, targets)
        # The logits are large, and the next ones come before these would go.
        del output
        if not accelerator.sync_gradients:
            continue
        optimization.finish_step()
        run.finish_step(optimization.learning_rate, optimization.gradient_norm, broken_images=batches.broken_images)
        if run.is_logged(run.step):
            run.write(predictions.compute(accelerator), prefix="train_")
            predictions.reset()
        if validation is not None and run.is_due(run.config.validation_steps):
            with optimization.averaged():
                metrics = measure_likelihood(
                    optimization.weights, make_validation_inputs or make_inputs, validation, accelerator
                )
            run.write_validation(metrics, {})
        yield
        run.save_if_due()
