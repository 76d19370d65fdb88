# SPDX-License-Identifier: Apache-2.0
"""
The multi-scale residual quantizer of VAR (Tian et al. 2024, section 3.2, algorithms 1 and 2).

One scale as large as the latents is the quantizer of VQ-VAE, several such scales are that of RQ-VAE. Everything here
computes in fp32, also inside autocast: the search compares small differences of distances, and the running
reconstruction adds up over the scales.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ..scales import bounds
from .codebook import AveragedCodebook, BaseCodebook, Codebook, Float32Weights
from .configuration_vqvae import VQVAEConfig
from .fsq import FiniteScalarCodebook


CODEBOOKS: dict[str, type[BaseCodebook]] = {"vq": Codebook, "fsq": FiniteScalarCodebook}


# From vectors `(batch, length of scale, latent_channels)` to their codes `(batch, length of scale)`.
Search = Callable[[torch.Tensor], torch.Tensor]
# Called with such vectors and the codes that were found for them.
ScaleCallback = Callable[[torch.Tensor, torch.Tensor], None]


class RefinementConv(Float32Weights, nn.Conv2d):
    """phi(x) = (1 - ratio) x + ratio conv(x), which compensates for the loss of enlarging a token map."""

    def __init__(self, config: VQVAEConfig):
        super().__init__(config.latent_channels, config.latent_channels, kernel_size=3, padding=1, dtype=torch.float32)
        self.ratio = config.refinement_ratio

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * (1 - self.ratio) + super().forward(hidden_states) * self.ratio


def refinement_conv_indices(num_scales: int, num_convs: int) -> list[int]:
    """
    Which of `num_convs` shared convolutions serves each scale: the one whose tick is nearest to the scale's relative
    depth. The ticks' margins are narrower for four convolutions than for any other number.

    Many schedules, that of the released models among them, have scales exactly between two ticks. Which one is nearer
    is then a matter of rounding: the order of the operations below is part of the checkpoints.
    """
    margin = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    last_tick = 1 - margin
    step = (last_tick - margin) / max(num_convs - 1, 1)
    ticks = [margin + index * step for index in range(num_convs)]
    if num_convs > 1:
        ticks[-1] = last_tick
    depths = [scale / (num_scales - 1) if num_scales > 1 else 0.0 for scale in range(num_scales)]
    return [min(range(num_convs), key=lambda index: abs(ticks[index] - depth)) for depth in depths]


@dataclass
class QuantizerOutput:
    """
    Attributes:
        codes (`torch.LongTensor` of shape `(batch, length)`): Token maps of all scales.
        latents (`torch.FloatTensor` of shape `(batch, latent_channels, height, width)`): Sum over the scales.
        inputs (`torch.FloatTensor` of shape `(batch, length, latent_channels)`):
            The vectors that the search compared with the codes, without a gradient.
        loss (`torch.FloatTensor`, *optional*): Codebook and commitment terms, averaged over the scales.
    """

    codes: torch.Tensor
    latents: torch.Tensor
    inputs: torch.Tensor
    loss: torch.Tensor | None = None


class Step(NamedTuple):
    """A step of the residual loop: the vectors that were quantized, their codes, and the latents after the scale."""

    inputs: torch.Tensor | None  # (batch, length of scale, latent_channels)
    codes: torch.Tensor | None  # (batch, length of scale)
    latents: torch.Tensor  # (batch, latent_channels, height, width)


class MultiScaleResidualQuantizer(nn.Module):
    """Quantize a feature map as a sum of enlarged and refined token maps of growing size."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.scale_sizes = config.scale_sizes
        self.scale_bounds = bounds(config.scale_lengths)
        self.latent_channels = config.latent_channels
        self.commitment_loss_weight = config.commitment_loss_weight
        self.codebook_loss_weight = config.codebook_loss_weight
        self.has_trainable_codes = config.has_trainable_codes
        self.codebook = (AveragedCodebook if config.codebook_averages else CODEBOOKS[config.quantizer])(config)
        num_scales = len(self.scale_sizes)
        # As many convolutions as scales give each scale its own.
        num_convs = config.num_refinement_convs or num_scales
        self.refinement_indices = refinement_conv_indices(num_scales, num_convs)
        self.refinement_convs = nn.ModuleList(
            RefinementConv(config) for _ in range(num_convs if config.refinement_ratio > 0 else 0)
        )

    def pool(self, latents: torch.Tensor, scale: int) -> torch.Tensor:
        """Reduce a map of the size of the latents to that of `scale` by averaging over areas."""
        if self.scale_sizes[scale] == tuple(latents.shape[-2:]):
            return latents
        if latents.device.type == "mps":
            # Apple's kernel pools to divisors of the size only.
            return functional.interpolate(latents.cpu(), size=self.scale_sizes[scale], mode="area").to(latents.device)
        return functional.interpolate(latents, size=self.scale_sizes[scale], mode="area")

    def tokens(self, latents: torch.Tensor, scale: int) -> torch.Tensor:
        """`latents` at the size of `scale`, `(batch, length of scale, latent_channels)`."""
        return self.pool(latents, scale).flatten(2).transpose(1, 2)

    def expand(self, code_vectors: torch.Tensor, scale: int) -> torch.Tensor:
        """What `code_vectors` of shape `(batch, length of scale, latent_channels)` add to the latents."""
        extent = self.codebook.extent(scale, code_vectors.device)
        if extent is not None:
            code_vectors = code_vectors * extent
        height, width = self.scale_sizes[scale]
        expanded = code_vectors.transpose(1, 2).unflatten(2, (height, width))
        if self.scale_sizes[scale] != self.scale_sizes[-1]:
            expanded = functional.interpolate(expanded, size=self.scale_sizes[-1], mode="bicubic")
        if len(self.refinement_convs) == 0:
            return expanded.contiguous()
        return self.refinement_convs[self.refinement_indices[scale]](expanded.contiguous())

    def steps(
        self,
        features: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        exact: bool = False,
        search: Search | None = None,
    ) -> Iterator[Step]:
        """
        The residual loop, in which the token map of every scale adds to the latents. The maps are those that `codes`
        of shape `(batch, length)` hold, coarse to fine (algorithm 2). Or they code what the scales before them leave
        of `features` (algorithm 1), by `search` in place of the nearest codes if given; with `exact` without an error,
        as if there were infinitely many codes.
        """
        search = search or self.codebook
        residual = latents = None
        if features is not None:
            # Where the codes are weights, the residual only steers the search, which has no gradient.
            residual = features.float().detach() if self.has_trainable_codes else features.float()
            latents = torch.zeros_like(residual)
        for scale, (begin, end) in enumerate(self.scale_bounds):
            if residual is not None:
                inputs = self._search_inputs(residual, scale)
                found = None if exact else search(inputs)
                vectors = inputs if found is None else self.codebook.straight_through(self.codebook(found), inputs)
            elif codes is not None and begin < codes.shape[1]:
                inputs, found = None, codes[:, begin:end]
                vectors = self.codebook(found)
            else:
                return
            update = self.expand(vectors, scale)
            latents = update if latents is None else latents + update
            if residual is not None:
                residual = residual - (update.detach() if self.has_trainable_codes else update)
            yield Step(inputs, found, latents)

    def forward(
        self,
        features: torch.Tensor,
        return_loss: bool = False,
        callback_on_scale_end: ScaleCallback | None = None,
    ) -> QuantizerOutput:
        """
        Args:
            features (`torch.FloatTensor` of shape `(batch, latent_channels, height, width)`): The encoder's output.
            return_loss (`bool`, *optional*, defaults to `False`): Whether to compute the training terms.
            callback_on_scale_end (`Callable`, *optional*): Called after every scale, before the next one is searched.
        """
        features = features.float()
        steps, loss = [], features.new_zeros(())
        for step in self.steps(features):
            steps.append(step)
            if return_loss and self.has_trainable_codes:
                commitment = functional.mse_loss(step.latents.detach(), features)
                codebook = functional.mse_loss(step.latents, features.detach())
                loss = loss + self.commitment_loss_weight * commitment + self.codebook_loss_weight * codebook
            if callback_on_scale_end is not None:
                callback_on_scale_end(step.inputs.detach(), step.codes)  # pyright: ignore
        return QuantizerOutput(
            codes=torch.cat([step.codes for step in steps], dim=1),
            latents=steps[-1].latents,
            inputs=torch.cat([step.inputs for step in steps], dim=1).detach(),
            loss=loss / len(steps) if return_loss else None,
        )

    def straight_through(self, features: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The value of `latents` with a gradient for the encoder: past a search that has none (VQ-VAE, section 3.2)."""
        features = features.float()
        return features + (latents - features).detach() if self.has_trainable_codes else latents

    def _search_inputs(self, residual: torch.Tensor, scale: int) -> torch.Tensor:
        """The vectors that `scale` quantizes, `(batch, length of scale, latent_channels)`."""
        inputs, extent = self.tokens(residual, scale), self.codebook.extent(scale, residual.device)
        return inputs if extent is None else inputs / extent


def full_precision(tensor: torch.Tensor) -> AbstractContextManager:
    """Switch off autocast on the device of `tensor`."""
    # The meta device, for example, has no autocast.
    available = torch.amp.is_autocast_available(tensor.device.type)
    return torch.autocast(tensor.device.type, enabled=False) if available else nullcontext()
