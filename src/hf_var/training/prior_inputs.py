# SPDX-License-Identifier: Apache-2.0
"""Inputs and targets of a prior in training."""

from dataclasses import dataclass
from typing import Any, cast

import torch

from ..autoencoders import Tokenizer, VQVAEModel
from ..priors import RQTransformerConfig, VARConfig, stack_codes
from ..ranges import CheckedFields, NonNegativeFloat, PartialShare, argument


@torch.no_grad()
def prior_inputs(vqvae: VQVAEModel, batch: dict[str, torch.Tensor], is_raster: bool = False) -> dict[str, Any]:
    """
    The arguments of a [`VARTransformer`] for a batch of `codes` `(batch, length)` or `pixel_values` in [-1, 1] and of
    a condition, which is passed on. Every scale reads the image's own coarser scales or, in raster order, every token
    the code vector of the token before (Esser et al. 2021, section 3.2).
    """
    inputs, _ = _codes_and_features(vqvae, batch)
    codes = inputs.pop("codes")
    scale_inputs = vqvae.teacher_forcing(codes, is_raster)
    return {**inputs, "scale_inputs": scale_inputs, "labels": codes}


def check_blocks(config: VARConfig) -> None:
    """Raise a `ValueError` unless a transformer predicts single tokens or whole scales."""
    if not config.has_known_inputs:
        raise ValueError(
            f"`block_sizes` must be one block per scale, {config.scale_lengths}, or all ones for raster order, got "
            f"{config.block_sizes}."
        )


@torch.no_grad()
def level_inputs(vqvae: Tokenizer, level: int, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    The arguments of a prior of one level (a [`PixelCNN`] or [`PixelSNAIL`]) for a batch as above: the codes of the level,
    which are also the targets, and those of the coarser one as its condition (Razavi et al. 2019, section 3.2).
    """
    inputs, _ = _codes_and_features(vqvae, batch)
    levels = inputs.pop("codes").split(vqvae.config.scale_lengths, dim=1)
    condition = {"condition_codes": levels[level - 1]} if level > 0 else {}
    return {**inputs, **condition, "codes": levels[level], "labels": levels[level]}


@dataclass(kw_only=True)
class CodeNoiseConfig(CheckedFields):
    """How the codes of a training are changed at random."""

    code_replacement_prob: PartialShare = argument(
        0.0, help="read another code with this probability, 1 - pkeep of VQGAN; the targets stay"
    )
    stochastic_codes: bool = argument(
        False, help="sample the codes of an image by their distances to its features, at soft_code_temperature"
    )
    soft_code_temperature: NonNegativeFloat = argument(
        0.0, help="targets are the probabilities of codes by their distances at this temperature; 0: single codes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stochastic_codes and self.soft_code_temperature == 0:
            raise ValueError("`stochastic_codes` needs a `soft_code_temperature` above 0, got 0.")


@dataclass
class StackInputs:
    """
    The arguments of an [`RQTransformer`] for a batch of `codes` `(batch, length)` or `pixel_values`, and a condition,
    which is passed on: the codes of `condition_pixel_values` are those of `condition_vqvae`. `vqvae` is a
    [`VQVAEModel`]. In training there may be `noise`, from torch's own generator, as dropout has it.
    """

    vqvae: Any
    config: RQTransformerConfig
    condition_vqvae: Tokenizer | None = None
    noise: CodeNoiseConfig | None = None

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        inputs, features = _codes_and_features(self.vqvae, batch)
        if "condition_pixel_values" in inputs:
            encoded = cast(Any, cast(Tokenizer, self.condition_vqvae).encode(inputs.pop("condition_pixel_values")))
            inputs["condition_ids"] = encoded.codes
        targets, codes = {}, inputs.pop("codes")
        if features is not None and self.noise is not None and self.noise.soft_code_temperature > 0:
            codes, probabilities = self.vqvae.soft_codes(
                features, self.noise.soft_code_temperature, self.noise.stochastic_codes
            )
            targets["soft_labels"] = stack_codes(probabilities, self.config.depth)
        stacks = stack_codes(codes, self.config.depth)
        read = stacks if self.noise is None else replaced_codes(stacks, self.noise, self.config.codebook_size)
        if self.config.code_inputs == "tokens":
            inputs["codes"] = read
        else:
            inputs["code_vectors"] = self.vqvae.code_vectors(read)
        return {**inputs, **(targets or {"labels": stacks})}


def replaced_codes(codes: torch.Tensor, noise: CodeNoiseConfig, codebook_size: int) -> torch.Tensor:
    """`codes`, of which some are others, all equally probable (Esser et al. 2021, public code)."""
    if noise.code_replacement_prob == 0:
        return codes
    replaced = torch.rand(codes.shape, device=codes.device) < noise.code_replacement_prob
    return torch.where(replaced, torch.randint_like(codes, codebook_size), codes)


def _codes_and_features(vqvae: Tokenizer, batch: dict[str, torch.Tensor]) -> tuple[dict[str, Any], Any]:
    """The batch on the tokenizer's device with codes in place of images, and the features of these, if it had images."""
    inputs: dict[str, Any] = {name: values.to(vqvae.device, non_blocking=True) for name, values in batch.items()}
    if "codes" in inputs:
        return inputs, None
    encoded = cast(Any, vqvae.encode(inputs.pop("pixel_values")))
    return {**inputs, "codes": encoded.codes}, encoded.features
