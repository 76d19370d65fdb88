# SPDX-License-Identifier: Apache-2.0
"""Losses of generator and discriminator, penalties that keep the discriminator stable, and weights between them."""

from collections.abc import Callable
from typing import cast

import torch
from accelerate.utils import reduce
from torch.nn import functional


# Gradients of an image's pixels are below what fp16 can hold; a power of two leaves the other dtypes' digits alone.
GRADIENT_SCALE = 1024.0


# --------------------------------------------------------------------------------------------------------------------
# Losses of both players. The discriminator's are sums over real and fake, without the factor 1/2 that VQGAN has.


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017), a scalar."""
    return functional.relu(1 - real_logits).mean() + functional.relu(1 + fake_logits).mean()


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the generator, a scalar. It has no lower bound; negative values are normal."""
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
    Mean squared length of the discriminator's gradient at real images (R1, Mescheder et al. 2018, section 4.1), a
    scalar that is differentiable with respect to the discriminator's parameters. Several logits of an image count as
    their mean, so that the penalty does not grow with the number of patches.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    # Divided after the backward pass, whose small numbers fp16 would lose.
    gradient = gradient.float() / real_logits[0].numel()
    return gradient.square().sum(dim=(1, 2, 3)).mean()


class LeCamPenalty:
    r"""
    Holds the logits of each side to the running average of the other side's (LeCam, Tseng et al. 2021, section 3.2):
    \( E[(D(x) - \alpha_{fake})^2] + E[(D(\hat x) - \alpha_{real})^2] \). The averages begin with the means of the
    first step, which is not penalised, and change once per step by the means of all batches on all processes.
    """

    def __init__(self, decay: float = 0.99):
        self.decay = decay
        self.averages: torch.Tensor | None = None  # (2,): real, fake
        self._means: list[torch.Tensor] = []

    def __call__(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Penalty of a batch, a scalar. Stores the logits' means for [`LeCamPenalty.finish_step`]."""
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
    The weight that makes the adversarial gradient at the decoder's `last_layer` as long as that of the reconstruction
    (Esser et al. 2021, equation 7). It is that of one batch on one process, so no gradient is stored or exchanged.
    """
    lengths = []
    for loss in (reconstruction_loss, adversarial_loss):
        (gradient,) = torch.autograd.grad(GRADIENT_SCALE * loss, last_layer, retain_graph=True)
        lengths.append(gradient.float().norm() / GRADIENT_SCALE)
    return (lengths[0] / (lengths[1] + epsilon)).clamp(minimum, maximum)


def adversarial_ramp(step: int, start: int, ramp_steps: int) -> float:
    """Factor on the adversarial weight: gradients of an untrained discriminator damage good reconstructions."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / ramp_steps) if ramp_steps > 0 else 1.0
