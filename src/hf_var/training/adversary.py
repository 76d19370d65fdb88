# SPDX-License-Identifier: Apache-2.0
"""The adversarial part of the tokenizer's objective (Esser et al. 2021, section 3.1), and what keeps it stable."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, reduce
from torch import nn
from torch.nn import functional

from ..autoencoders import VQVAEConfig
from .augmentation import check_policies, diff_augment
from .discriminators import make_discriminator
from .optimization import make_optimizer


Figures = dict[str, torch.Tensor]

# Gradients of an image's pixels are below what fp16 can hold; a power of two leaves the other dtypes' digits alone.
GRADIENT_SCALE = 1024.0
# What is drawn for one place must not be drawn again for another.
GENERATOR_PASS, REAL_PASS, FAKE_PASS = range(3)


# --------------------------------------------------------------------------------------------------------------------
# Losses of both players. The discriminator's are sums over real and fake, without the factor 1/2 that VQGAN has.


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017), a scalar."""
    return functional.relu(1 - real_logits).mean() + functional.relu(1 + fake_logits).mean()


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the generator, a scalar: it falls without end, a negative value is nothing to worry about."""
    return -fake_logits.mean()


def non_saturating_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the discriminator (Goodfellow et al. 2014), a scalar."""
    return functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean()


def non_saturating_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss of the generator (Goodfellow et al. 2014, section 3), a scalar."""
    return functional.softplus(-fake_logits).mean()


Loss = Callable[..., torch.Tensor]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "non_saturating": (non_saturating_discriminator_loss, non_saturating_generator_loss),
}


# --------------------------------------------------------------------------------------------------------------------
# Regularisation and weights


def r1_penalty(real_logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    Mean squared length of the discriminator's gradient at real images (R1, Mescheder et al. 2018, section 4.1).

    Args:
        real_logits (`torch.FloatTensor` of shape `(batch, ...)`):
            Logits of `images`. Several logits of an image count as their mean, so that the penalty does not grow with
            the number of patches.
        images (`torch.FloatTensor` of shape `(batch, channels, height, width)`):
            Images that require a gradient and that `real_logits` was computed from.

    Returns:
        `torch.FloatTensor` of shape `()`, differentiable with respect to the discriminator's parameters.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    # Divided after the backward pass, whose small numbers fp16 would lose.
    gradient = gradient.float() / real_logits[0].numel()
    return gradient.square().sum(dim=(1, 2, 3)).mean()


class LeCamPenalty:
    r"""
    Holds the logits of each side to the running average of the other side's (LeCam, Tseng et al. 2021, section 3.2):
    \( E[(D(x) - \alpha_{fake})^2] + E[(D(\hat x) - \alpha_{real})^2] \). It keeps a discriminator in bounds that has
    few images to learn from.

    The averages begin with the means of the first step, which is therefore not penalised, and change once per optimizer
    step by the means of all its batches on all processes: so accumulation and several processes give the same.

    Args:
        decay (`float`, *optional*, defaults to 0.99): Decay of the averages.
    """

    def __init__(self, decay: float = 0.99):
        self.decay = decay
        self.averages: torch.Tensor | None = None  # (2,): real, fake
        self._means: list[torch.Tensor] = []

    def __call__(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Penalty of a batch, a scalar. The logits' means are noted for [`LeCamPenalty.finish_step`]."""
        self._means.append(torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()]))
        if self.averages is None:
            return real_logits.new_zeros(())
        real_average, fake_average = self.averages.to(real_logits.device)
        return (real_logits - fake_average).square().mean() + (fake_logits - real_average).square().mean()

    def finish_step(self) -> None:
        """Move the averages, if there was a batch since the last time."""
        if not self._means:
            return
        means = cast(torch.Tensor, reduce(torch.stack(self._means).mean(dim=0), reduction="mean"))
        self._means.clear()
        if self.averages is not None:
            means = torch.lerp(means, self.averages.to(means.device), self.decay)
        self.averages = means


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor,
    minimum: float,
    maximum: float,
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """
    The weight that makes the adversarial gradient as long as that of the reconstruction (Esser et al. 2021, equation 7).

    It is that of one batch on one process: no gradient is stored, none is exchanged between processes, and a batch gets
    the same weight whether it shares its step by accumulation or with other processes.

    Args:
        reconstruction_loss (`torch.FloatTensor` of shape `()`): Loss of pixels and features.
        adversarial_loss (`torch.FloatTensor` of shape `()`): The generator's loss without any weight.
        last_layer (`torch.Tensor`): Weight of the decoder's last layer, at which the gradients are compared.
        minimum (`float`): Lower bound of the weight.
        maximum (`float`): Upper bound of the weight.
        epsilon (`float`, *optional*, defaults to 1e-6): Added to the length of the adversarial gradient.

    Returns:
        `torch.FloatTensor` of shape `()`, without gradient.
    """
    lengths = []
    for loss in (reconstruction_loss, adversarial_loss):
        (gradient,) = torch.autograd.grad(GRADIENT_SCALE * loss, last_layer, retain_graph=True)
        lengths.append(gradient.float().norm() / GRADIENT_SCALE)
    return (lengths[0] / (lengths[1] + epsilon)).clamp(minimum, maximum)


def adversarial_ramp(step: int, start: int, ramp_steps: int) -> float:
    """
    Share of its weight that the adversarial loss has: 0 up to `start`, then rising in a line to 1 within `ramp_steps`.

    The discriminator trains from `start` on. The generator feels it by and by, once it has something to say: at once its
    first, random gradients would undo reconstructions that were already good.
    """
    if step < start:
        return 0.0
    return min(1.0, (step - start) / ramp_steps) if ramp_steps > 0 else 1.0


# --------------------------------------------------------------------------------------------------------------------
# All of it


class Adversary:
    """
    The game of tokenizer and discriminator, both of which learn from every batch.

    A step of training calls [`Adversary.generator_loss`] and adds the result to the tokenizer's loss, then
    [`Adversary.discriminator_loss`], whose result is the discriminator's whole loss, each once per batch, and
    [`Adversary.finish_step`] once per optimizer step. Register it for checkpoints.

    How it goes with distributed training: the discriminator's loss takes one forward pass over images and reconstructions
    together, and R1's penalty is a part of the same loss, computed from the same pass. So one backward pass visits each
    parameter once, as `DistributedDataParallel` wants it; the inner derivative is taken with respect to the images alone
    and touches no parameter's gradient. The generator's pass goes past the wrapper, through frozen parameters, and leaves
    nothing in the discriminator.

    Args:
        discriminator (`nn.Module`):
            Images to logits, as prepared by Accelerate. With R1 it cannot be compiled, since `torch.compile` has no second
            derivatives.
        loss (`str`, *optional*, defaults to `"hinge"`): `hinge` or `non_saturating`.
        weight (`float`, *optional*, defaults to 0.8): Weight of the generator's loss.
        start (`int`, *optional*, defaults to 0): The first step that the discriminator takes part in.
        ramp_steps (`int`, *optional*, defaults to 0): Steps from then on until `weight` is reached.
        adaptive (`bool`, *optional*, defaults to `True`): Multiply `weight` with [`adaptive_weight`].
        adaptive_minimum (`float`, *optional*, defaults to 0.0): Lower bound of the adaptive weight.
        adaptive_maximum (`float`, *optional*, defaults to 1e4): Upper bound of the adaptive weight.
        r1_weight (`float`, *optional*, defaults to 0.0): The papers' gamma; half of it multiplies [`r1_penalty`].
        lecam_weight (`float`, *optional*, defaults to 0.0): Weight of [`LeCamPenalty`].
        augmentation (`Sequence[str]`, *optional*, defaults to `()`): Policies of [`diff_augment`].
        seed (`int`, *optional*, defaults to 0): Seed of the augmentation.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        loss: str = "hinge",
        weight: float = 0.8,
        start: int = 0,
        ramp_steps: int = 0,
        adaptive: bool = True,
        adaptive_minimum: float = 0.0,
        adaptive_maximum: float = 1e4,
        r1_weight: float = 0.0,
        lecam_weight: float = 0.0,
        augmentation: Sequence[str] = (),
        seed: int = 0,
    ):
        if loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {loss!r}.")
        numbers = {"weight": weight, "start": start, "ramp_steps": ramp_steps, "adaptive_minimum": adaptive_minimum}
        numbers |= {"r1_weight": r1_weight, "lecam_weight": lecam_weight, "seed": seed}
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if adaptive_maximum < adaptive_minimum:
            raise ValueError(
                f"`adaptive_maximum` must be at least `adaptive_minimum` = {adaptive_minimum}, got {adaptive_maximum}."
            )
        check_policies(augmentation)
        self.discriminator = discriminator
        # Keeping a compiled wrapper would make Accelerate take the distributed one out of it for good.
        self.bare_discriminator = extract_model_from_parallel(discriminator, keep_torch_compile=False)
        self.compute_discriminator_loss, self.compute_generator_loss = LOSSES[loss]
        self.weight = weight
        self.start = start
        self.ramp_steps = ramp_steps
        self.adaptive = adaptive
        self.adaptive_minimum = adaptive_minimum
        self.adaptive_maximum = adaptive_maximum
        self.r1_weight = r1_weight
        self.lecam_weight = lecam_weight
        self.lecam_penalty = LeCamPenalty()
        self.augmentation = tuple(augmentation)
        self.seed = seed

    def is_active(self, step: int) -> bool:
        """Whether the discriminator takes part in this step, counted from 0."""
        return step >= self.start

    def generator_loss(
        self,
        sample: torch.Tensor,
        reconstruction_loss: torch.Tensor,
        last_layer: torch.Tensor,
        step: int,
        position: int,
    ) -> tuple[torch.Tensor, Figures]:
        """
        What to add to the tokenizer's loss.

        Args:
            sample (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`): Reconstructions, with gradient.
            reconstruction_loss (`torch.FloatTensor` of shape `()`):
                Loss of pixels and features with their weights, which the adaptive weight compares with.
            last_layer (`torch.Tensor`): Weight of the decoder's last layer.
            step (`int`): Optimizer step, counted from 0.
            position (`int`):
                Number of the batch among all batches of all processes. Augmentation follows from it and the seed alone,
                so a resumed run and one with other processes draw the same.

        Returns:
            `tuple[torch.FloatTensor, dict[str, torch.Tensor]]`: The loss with all its weights, and the figures
            `generator_loss` (without weights) and `adversarial_weight` (all weights together), without gradients.
        """
        with _frozen(self.bare_discriminator):
            logits = self.bare_discriminator(self._augment(sample.float(), position, GENERATOR_PASS))
        adversarial_loss = self.compute_generator_loss(logits.float())
        weight = torch.tensor(self.weight * adversarial_ramp(step, self.start, self.ramp_steps), device=sample.device)
        if self.adaptive:
            weight = weight * adaptive_weight(
                reconstruction_loss, adversarial_loss, last_layer, self.adaptive_minimum, self.adaptive_maximum
            )
        return weight * adversarial_loss, {"generator_loss": adversarial_loss.detach(), "adversarial_weight": weight}

    def discriminator_loss(
        self, target: torch.Tensor, sample: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, Figures]:
        """
        The discriminator's loss with its penalties.

        Args:
            target (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`): Images.
            sample (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`):
                Their reconstructions, whose gradient is cut off here.
            position (`int`): As for [`Adversary.generator_loss`].

        Returns:
            `tuple[torch.FloatTensor, dict[str, torch.Tensor]]`: The loss, and the figures `discriminator_loss` (without
            penalties), `real_logits` and `fake_logits` (means) and, if they are in use, `r1_penalty` and `lecam_penalty`
            (without weights), without gradients.
        """
        real, fake = target.detach().float(), sample.detach().float()
        if self.r1_weight > 0:
            # Before the augmentation: the penalty is about images, not about what is shown of them.
            real.requires_grad_()
        shown = [self._augment(real, position, REAL_PASS), self._augment(fake, position, FAKE_PASS)]
        # Stacked, not mixed: groups of images and groups of reconstructions stay apart.
        real_logits, fake_logits = self.discriminator(torch.cat(shown)).float().chunk(2)
        loss = self.compute_discriminator_loss(real_logits, fake_logits)
        figures = {"discriminator_loss": loss, "real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
        if self.r1_weight > 0:
            figures["r1_penalty"] = r1_penalty(real_logits, real)
            loss = loss + self.r1_weight / 2 * figures["r1_penalty"]
        if self.lecam_weight > 0:
            figures["lecam_penalty"] = self.lecam_penalty(real_logits, fake_logits)
            loss = loss + self.lecam_weight * figures["lecam_penalty"]
        return loss, {name: figure.detach() for name, figure in figures.items()}

    def finish_step(self) -> None:
        """After an optimizer step, on all processes."""
        self.lecam_penalty.finish_step()

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate's checkpoints, between two optimizer steps."""
        return {"lecam_averages": self.lecam_penalty.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For Accelerate's checkpoints."""
        self.lecam_penalty.averages = state_dict["lecam_averages"]

    def _augment(self, images: torch.Tensor, position: int, place: int) -> torch.Tensor:
        if not self.augmentation:
            return images
        # torch's generator on the CPU looks at the lowest 32 bits of a seed alone, so the numbers are mixed first.
        (seed,) = np.random.SeedSequence((self.seed, position, place)).generate_state(1)
        return diff_augment(images, self.augmentation, torch.Generator().manual_seed(int(seed)))


def make_adversary(
    args: Any, config: VQVAEConfig, accelerator: Accelerator
) -> tuple[Adversary, torch.optim.Optimizer]:
    """
    The adversary that `args`, the arguments of a training script, describe, for the images of a tokenizer.

    Args:
        args ([`AdversaryArguments`] and [`TrainingArguments`]): The arguments.
        config ([`VQVAEConfig`]): Configuration of the tokenizer.
        accelerator (`Accelerator`): Prepares discriminator and optimizer.

    Returns:
        `tuple`: The [`Adversary`] and the discriminator's optimizer.

    Raises:
        `ValueError`: If an argument is out of range or the images are too small for the discriminator.
    """
    discriminator = make_discriminator(
        args.discriminator,
        config.num_output_channels,
        config.image_size,
        args.train_batch_size,
        base_channels=args.discriminator_channels,
        num_layers=args.discriminator_layers,
    )
    optimizer = make_optimizer(discriminator, args, args.discriminator_learning_rate, args.discriminator_adam_beta1)
    discriminator, optimizer = accelerator.prepare(discriminator, optimizer)
    adversary = Adversary(
        discriminator,
        loss=args.adversarial_loss,
        weight=args.adversarial_weight,
        start=args.discriminator_start,
        ramp_steps=args.discriminator_ramp_steps,
        adaptive=args.adaptive_weight,
        adaptive_minimum=args.adaptive_weight_min,
        adaptive_maximum=args.adaptive_weight_max,
        r1_weight=args.r1_weight,
        lecam_weight=args.lecam_weight,
        augmentation=args.diffaugment,
        seed=args.seed,
    )
    return adversary, optimizer


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside gives gradients to `module`'s inputs, but not to its parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
