# SPDX-License-Identifier: Apache-2.0
"""The adversarial part of the tokenizer's objective (Esser et al. 2021, section 3.1)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..ranges import CheckedFields, NonNegativeFloat, NonNegativeInt, OneOf, PositiveInt, argument
from .adversarial_losses import LOSSES, LeCamPenalty, adaptive_weight, adversarial_ramp, r1_penalty
from .augmentation import POLICIES, diff_augment
from .discriminators import DISCRIMINATORS, make_discriminator
from .optimization import Optimization, OptimizerConfig
from .random_numbers import position_generator
from .run import TrainingRun


Metrics = dict[str, torch.Tensor]

# With 0.9 the training oscillates (Radford et al. 2016, section 4).
DISCRIMINATOR_BETA1 = 0.5
# Each has its own random stream.
GENERATOR_PASS, REAL_PASS, FAKE_PASS = range(3)


@dataclass(kw_only=True)
class AdversaryConfig(CheckedFields):
    """The discriminator and its part in a tokenizer's objective."""

    adversarial_weight: NonNegativeFloat = argument(
        0.0, help="weight of the discriminator's judgement; 0: no discriminator"
    )
    discriminator: Annotated[str, OneOf(*DISCRIMINATORS)] = argument("patchgan", help="patchgan or stylegan")
    discriminator_channels: PositiveInt = argument(64, help="width of its first layer")
    discriminator_layers: PositiveInt = argument(3, help="downsampling layers of a patchgan")
    discriminator_start: NonNegativeInt = argument(0, help="step from which on the discriminator is trained")
    discriminator_ramp_steps: NonNegativeInt = argument(
        0, help="steps after that over which its weight in the tokenizer's loss rises from zero"
    )
    adversarial_loss: Annotated[str, OneOf(*LOSSES)] = argument("hinge", help="hinge or non_saturating")
    adaptive_weight: bool = argument(True, help="balance the gradients of reconstruction and judgement, as VQGAN does")
    adaptive_weight_min: NonNegativeFloat = 0.0
    adaptive_weight_max: NonNegativeFloat = 1e4
    r1_weight: NonNegativeFloat = argument(0.0, help="gamma of the penalty on gradients at real images")
    lecam_weight: NonNegativeFloat = argument(0.0, help="weight of the LeCam regularisation")
    diffaugment: list[Annotated[str, OneOf(*POLICIES)]] = field(
        default_factory=list, metadata={"help": "what the discriminator's images go through: color translation cutout"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive_weight_min > self.adaptive_weight_max:
            raise ValueError(
                f"`adaptive_weight_max` must be at least `adaptive_weight_min` = {self.adaptive_weight_min}, got "
                f"{self.adaptive_weight_max}."
            )


@dataclass(eq=False)
class Adversary:
    """
    Adversarial training of tokenizer and discriminator; both learn from every batch. A training adds
    [`Adversary.generator_loss`] to the tokenizer's loss and calls [`Adversary.learn`], each once per batch, and
    [`Adversary.finish_step`] once per optimizer step. R1's penalty shares the forward and the backward pass of the
    discriminator's loss, so that each parameter is visited once, as `DistributedDataParallel` requires;
    `torch.compile` has no second derivatives for it. The generator's pass bypasses the wrapper, with frozen
    parameters, and leaves no gradients in the discriminator.
    """

    config: AdversaryConfig
    discriminator: nn.Module
    seed: int = 0
    optimization: Optimization | None = None

    def __post_init__(self) -> None:
        # Keeping a compiled wrapper would make Accelerate take the distributed one out of it for good.
        self.bare_discriminator = extract_model_from_parallel(self.discriminator, keep_torch_compile=False)
        self.compute_discriminator_loss, self.compute_generator_loss = LOSSES[self.config.adversarial_loss]
        self.lecam_penalty = LeCamPenalty()

    def is_active(self, step: int) -> bool:
        """Whether the discriminator takes part in this step, counted from 0."""
        return step >= self.config.discriminator_start

    def generator_loss(
        self,
        sample: torch.Tensor,
        reconstruction_loss: torch.Tensor,
        last_layer: torch.Tensor,
        step: int,
        position: int,
    ) -> tuple[torch.Tensor, Metrics]:
        """
        What to add to the tokenizer's loss for reconstructions `(batch, in_channels, height, width)`, and the metrics
        `generator_loss` (without weights) and `adversarial_weight` (all weights together). `reconstruction_loss` is
        that of pixels and features with their weights. `step` and `position`, the number of the batch among those of
        all processes, are counted from 0; augmentation follows from the latter and the seed alone.
        """
        config = self.config
        with _frozen(self.bare_discriminator):
            logits = self.bare_discriminator(self._augment(sample.float(), position, GENERATOR_PASS))
        adversarial_loss = self.compute_generator_loss(logits.float())
        ramp = adversarial_ramp(step, config.discriminator_start, config.discriminator_ramp_steps)
        weight = torch.tensor(config.adversarial_weight * ramp, device=sample.device)
        if config.adaptive_weight:
            bounds = config.adaptive_weight_min, config.adaptive_weight_max
            weight = weight * adaptive_weight(reconstruction_loss, adversarial_loss, last_layer, *bounds)
        return weight * adversarial_loss, {"generator_loss": adversarial_loss.detach(), "adversarial_weight": weight}

    def discriminator_loss(
        self, target: torch.Tensor, sample: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, Metrics]:
        """
        The discriminator's whole loss for images and their reconstructions, whose gradient is cut off here, and the
        metrics `discriminator_loss` (without penalties), `real_logits` and `fake_logits` (means) and, if in use,
        `r1_penalty` and `lecam_penalty` (without weights).
        """
        config = self.config
        real, fake = target.detach().float(), sample.detach().float()
        if config.r1_weight > 0:
            # Before the augmentation, because the penalty applies to the images themselves.
            real.requires_grad_()
        shown = [self._augment(real, position, REAL_PASS), self._augment(fake, position, FAKE_PASS)]
        # Stacked, not mixed: groups of images and groups of reconstructions stay apart.
        real_logits, fake_logits = self.discriminator(torch.cat(shown)).float().chunk(2)
        loss = self.compute_discriminator_loss(real_logits, fake_logits)
        metrics = {"discriminator_loss": loss, "real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
        if config.r1_weight > 0:
            metrics["r1_penalty"] = r1_penalty(real_logits, real)
            # The papers' gamma is that of half the penalty.
            loss = loss + config.r1_weight / 2 * metrics["r1_penalty"]
        if config.lecam_weight > 0:
            metrics["lecam_penalty"] = self.lecam_penalty(real_logits, fake_logits)
            loss = loss + config.lecam_weight * metrics["lecam_penalty"]
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def learn(self, target: torch.Tensor, sample: torch.Tensor, position: int) -> Metrics:
        """A step of the discriminator: minimize [`Adversary.discriminator_loss`], and return its metrics."""
        loss, metrics = self.discriminator_loss(target, sample, position)
        cast(Optimization, self.optimization).minimize(loss)
        return metrics

    def finish_step(self) -> None:
        """After an optimizer step, on all processes."""
        self.lecam_penalty.finish_step()
        if self.optimization is not None:
            self.optimization.finish_step()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint apart from the discriminator, valid between two optimizer steps."""
        optimization = None if self.optimization is None else self.optimization.state_dict()
        return {"lecam_averages": self.lecam_penalty.averages, "optimization": optimization}

    def sharded_tensors(self) -> dict[str, torch.Tensor]:
        """What of the state is sharded."""
        sharded = {} if self.optimization is None else self.optimization.sharded_tensors()
        return {f"optimization/{name}": tensor for name, tensor in sharded.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where [`Adversary.state_dict`] was taken."""
        self.lecam_penalty.averages = state_dict["lecam_averages"]
        if self.optimization is not None:
            self.optimization.load_state_dict(state_dict["optimization"])

    def _augment(self, images: torch.Tensor, position: int, place: int) -> torch.Tensor:
        if not self.config.diffaugment:
            return images
        return diff_augment(images, self.config.diffaugment, position_generator(self.seed, position, place))


def minimize_reconstruction(
    optimization: Optimization,
    adversary: Adversary | None,
    images: tuple[torch.Tensor, torch.Tensor],
    losses: tuple[torch.Tensor, torch.Tensor],
    last_layer: torch.Tensor,
    run: TrainingRun,
) -> tuple[torch.Tensor, Metrics]:
    """
    Learn from a batch of `images`, targets and their reconstructions, whose `losses` are those of the reconstruction and
    of all else; `adversary` is one that takes part in this step of the `run`. Returns the whole loss and its metrics.
    """
    (target, sample), (reconstruction_loss, other_loss) = images, losses
    loss, metrics = reconstruction_loss + other_loss, {}
    if adversary is not None:
        judgement, metrics = adversary.generator_loss(sample, reconstruction_loss, last_layer, run.step, run.position)
        loss = loss + judgement
    optimization.minimize(loss)
    if adversary is not None:
        metrics |= adversary.learn(target, sample, position=run.position)
    return loss, metrics


def make_adversary(
    config: AdversaryConfig,
    image_shape: tuple[int, int, int],
    optimizer: OptimizerConfig,
    accelerator: Accelerator,
    batch_size: int,
    max_train_steps: int,
    seed: int,
) -> Adversary:
    """
    The adversary of an autoencoder that is trained for `max_train_steps` on images of `image_shape`, channels, height and
    width. Its discriminator has the autoencoder's optimizer, with less momentum and without an average.
    """
    discriminator = make_discriminator(
        config.discriminator,
        image_shape[0],
        image_shape[1:],
        batch_size,
        base_channels=config.discriminator_channels,
        num_layers=config.discriminator_layers,
    )
    own = replace(optimizer, adam_beta1=DISCRIMINATOR_BETA1, weight_decay_end=None, ema_decay=0.0)
    num_steps = max_train_steps - config.discriminator_start
    optimization = Optimization(accelerator, discriminator, own, num_steps)
    return Adversary(config, optimization.model, seed, optimization)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Context in which `module` passes gradients to its inputs, but not to its parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
