# SPDX-License-Identifier: Apache-2.0
"""Training of codebooks apart from gradients: k-means start, moving averages, restarts and statistics."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from ..autoencoders import Tokenizer, TokenizerConfig, VQVAEConfig, VQVAEOutput
from ..autoencoders.codebook import AveragedCodebook
from ..autoencoders.quantization import ScaleCallback
from ..metrics.codebook_usage import DEAD_THRESHOLD, CodeStatistics, energy_metrics, residual_energy
from ..ranges import CheckedFields, NonNegativeInt, OneOf, PositiveInt, Share, argument
from .average import AveragedWeights
from .codebook import (
    MovingAverageCodebook,
    SequentialMovingAverageCodebook,
    codebook_parts,
    initialize_codebook,
    kmeans_vectors,
    restart_dead_codes,
)
from .random_numbers import position_generator


# By `codebook_update`: what moves the codes in place of a gradient.
MOVING_AVERAGES: dict[str, Any] = {
    "gradient": None,
    "ema": MovingAverageCodebook,
    "sequential_ema": SequentialMovingAverageCodebook,
}
# Apart from those of the adversary, which begin at 0.
RESTART_STREAM = 3


@dataclass(kw_only=True)
class CodebookConfig(CheckedFields):
    """How a [`CodebookTraining`] keeps the codebook in use."""

    unquantized_steps: NonNegativeInt = argument(0, help="first steps, in which the features are not quantized")
    kmeans_images: NonNegativeInt = argument(
        0, help="images for a k-means start of the codebook after unquantized_steps; 0: none"
    )
    codebook_update: Annotated[str, OneOf(*MOVING_AVERAGES)] = argument(
        "gradient", help="gradient, ema for moving averages, or sequential_ema for those of RQ-VAE, after every scale"
    )
    codebook_window: PositiveInt = argument(
        100, help="steps over which the codes' use is counted before dead ones are moved"
    )
    restart_until: Share = argument(
        0.0,
        help="move dead codes during this share of the training; 0: never. With sequential_ema in every forward pass "
        "those that less than one vector chooses on average",
    )
    restart_threshold: Share = argument(
        DEAD_THRESHOLD, help="dead: chosen less than this many times as often as the average code"
    )


@dataclass(eq=False)
class CodebookTraining:
    """k-means start, moving averages and restarts of codebooks, whose weights' `average` jumps with the codes."""

    config: CodebookConfig
    vqvae: Tokenizer
    accelerator: Accelerator
    max_train_steps: int
    seed: int
    average: AveragedWeights | None

    def __post_init__(self) -> None:
        self.parts = codebook_parts(self.vqvae)
        averages = MOVING_AVERAGES[self.config.codebook_update]
        self.moving_averages = [] if averages is None else [averages(part) for part in self.parts]
        for codebook in self.vqvae.codebooks:
            if isinstance(codebook, AveragedCodebook) and averages is None:
                codebook.forget_averages()
        self.statistics = CodeStatistics(self.vqvae.config, self.accelerator.device)

    def is_quantized(self, step: int) -> bool:
        """Whether the tokenizer quantizes in this step, counted from 0."""
        return step >= self.config.unquantized_steps

    def is_started_at(self, step: int) -> bool:
        """Whether [`CodebookTraining.start`] comes before this step."""
        return step == self.config.unquantized_steps and self.config.kmeans_images > 0

    def start(self, pixel_values: torch.Tensor, batch_size: int) -> None:
        """Set the codes by k-means on the features of images, encoded `batch_size` at a time."""
        self.vqvae.eval()
        for index, part in enumerate(self.parts):
            # Again for each codebook: a level's features depend on the codes of the coarser ones.
            with torch.no_grad(), self.accelerator.autocast():
                batches: Any = [batch.to(self.accelerator.device) for batch in pixel_values.split(batch_size)]
                features = [cast(Any, self.vqvae.encode(batch)).features for batch in batches]
            initialize_codebook(self.vqvae, part, features, self.seed)
            self._restart_averages(index)
        self.vqvae.train()

    def scale_callback(self, step: int, position: int) -> ScaleCallback | None:
        """
        What the tokenizer calls after every scale of a forward pass, the one with the number `position` among those of
        all processes in this step, both counted from 0; nothing unless the codes move there.
        """
        if self.config.codebook_update != "sequential_ema":
            return None
        (averages,) = self.moving_averages
        if self._restarts_after(step):
            return partial(averages.move, restarts=position_generator(self.seed, position, RESTART_STREAM))
        return averages.move

    def observe(self, output: VQVAEOutput) -> None:
        """After a forward pass: count its codes, and note the vectors that chose them."""
        if output.codes is not None:
            self.statistics.count(output.codes)
            if self.config.codebook_update == "ema":
                for moving_average in self.moving_averages:
                    moving_average.observe(cast(torch.Tensor, output.quantizer_inputs), output.codes)

    def finish_step(self, step: int) -> None:
        """After an optimizer step, before its average: move the codes by what was observed."""
        if not self.is_quantized(step):
            return
        for index, moving_average in enumerate(self.moving_averages):
            if isinstance(moving_average, MovingAverageCodebook):
                moving_average.finish_step()
            elif self._restarts_after(step):
                self._restart_average(index, moving_average.restarted)
                moving_average.restarted.zero_()

    def finish_window(self, output: VQVAEOutput, steps: int) -> dict[str, float]:
        """How the codes were used, if a window ends after `steps` steps, after which unused ones restart."""
        config = self.config
        if output.codes is None or steps % config.codebook_window != 0:
            return {}
        features = cast(torch.Tensor, output.features)
        metrics = self.statistics.compute() | energy_metrics(residual_energy(self.vqvae, features, output.codes))
        hits = self.statistics.hits.chunk(len(self.parts))
        for index, part in enumerate(self.parts):
            # Saved with the weights.
            part.codebook.running_hits.copy_(hits[index] / config.codebook_window)
            if config.codebook_update != "sequential_ema" and self._restarts_after(steps):
                inputs = cast(torch.Tensor, output.quantizer_inputs)
                total = hits[index].sum(dim=0)
                moved = restart_dead_codes(part, total, inputs, self.seed + steps, config.restart_threshold)
                self._restart_averages(index, moved)
        self.statistics.reset()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Counts and averages. All processes have to call this together."""
        averages = [moving_average.state_dict() for moving_average in self.moving_averages]
        return {"statistics": self.statistics.state_dict(), "moving_averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where [`CodebookTraining.state_dict`] was taken."""
        self.statistics.load_state_dict(state_dict["statistics"])
        for moving_average, state in zip(self.moving_averages, state_dict["moving_averages"], strict=True):
            moving_average.load_state_dict(state)

    def _restarts_after(self, steps: int) -> bool:
        """Whether unused codes restart after so many steps."""
        return steps < self.config.restart_until * self.max_train_steps

    def _restart_averages(self, index: int, codes: torch.Tensor | None = None) -> None:
        """Codes of a codebook that jumped (all, if `None`) are not averaged with what they were before."""
        if self.moving_averages:
            self.moving_averages[index].restart(codes)
        self._restart_average(index, codes)

    def _restart_average(self, index: int, codes: torch.Tensor | None) -> None:
        """The same for the average of the weights alone."""
        if self.average is not None:
            vectors = self.parts[index].codebook.vectors
            (name,) = (name for name, parameter in self.vqvae.named_parameters() if parameter is vectors)
            self.average.restart(name, vectors, codes)


class VQVAEWarmup(nn.Module):
    """
    A tokenizer whose `forward`, all that distributed training wraps, can skip the quantizer, or call something after
    every scale.
    """

    def __init__(self, vqvae: Tokenizer):
        super().__init__()
        self.vqvae = vqvae

    def forward(
        self,
        pixel_values: torch.Tensor,
        quantize: bool = True,
        callback_on_scale_end: ScaleCallback | None = None,
    ) -> VQVAEOutput:
        """Output of the tokenizer, without codes unless `quantize`."""
        # Distributed training waits for a gradient of every parameter: the quantizer may not be used at all, and a
        # schedule of few scales does not use all refinement convolutions.
        names = ("quantizer.", "codebooks.")
        parameters = [item for name, item in self.vqvae.named_parameters() if name.startswith(names)]
        nothing = 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum() if parameters else 0.0
        options = {} if callback_on_scale_end is None else {"callback_on_scale_end": callback_on_scale_end}
        output = self.vqvae(pixel_values, quantize=quantize, **options)
        output.loss = output.loss + nothing
        return output


def check_codebook(config: CodebookConfig, tokenizer: TokenizerConfig) -> None:
    """
    Raise a `ValueError` if code vectors that are not weights are moved, `kmeans_images` give too few vectors, or an
    update after every scale has other levels than those, or a threshold.
    """
    if config.codebook_update == "sequential_ema":
        if tokenizer.num_codebooks > 1 or not isinstance(tokenizer, VQVAEConfig):
            raise ValueError(
                "`codebook_update` must be 'gradient' or 'ema' for a hierarchical tokenizer, whose levels have codebooks "
                "of their own, got 'sequential_ema'."
            )
        if config.restart_threshold != DEAD_THRESHOLD:
            raise ValueError(
                "`restart_threshold` must be left out with codebook_update='sequential_ema', got "
                f"{config.restart_threshold}: codes restart that less than one vector chooses on average."
            )
    for name, value in {"kmeans_images": 0, "restart_until": 0.0, "codebook_update": "gradient"}.items():
        if not tokenizer.has_trainable_codes and getattr(config, name) != value:
            raise ValueError(
                f"`{name}` must be {value} with quantizer={tokenizer.quantizer!r}, whose code vectors are fixed, got "
                f"{getattr(config, name)!r}."
            )
    vectors = kmeans_vectors(tokenizer, config.kmeans_images)
    if config.kmeans_images > 0 and vectors < tokenizer.codebook_size:
        raise ValueError(
            f"`kmeans_images` = {config.kmeans_images} gives {vectors} vectors, too few for `codebook_size` = "
            f"{tokenizer.codebook_size}."
        )
